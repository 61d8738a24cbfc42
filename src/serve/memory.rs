//! The memory that a front end shares: files it has sent, mapped.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use super::faults::Guarded;
use super::wrong;
use crate::devices::GuestMemory;

/// Most regions of one front end. QEMU has one for each memory device, and a few for its machine.
pub(super) const MAX_REGIONS: usize = 256;

/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;
/// The file system whose files are made of huge pages (linux/magic.h).
const HUGETLBFS: i64 = 0x9584_58f6;

/// Where a region is: all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Guest-physical address.
    pub(super) guest: u64,
    pub(super) len: u64,
    /// Address in the front end's own process: that is how it names its rings.
    pub(super) user: u64,
    /// Offset in the file.
    pub(super) offset: u64,
}

/// One region, mapped as long as this or a device's memory made of it is there.
struct Region {
    place: Place,
    /// Goes before the mapping does.
    _guarded: Guarded,
    mapping: Arc<GuestRegionMmap>,
}

/// The regions of a front end.
#[derive(Default)]
pub(super) struct Regions(Vec<Region>);

impl Regions {
    /// Maps one more region. Fails if there are too many, it is empty, wraps around, overlaps
    /// another one, or does not lie in its file; and with the host's error. It may end within a
    /// page: the driver of libblkio has its rings in one that is as long as they are.
    pub(super) fn add(&mut self, place: Place, file: File) -> io::Result<()> {
        let Place {
            guest,
            len,
            user,
            offset,
        } = place;
        if self.0.len() == MAX_REGIONS {
            return Err(wrong(format!("more than {MAX_REGIONS} memory regions")));
        }
        let ends = [guest, user, offset].map(|start| start.checked_add(len));
        let [Some(guest_end), Some(_), Some(file_end)] = ends else {
            return Err(wrong("a memory region wraps around"));
        };
        if len == 0 {
            return Err(wrong("a memory region is empty"));
        }
        let overlaps = |other: &Region| {
            let other = other.place;
            guest < other.guest + other.len && other.guest < guest_end
        };
        if self.0.iter().any(overlaps) {
            return Err(wrong("two memory regions overlap"));
        }
        let meta = file.metadata()?;
        // Of a device or a pipe nobody knows what its memory does.
        if !meta.is_file() || meta.len() < file_end {
            return Err(wrong("a memory region is no part of its file"));
        }
        let page = page_of(&file)?;
        if !offset.is_multiple_of(page) || (page > PAGE && !len.is_multiple_of(page)) {
            return Err(wrong("a memory region is not made of pages of its file"));
        }
        // A file on a broken disk is found out here, and not by a fault.
        file.read_at(&mut [0], offset)?;
        let size = usize::try_from(len).map_err(|_| wrong("a memory region is too large"))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), size)
            .map_err(|error| wrong(format!("a memory region cannot be mapped: {error}")))?;
        let guarded = Guarded::new(mapping.as_ptr() as usize, size, page)
            .ok_or_else(|| wrong("too many memory regions"))?;
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(guest))
            .ok_or_else(|| wrong("a memory region wraps around"))?;
        self.0.push(Region {
            place,
            _guarded: guarded,
            mapping: Arc::new(mapping),
        });
        Ok(())
    }

    /// Takes the region away that has this place; its offset does not count.
    pub(super) fn remove(&mut self, place: Place) -> io::Result<()> {
        let key = |place: &Place| (place.guest, place.len, place.user);
        let index = self.0.iter().position(|it| key(&it.place) == key(&place));
        let index = index.ok_or_else(|| wrong("a memory region to remove is not there"))?;
        self.0.remove(index);
        Ok(())
    }

    /// The guest-physical address of an address in the front end's process.
    pub(super) fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        let places = self.0.iter().map(|region| region.place);
        places
            .filter_map(|place| Some((user.checked_sub(place.user)?, place)))
            .find(|(offset, place)| *offset < place.len)
            .and_then(|(offset, place)| place.guest.checked_add(offset))
            .map(GuestAddress)
    }

    /// All of it, as a device takes it.
    pub(super) fn memory(&self) -> io::Result<Arc<GuestMemory>> {
        let mut regions: Vec<_> = self.0.iter().collect();
        regions.sort_unstable_by_key(|region| region.place.guest);
        let mappings = regions.iter().map(|region| Arc::clone(&region.mapping));
        GuestMemory::from_arc_regions(mappings.collect())
            .map(Arc::new)
            .map_err(|error| wrong(format!("no memory for the rings: {error}")))
    }
}

/// Bytes of the pages that a file is mapped in.
pub(super) fn page_of(file: &File) -> io::Result<u64> {
    let system = rustix::fs::fstatfs(file)?;
    Ok(match system.f_type {
        HUGETLBFS => system.f_bsize as u64,
        _ => PAGE,
    })
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    fn memfd(len: u64) -> File {
        let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        File::from(file)
    }

    fn place(guest: u64, len: u64, user: u64, offset: u64) -> Place {
        Place {
            guest,
            len,
            user,
            offset,
        }
    }

    #[test]
    fn an_address_of_the_front_end_is_found_in_its_region() {
        let mut regions = Regions::default();
        regions
            .add(place(0x10_0000, 0x2000, 0x7000, 0), memfd(0x2000))
            .unwrap();
        regions
            .add(place(0, 0x1000, 0x9000, 0x1000), memfd(0x2000))
            .unwrap();
        let found = |user| regions.guest_address(user).map(|address| address.0);
        assert_eq!(found(0x7000), Some(0x10_0000));
        assert_eq!(found(0x8fff), Some(0x10_1fff));
        assert_eq!(found(0x9010), Some(0x10));
        assert_eq!(found(0x6fff), None);
        assert_eq!(found(0xa000), None);
        let memory = regions.memory().unwrap();
        memory.write_obj(7u64, GuestAddress(0xff8)).unwrap();
        memory.write_obj(8u64, GuestAddress(0x10_1ff8)).unwrap();
        assert_eq!(memory.num_regions(), 2);
    }

    #[test]
    fn a_region_that_makes_no_sense_is_refused() {
        let mut regions = Regions::default();
        regions.add(place(0, 0x2000, 0, 0), memfd(0x2000)).unwrap();
        for (at, len, said) in [
            (place(0x2000, 0, 0, 0), 0x1000, "is empty"),
            (
                place(0x2000, 0x1000, 0, 0x1000),
                0x1fff,
                "no part of its file",
            ),
            (place(0x2000, 0x1000, 0, 0x800), 0x2000, "pages of its file"),
            (place(0x1000, 0x2000, 0, 0), 0x2000, "overlap"),
            (place(u64::MAX - 1, 0x1000, 0, 0), 0x1000, "wraps"),
            (place(0x2000, 0x1000, u64::MAX, 0), 0x1000, "wraps"),
            (place(0x2000, 0x1000, 0, u64::MAX), 0x1000, "wraps"),
        ] {
            let error = regions.add(at, memfd(len)).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        let null = File::open("/dev/zero").unwrap();
        assert!(regions.add(place(0x2000, 0x1000, 0, 0), null).is_err());
        assert!(regions.remove(place(0, 0x1000, 0, 0)).is_err());
        regions.remove(place(0, 0x2000, 0, 5)).unwrap();
        assert_eq!(regions.guest_address(0), None);
    }

    #[test]
    fn regions_are_bounded() {
        let mut regions = Regions::default();
        for at in 0..MAX_REGIONS as u64 {
            let at = place(at << 12, 0x1000, at << 12, 0);
            regions.add(at, memfd(0x1000)).unwrap();
        }
        let more = place(1 << 40, 0x1000, 0, 0);
        assert!(regions.add(more, memfd(0x1000)).is_err());
    }
}
