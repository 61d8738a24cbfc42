//! Eventfds that somebody outside of this process has too: whatever flags and counters it gives
//! them, they are never waited for.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use vmm_sys_util::eventfd::EventFd;

use super::bell::Bell;

/// The descriptor of an eventfd.
pub(crate) fn fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Whether it is signalled.
pub(crate) fn is_signalled(event: &EventFd) -> bool {
    let mut ready = [PollFd::from_borrowed_fd(fd(event), PollFlags::IN)];
    matches!(poll(&mut ready, Some(&Timespec::default())), Ok(1))
}

/// Takes its counter; whether it was signalled.
pub(crate) fn take(event: &EventFd) -> bool {
    let mut counter = [0; 8];
    let mut parts = [IoSliceMut::new(&mut counter)];
    match preadv2(fd(event), &mut parts, u64::MAX, ReadWriteFlags::NOWAIT) {
        Ok(_) => true,
        // Before Linux 5.8.
        Err(Errno::OPNOTSUPP) => is_signalled(event) && event.read().is_ok(),
        Err(_) => false,
    }
}

/// Signals it, as one who does so seldom; [`Bell`] is for one who does it often.
pub(crate) fn signal(event: &EventFd) {
    Bell::new(fd(event)).ring();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_blocks_is_not_waited_for() {
        let event = EventFd::new(0).unwrap();
        assert!(!is_signalled(&event) && !take(&event));
        event.write(u64::MAX - 1).unwrap();
        signal(&event);
        assert!(is_signalled(&event) && take(&event));
        assert!(!is_signalled(&event) && !take(&event));
        signal(&event);
        assert!(take(&event));
    }
}
