//! Guest memory: one mapping, aligned for huge pages, in one or two regions.
//!
//! Private and anonymous rather than a memfd, unless another process serves a disk: hosts give anonymous memory huge pages and, as Debian and most
//! others are set up, memfds none (`transparent_hugepage/shmem_enabled` is `never`). Every page
//! of 4 KiB that the guest touches first is an exit; with a memfd a boot of a Debian kernel has
//! 28,000 of them and takes a quarter longer.

use std::fs::File;
use std::io;
use std::ptr;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::layout::{HOLE_END, HOLE_START};
use crate::devices::GuestMemory;
use crate::{Error, Result};

/// Huge pages of x86_64. KVM maps one only where guest and host address agree below it.
const HUGE_PAGE: usize = 2 << 20;

/// The address ranges of `size` bytes of RAM, as (start, length): up to the hole below 4 GiB,
/// then above it.
pub(crate) fn ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= HOLE_START {
        vec![(0, size)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, size - HOLE_START)]
    }
}

/// Who else sees guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Nobody.
    Private,
    /// Processes that serve disks.
    WithServers,
}

/// Allocates guest memory: zeroed, and backed by the host only where the guest touches it.
///
/// The mapping lives to the end of the process: whatever device still holds its address, it
/// never dangles. A reboot does not allocate it again, it [clears](clear) it.
pub(crate) fn allocate(size: u64, sharing: Sharing) -> Result<Arc<GuestMemory>> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::failed(format!(
            "cannot map {} MiB of guest memory: {error}",
            size >> 20
        ))
        .help("lower `memory`, or raise the host's limits (`ulimit -v`, vm.overcommit_memory)")
    };
    let size = usize::try_from(size).map_err(|error| failed(&error))?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let private = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping where the kernel has room, so nothing that exists is touched.
    let base = unsafe { mmap_anonymous(ptr::null_mut(), size + HUGE_PAGE, protection, private) }
        .map_err(|error| failed(&error))?;
    let mut base = base.cast::<u8>().wrapping_add(base.align_offset(HUGE_PAGE));
    let (file, flags) = match sharing {
        Sharing::Private => (None, private),
        Sharing::WithServers => {
            let file = memfd(size as u64).map_err(|error| failed(&error))?;
            let flags = MapFlags::SHARED | MapFlags::NORESERVE;
            let fixed = flags | MapFlags::FIXED;
            // SAFETY: the range lies in the mapping just made, which nobody uses yet.
            unsafe { mmap(base.cast(), size, protection, fixed, &file, 0) }
                .map_err(|error| failed(&error))?;
            (Some(Arc::new(file)), flags)
        }
    };
    // Neither is needed to run, so a host that refuses is left in peace.
    for advice in [
        Advice::LinuxHugepage,
        Advice::LinuxDontDump,
        Advice::LinuxDontFork,
    ] {
        // SAFETY: the range lies in the mapping just made; no advice changes what it reads as,
        // and this process is never forked while a VM runs.
        if let Err(error) = unsafe { madvise(base.cast(), size, advice) } {
            tracing::debug!("madvise({advice:?}) of guest memory: {error}");
        }
    }

    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in ranges(size as u64) {
        let region = MmapRegionBuilder::new(len as usize)
            .with_mmap_prot(protection.bits() as i32)
            .with_mmap_flags(flags.bits() as i32);
        let region = match &file {
            Some(file) => region.with_file_offset(FileOffset::from_arc(Arc::clone(file), offset)),
            None => region,
        };
        // SAFETY: the pieces lie one behind the other in the mapping made above, which covers
        // `size` bytes behind its aligned start and is never unmapped.
        let region = unsafe { region.with_raw_mmap_pointer(base) };
        let region = region.build().map_err(|error| failed(&error))?;
        base = base.wrapping_add(len as usize);
        offset += len;
        regions.push(
            GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or_else(|| failed(&"it exceeds the address space"))?,
        );
    }
    GuestMemory::from_regions(regions)
        .map(Arc::new)
        .map_err(|error| failed(&error))
}

/// A file without a name that has so many bytes for good: who has it too cannot make it shorter,
/// which would be our end at the next access.
fn memfd(size: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match memfd_create("guest memory", flags | MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3.
        Err(Errno::INVAL) => memfd_create("guest memory", flags)?,
        created => created?,
    };
    ftruncate(&file, size)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(file))
}

/// Gives all of it back to the host: it reads as zeroes again. Nothing else may use it meanwhile.
pub(crate) fn clear(memory: &GuestMemory) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::failed(format!("cannot clear guest memory for a reboot: {error}"))
    };
    for region in memory.iter() {
        let base = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|error| failed(&error))?;
        // Of memory that is shared, the file has to forget it.
        let advice = match region.file_offset() {
            None => Advice::LinuxDontNeed,
            Some(_) => Advice::LinuxRemove,
        };
        // SAFETY: the range is one region of a mapping that reads as zeroes afterwards; no
        // reference into guest memory exists anywhere, only raw pointers.
        unsafe { madvise(base.cast(), region.len() as usize, advice) }
            .map_err(|error| failed(&error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_up_to_the_hole_is_one_region() {
        assert_eq!(ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(ranges(3 << 30), [(0, 3 << 30)]);
    }

    #[test]
    fn memory_past_three_gib_goes_on_at_four_gib() {
        assert_eq!(ranges(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    const EACH: [Sharing; 2] = [Sharing::Private, Sharing::WithServers];

    #[test]
    fn both_sides_of_the_hole_are_distinct_memory() {
        for sharing in EACH {
            let memory = allocate((3 << 30) + (1 << 20), sharing).unwrap();
            let (below, above) = (GuestAddress(HOLE_START - 8), GuestAddress(HOLE_END));
            memory.write_obj(1_u64, below).unwrap();
            memory.write_obj(2_u64, above).unwrap();
            assert_eq!(memory.read_obj::<u64>(below).unwrap(), 1);
            assert_eq!(memory.read_obj::<u64>(above).unwrap(), 2);
            assert!(!memory.address_in_range(GuestAddress(HOLE_START)));
        }
    }

    #[test]
    fn guest_and_host_addresses_agree_below_a_huge_page() {
        for sharing in EACH {
            let memory = allocate((3 << 30) + (1 << 20), sharing).unwrap();
            for start in [0, HOLE_END] {
                let host = memory.get_host_address(GuestAddress(start)).unwrap();
                assert_eq!(host as usize % HUGE_PAGE, start as usize % HUGE_PAGE);
            }
        }
    }

    #[test]
    fn cleared_memory_reads_as_zeroes() {
        for sharing in EACH {
            let memory = allocate(16 << 20, sharing).unwrap();
            let at = GuestAddress(0x1234);
            memory.write_obj(0x5555_5555_u32, at).unwrap();
            clear(&memory).unwrap();
            assert_eq!(memory.read_obj::<u32>(at).unwrap(), 0);
            memory.write_obj(7_u32, at).unwrap();
            assert_eq!(memory.read_obj::<u32>(at).unwrap(), 7);
        }
    }

    #[test]
    fn who_has_the_file_sees_what_the_guest_sees_and_cannot_make_it_shorter() {
        use std::os::unix::fs::FileExt;

        let memory = allocate((3 << 30) + (2 << 20), Sharing::WithServers).unwrap();
        memory
            .write_obj(0x1122_3344_u32, GuestAddress(HOLE_END + 4096))
            .unwrap();
        let region = memory.find_region(GuestAddress(HOLE_END)).unwrap();
        let file = region.file_offset().unwrap();
        let mut seen = [0; 4];
        let at = file.start() + 4096;
        file.file().read_exact_at(&mut seen, at).unwrap();
        assert_eq!(u32::from_ne_bytes(seen), 0x1122_3344);
        assert!(file.file().set_len(4096).is_err());
        assert!(file.file().set_len(8 << 30).is_err());
        let private = allocate(2 << 20, Sharing::Private).unwrap();
        let region = private.find_region(GuestAddress(0)).unwrap();
        assert!(region.file_offset().is_none());
    }
}
