//! What was typed at attachments and the guest has not taken yet.

use std::collections::VecDeque;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

/// Input that waits for the guest at most, in bytes.
const LIMIT: usize = 64 << 10;
/// How long one that types waits for room before it looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(500);

/// A queue of bytes for the guest.
pub(crate) struct Input {
    waiting: Mutex<Waiting>,
    /// Signalled when there is room again.
    room: Condvar,
    arrived: EventFd,
}

#[derive(Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    closed: bool,
}

impl Input {
    pub(super) fn new() -> io::Result<Input> {
        Ok(Input {
            waiting: Mutex::default(),
            room: Condvar::new(),
            arrived: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Readable when input has arrived.
    pub(crate) fn arrived(&self) -> &EventFd {
        &self.arrived
    }

    /// Whether there is any.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().bytes.is_empty()
    }

    /// Offers what there is to the guest, which says how much of it it takes.
    pub(crate) fn feed(&self, guest: impl FnOnce(&[u8]) -> usize) {
        let mut waiting = self.lock();
        let offered = waiting.bytes.as_slices().0;
        if offered.is_empty() {
            return;
        }
        let taken = guest(offered);
        waiting.bytes.drain(..taken);
        self.room.notify_all();
    }

    /// Adds input, as soon as there is room for it. False if there will be none, or it is not
    /// `wanted` any more.
    pub(super) fn push(&self, mut bytes: &[u8], wanted: impl Fn() -> bool) -> bool {
        let mut waiting = self.lock();
        while !bytes.is_empty() {
            if waiting.closed {
                return false;
            }
            let (now, later) = bytes.split_at(bytes.len().min(LIMIT - waiting.bytes.len()));
            if now.is_empty() {
                waiting = match self.room.wait_timeout(waiting, LOOK) {
                    Ok((waiting, _)) => waiting,
                    Err(poisoned) => poisoned.into_inner().0,
                };
                if !wanted() {
                    return false;
                }
                continue;
            }
            waiting.bytes.extend(now);
            // A full counter is signalled already.
            let _ = self.arrived.write(1);
            bytes = later;
        }
        true
    }

    /// From now on nothing is taken.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.room.notify_all();
    }

    /// Every change of the state is complete in itself, so a poisoned lock is taken all the same.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_waits_for_the_guest_and_is_bounded() {
        let input = Input::new().unwrap();
        assert!(input.push(&[b'x'; LIMIT], || true));
        assert!(!input.push(b"y", || false), "there is no room");
        assert!(input.arrived().read().is_ok());
        input.feed(|bytes| bytes.len().min(10));
        assert!(input.push(b"y", || true));
        let mut all = Vec::new();
        while !input.is_empty() {
            input.feed(|bytes| {
                all.extend_from_slice(bytes);
                bytes.len()
            });
        }
        assert_eq!(all.len(), LIMIT - 10 + 1);
        assert_eq!(all.last(), Some(&b'y'));
        input.close();
        assert!(!input.push(b"z", || true));
    }
}
