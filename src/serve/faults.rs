//! A front end that makes a file shorter whose memory it has shared: an access to what is gone
//! is a SIGBUS, which must end its connection and not this process.
//!
//! The handler puts zeroed memory in the place of the whole region, for good, and signals an
//! eventfd; in the place of a page, where the host overcommits no more. What the device does with zeroes is its guest's affair until the connection ends.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::EventfdFlags;
use vm_memory::MmapRegion;

use super::memory::{MAX_REGIONS, PAGE};
use super::wrong;

/// Two front ends' worth: the regions of one may be mapped before those they replace go. And the
/// records of requests in flight: of this front end, of the one before, and what replaces it.
const SLOTS: usize = 2 * MAX_REGIONS + 8;

/// A mapping; with the length 0 it is none.
struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
}

static MAPPINGS: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
    }
}; SLOTS];

/// Signalled by the handler.
static FAULTED: OnceLock<OwnedFd> = OnceLock::new();

/// A mapping in which a SIGBUS is survived, as long as this lives.
pub(super) struct Guarded(&'static Slot);

impl Guarded {
    /// Of so many bytes, in pages of so many. `None` if there are too many mappings.
    pub(super) fn new(start: usize, len: usize, page: u64) -> Option<Guarded> {
        let free = |slot: &&Slot| {
            let taken = slot
                .start
                .compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed);
            taken.is_ok()
        };
        let slot = MAPPINGS.iter().find(free)?;
        slot.page.store(page as usize, Ordering::Relaxed);
        slot.len.store(len, Ordering::Release);
        Some(Guarded(slot))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.0.len.store(0, Ordering::Release);
        self.0.start.store(0, Ordering::Release);
    }
}

/// The memory of a file of small pages, in which a SIGBUS is survived.
pub(super) struct Mapped {
    /// Goes before the mapping does.
    _guarded: Guarded,
    region: MmapRegion,
}

impl Mapped {
    pub(super) fn new(region: MmapRegion) -> io::Result<Mapped> {
        let guarded = Guarded::new(region.as_ptr() as usize, region.size(), PAGE);
        let guarded = guarded.ok_or_else(|| wrong("too many memory regions"))?;
        Ok(Mapped {
            _guarded: guarded,
            region,
        })
    }
}

impl Deref for Mapped {
    type Target = MmapRegion;

    fn deref(&self) -> &MmapRegion {
        &self.region
    }
}

/// Survives them from now on; the eventfd tells that there was one.
pub(super) fn survive() -> io::Result<BorrowedFd<'static>> {
    if FAULTED.get().is_none() {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let _ = FAULTED.set(event);
    }
    // SAFETY: all zeroes is a valid `sigaction`: no flags, no mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler is async-signal-safe: it reads atomics and makes system calls.
    match unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } {
        0 => FAULTED
            .get()
            .map(AsFd::as_fd)
            .ok_or_else(|| io::Error::other("no eventfd")),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts zeroed memory in the place of a mapping, or at least of its page with this address; whether
/// the host has it.
///
/// # Safety
///
/// As for [`replace`].
unsafe fn cover(start: usize, len: usize, page: usize, address: usize) -> bool {
    let faulted = address - (address - start) % page.max(1);
    // SAFETY: the caller's.
    unsafe { replace(start, len) || replace(faulted, page) }
}

/// Puts zeroed memory in the place of a mapping or of pages of it; whether the host has it.
///
/// # Safety
///
/// The memory is accessed through raw pointers only.
unsafe fn replace(start: usize, len: usize) -> bool {
    let at = start as *mut libc::c_void;
    let (rights, kind) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    );
    // Made elsewhere, and moved: before Linux 6.12, one that the host has no memory for takes away
    // what was in its place nevertheless.
    // SAFETY: it takes no other mapping's place. mmap(2) and the others are async-signal-safe.
    let zeroes = unsafe { libc::mmap(ptr::null_mut(), len, rights, kind, -1, 0) };
    if zeroes == libc::MAP_FAILED {
        return false;
    }
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the caller says that nobody relies on what is there.
    if unsafe { libc::mremap(zeroes, len, len, flags, at) } != libc::MAP_FAILED {
        return true;
    }
    // SAFETY: it was made above, and nobody knows of it.
    unsafe { libc::munmap(zeroes, len) };
    false
}

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid pointer; of a SIGBUS it has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &MAPPINGS {
        let len = slot.len.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Acquire);
        if len == 0 || !(start..start + len).contains(&address) {
            continue;
        }
        let page = slot.page.load(Ordering::Relaxed);
        // SAFETY: it is one mapping that its `Guarded` says is there, of memory that is shared
        // with another process and accessed through raw pointers only.
        if !unsafe { cover(start, len, page, address) } {
            break;
        }
        if let Some(event) = FAULTED.get() {
            let one = 1u64.to_ne_bytes();
            // SAFETY: write(2) is async-signal-safe, and reads eight bytes that are there.
            unsafe { libc::write(event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
        return;
    }
    // Not one of ours: the access is made again, and ends the process as it would have.
    // SAFETY: to restore the default action runs no handler.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, VolatileMemory};

    use super::*;

    /// The first byte of each of three pages, of which the second has faulted, of a region that is
    /// said to be so long. Without a fault: that would be one of all servers of this process.
    fn left(len: impl Fn(usize) -> usize) -> [u8; 3] {
        let page = PAGE as usize;
        let memory = MmapRegion::<()>::new(3 * page).unwrap();
        let bytes = memory.as_volatile_slice();
        bytes.write_slice(&vec![7; 3 * page], 0).unwrap();
        let start = memory.as_ptr() as usize;
        // SAFETY: nobody has a reference to it.
        assert!(unsafe { cover(start, len(start), page, start + page + 5) });
        [0, page, 2 * page].map(|at| bytes.read_obj(at).unwrap())
    }

    #[test]
    fn the_whole_region_is_replaced() {
        assert_eq!(left(|_| 3 * PAGE as usize), [0; 3]);
    }

    #[test]
    fn where_the_host_has_no_memory_for_the_whole_region_a_page_of_it_is_replaced() {
        // To the end of all addresses: no host has memory for that.
        assert_eq!(left(|start| usize::MAX - PAGE as usize - start), [7, 0, 7]);
    }
}
