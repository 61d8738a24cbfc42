//! Orders on their way to the thread that runs the VM.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::failure;
use crate::control::messages::{Failure, FailureKind};

/// What the thread that runs the VM is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Press the power button; use force when so much time has passed.
    Stop(Option<Duration>),
    /// End it by force.
    Kill,
    /// A new machine around the same disks.
    Reboot,
    /// Have the vCPUs leave the guest.
    Pause,
    /// Let them run again.
    Resume,
}

/// What it answers.
pub(crate) type Answer = Result<(), Failure>;

/// Something asked.
pub(crate) struct Asked {
    pub(crate) ask: Ask,
    /// Where the answer goes; dropped, it says that the VM is ending.
    pub(crate) answer: SyncSender<Answer>,
}

/// Where orders are given.
pub(crate) struct Orders {
    sender: Sender<Asked>,
    arrived: Arc<EventFd>,
}

/// Where they arrive.
pub(crate) struct Inbox {
    receiver: Receiver<Asked>,
    arrived: Arc<EventFd>,
}

/// Both ends.
pub(crate) fn channel() -> io::Result<(Orders, Inbox)> {
    let (sender, receiver) = mpsc::channel();
    let arrived = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    let orders = Orders {
        sender,
        arrived: Arc::clone(&arrived),
    };
    Ok((orders, Inbox { receiver, arrived }))
}

impl Orders {
    /// Gives an order and waits for its answer.
    pub(crate) fn ask(&self, ask: Ask) -> Answer {
        let ending = || failure(FailureKind::Ending, "the VM is ending");
        let (answer, answered) = mpsc::sync_channel(1);
        let asked = self.sender.send(Asked { ask, answer });
        asked.map_err(|_| ending())?;
        // A full counter is signalled already.
        let _ = self.arrived.write(1);
        answered.recv().unwrap_or_else(|_| Err(ending()))
    }
}

impl Inbox {
    /// Readable when there are orders.
    pub(crate) fn arrived(&self) -> &EventFd {
        &self.arrived
    }

    /// The next order, if there is one.
    pub(crate) fn next(&self) -> Option<Asked> {
        self.receiver.try_recv().ok()
    }
}
