//! What ends a VM, reported by vCPUs and devices to the thread that runs it.

use std::io;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Why the guest no longer runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It powered itself off.
    PowerOff,
    /// It asked for a reset.
    Reboot,
    /// Triple fault: the CPU gave up.
    Crash,
    /// Its kernel panicked.
    Panic,
    /// The host cannot go on with it, for this reason.
    Failed(String),
}

/// Where the end of a VM is reported: the first report counts.
pub(crate) struct Events {
    outcome: Mutex<Option<Outcome>>,
    eventfd: EventFd,
}

impl Events {
    /// No event yet.
    pub(crate) fn new() -> io::Result<Events> {
        let eventfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Events {
            outcome: Mutex::new(None),
            eventfd,
        })
    }

    /// Reports the end of the VM.
    pub(crate) fn end(&self, outcome: Outcome) {
        let mut first = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_some() {
            return;
        }
        *first = Some(outcome);
        if let Err(error) = self.eventfd.write(1) {
            tracing::error!("cannot report the end of the VM: {error}");
        }
    }

    /// The end of the VM, once it is reported.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Readable once the end of the VM is reported.
    pub(crate) fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_report_counts() {
        let events = Events::new().unwrap();
        assert_eq!(events.outcome(), None);
        events.end(Outcome::Panic);
        events.end(Outcome::Reboot);
        assert_eq!(events.outcome(), Some(Outcome::Panic));
        assert_eq!(events.eventfd().read().unwrap(), 1);
    }
}
