//! A front end that makes a file shorter whose memory it has shared: an access to what is gone
//! is a SIGBUS, which must end its connection and not this process.
//!
//! The handler puts zeroed memory in the place of the whole region, for good, and signals an
//! eventfd. What the device does with zeroes is its guest's affair until the connection ends.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::EventfdFlags;
use vm_memory::MmapRegion;

use super::memory::MAX_REGIONS;
use super::wrong;

/// Two front ends' worth: the regions of one may be mapped before those they replace go. And the
/// records of requests in flight: of this front end, of the one before, and what replaces it.
const SLOTS: usize = 2 * MAX_REGIONS + 8;

/// A mapping; with the length 0 it is none.
struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
}

static MAPPINGS: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
    }
}; SLOTS];

/// Signalled by the handler.
static FAULTED: OnceLock<OwnedFd> = OnceLock::new();

/// A mapping in which a SIGBUS is survived, as long as this lives.
pub(super) struct Guarded(&'static Slot);

impl Guarded {
    /// `None` if there are too many.
    pub(super) fn new(start: usize, len: usize) -> Option<Guarded> {
        let free = |slot: &&Slot| {
            let taken = slot
                .start
                .compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed);
            taken.is_ok()
        };
        let slot = MAPPINGS.iter().find(free)?;
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

/// A file's memory in which a SIGBUS is survived.
pub(super) struct Mapped {
    /// Goes before the mapping does.
    _guarded: Guarded,
    region: MmapRegion,
}

impl Mapped {
    pub(super) fn new(region: MmapRegion) -> io::Result<Mapped> {
        let guarded = Guarded::new(region.as_ptr() as usize, region.size());
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

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid pointer; of a SIGBUS it has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &MAPPINGS {
        let len = slot.len.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Acquire);
        if len == 0 || !(start..start + len).contains(&address) {
            continue;
        }
        // SAFETY: the range is one mapping that its `Guarded` says is there, of memory that is
        // shared with another process and accessed through raw pointers only.
        let replaced = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if replaced == libc::MAP_FAILED {
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
