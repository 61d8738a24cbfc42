//! Sleeping until there is something to do.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

use super::Session;
use crate::vm::machine::Machine;
use crate::{Error, Result};

/// What woke the thread up.
#[derive(Default)]
pub(super) struct Ready {
    pub(super) signals: bool,
    pub(super) orders: bool,
    /// The guest may take input.
    pub(super) room: bool,
    /// There is input at attachments.
    pub(super) typed: bool,
    /// There is input at standard input.
    pub(super) keys: bool,
}

impl Session {
    /// Sleeps until there is something to do.
    pub(super) fn wait(&mut self, machine: &Machine) -> Result<Ready> {
        let may_read = !self.keyboard.has_ended() && self.keyboard.may_read();
        let stdin = rustix::stdio::stdin();
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = vec![
            readable(as_fd(machine.events().eventfd())),
            readable(self.signals.as_fd()),
            readable(as_fd(self.inbox.arrived())),
        ];
        let mut timeout = self
            .stopping
            .as_ref()
            .map(|stopping| stopping.deadline.saturating_duration_since(Instant::now()));
        let mut wake_in = |after: Duration| timeout = Some(timeout.map_or(after, |t| t.min(after)));
        let (mut room, mut typed, mut keys) = (None, None, None);
        if let (Some(serial), Some(console)) = (machine.serial(), &self.console) {
            room = Some(fds.len());
            fds.push(readable(as_fd(serial.room())));
            typed = Some(fds.len());
            fds.push(readable(as_fd(console.input().arrived())));
            if may_read && self.keyboard.has_room() {
                keys = Some(fds.len());
                fds.push(readable(stdin));
            }
            // A port in loopback mode takes no input for a while, and does not tell of its end.
            let waiting = !self.keyboard.is_empty() || !console.input().is_empty();
            if waiting && serial.capacity() > 0 {
                wake_in(Duration::from_millis(20));
            }
        }
        if !self.keyboard.has_ended() && !may_read {
            // A shell that moves us to the foreground does not tell either.
            wake_in(Duration::from_secs(1));
        }
        match poll(&mut fds, timeout.map(timespec).as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(Error::failed(format!("cannot wait for the VM: {error}"))),
        }
        let ready = |index: usize| !fds[index].revents().is_empty();
        Ok(Ready {
            signals: ready(1),
            orders: ready(2),
            room: room.is_some_and(ready),
            typed: typed.is_some_and(ready),
            keys: keys.is_some_and(ready),
        })
    }
}

fn as_fd(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `eventfd` is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs() as _,
        tv_nsec: duration.subsec_nanos().into(),
    }
}
