//! Guest memory: one anonymous mapping, aligned for huge pages, in one or two regions.
//!
//! Private rather than a memfd: hosts give anonymous memory huge pages and, as Debian and most
//! others are set up, memfds none (`transparent_hugepage/shmem_enabled` is `never`). Every page
//! of 4 KiB that the guest touches first is an exit; with a memfd a boot of a Debian kernel has
//! 28,000 of them and takes a quarter longer.

use std::ptr;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    MmapRegion,
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

/// Allocates guest memory: zeroed, and backed by the host only where the guest touches it.
///
/// The mapping lives to the end of the process: whatever device still holds its address, it
/// never dangles. A reboot does not allocate it again, it [clears](clear) it.
pub(crate) fn allocate(size: u64) -> Result<Arc<GuestMemory>> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::failed(format!(
            "cannot map {} MiB of guest memory: {error}",
            size >> 20
        ))
        .help("lower `memory`, or raise the host's limits (`ulimit -v`, vm.overcommit_memory)")
    };
    let size = usize::try_from(size).map_err(|error| failed(&error))?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping where the kernel has room, so nothing that exists is touched.
    let base = unsafe { mmap_anonymous(ptr::null_mut(), size + HUGE_PAGE, protection, flags) }
        .map_err(|error| failed(&error))?;
    let mut base = base.cast::<u8>().wrapping_add(base.align_offset(HUGE_PAGE));
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
    for (start, len) in ranges(size as u64) {
        let len = len as usize;
        let (protection, flags) = (protection.bits() as i32, flags.bits() as i32);
        // SAFETY: the pieces lie one behind the other in the mapping made above, which covers
        // `size` bytes behind its aligned start and is never unmapped.
        let region = unsafe { MmapRegion::build_raw(base, len, protection, flags) }
            .map_err(|error| failed(&error))?;
        base = base.wrapping_add(len);
        regions.push(
            GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or_else(|| failed(&"it exceeds the address space"))?,
        );
    }
    GuestMemory::from_regions(regions)
        .map(Arc::new)
        .map_err(|error| failed(&error))
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
        // SAFETY: the range is one region of a private anonymous mapping, so it reads as zeroes
        // afterwards; no reference into guest memory exists anywhere, only raw pointers.
        unsafe { madvise(base.cast(), region.len() as usize, Advice::LinuxDontNeed) }
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

    #[test]
    fn both_sides_of_the_hole_are_distinct_memory() {
        let memory = allocate((3 << 30) + (1 << 20)).unwrap();
        memory
            .write_obj(1_u64, GuestAddress(HOLE_START - 8))
            .unwrap();
        memory.write_obj(2_u64, GuestAddress(HOLE_END)).unwrap();
        assert_eq!(
            memory
                .read_obj::<u64>(GuestAddress(HOLE_START - 8))
                .unwrap(),
            1
        );
        assert_eq!(memory.read_obj::<u64>(GuestAddress(HOLE_END)).unwrap(), 2);
        assert!(!memory.address_in_range(GuestAddress(HOLE_START)));
    }

    #[test]
    fn guest_and_host_addresses_agree_below_a_huge_page() {
        let memory = allocate((3 << 30) + (1 << 20)).unwrap();
        for start in [0, HOLE_END] {
            let host = memory.get_host_address(GuestAddress(start)).unwrap();
            assert_eq!(host as usize % HUGE_PAGE, start as usize % HUGE_PAGE);
        }
    }

    #[test]
    fn cleared_memory_reads_as_zeroes() {
        let memory = allocate(16 << 20).unwrap();
        memory
            .write_obj(0x5555_5555_u32, GuestAddress(0x1234))
            .unwrap();
        clear(&memory).unwrap();
        assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1234)).unwrap(), 0);
    }
}
