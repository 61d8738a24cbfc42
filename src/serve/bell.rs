//! An eventfd of somebody else, signalled without ever waiting for it.
//!
//! A write to an eventfd waits while its counter is full, and whoever holds the eventfd too can
//! make it so at any time, between a look and a write also. The kernel's own signals to an eventfd
//! never wait; a completion of an io_uring that has the eventfd registered is one of those.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use io_uring::{IoUring, opcode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// An eventfd that is signalled in one system call.
pub(super) struct Bell {
    event: OwnedFd,
    /// Completes nothing but requests to do nothing. `None` where the host has no io_uring.
    ring: Option<IoUring>,
}

impl Bell {
    pub(super) fn new(event: OwnedFd) -> Bell {
        let ring = registered(&event);
        if let Err(error) = &ring {
            tracing::debug!(%error, "no io_uring: eventfds are written to");
        }
        let ring = ring.ok();
        Bell { event, ring }
    }

    /// Signals the eventfd, unless its counter is full: that says enough.
    pub(super) fn ring(&mut self) {
        match &mut self.ring {
            Some(ring) => {
                // What completed earlier makes room.
                ring.completion().for_each(drop);
                let nop = opcode::Nop::new().build();
                // SAFETY: the entry points to no memory.
                let queued = unsafe { ring.submission().push(&nop) };
                if queued.is_ok() && ring.submit().is_ok() {
                    return;
                }
                // No memory for it just now, or a signal of the process: the other way still
                // works, and once too often does no harm.
                write(&self.event);
            }
            None => write(&self.event),
        }
    }
}

fn registered(event: &OwnedFd) -> io::Result<IoUring> {
    let ring = IoUring::new(1)?;
    ring.submitter().register_eventfd(event.as_raw_fd())?;
    Ok(ring)
}

/// Signals an eventfd unless that would block, as far as a look beforehand can tell.
fn write(event: impl AsFd) {
    let mut ready = [PollFd::from_borrowed_fd(event.as_fd(), PollFlags::OUT)];
    if let Ok(1) = poll(&mut ready, Some(&Timespec::default())) {
        let _ = rustix::io::write(event, &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    const FULL: u64 = u64::MAX - 1;

    /// Rings on a blocking eventfd whose counter is `before`, both ways; returns what it is then.
    fn rung(before: u64, times: usize) -> [u64; 2] {
        [true, false].map(|with_ring| {
            let theirs = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let mut bell = Bell::new(theirs.try_clone().unwrap());
            if !with_ring {
                bell.ring = None;
            }
            if before > 0 {
                rustix::io::write(&theirs, &before.to_ne_bytes()).unwrap();
            }
            (0..times).for_each(|_| bell.ring());
            let mut value = [0; 8];
            rustix::io::read(&theirs, &mut value).unwrap();
            u64::from_ne_bytes(value)
        })
    }

    #[test]
    fn each_ring_counts() {
        assert_eq!(rung(0, 1), [1, 1]);
        assert_eq!(rung(0, 1000), [1000, 1000]);
    }

    #[test]
    fn a_full_counter_is_not_waited_for() {
        for value in rung(FULL, 3) {
            assert!(value >= FULL);
        }
    }
}
