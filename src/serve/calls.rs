//! How the device tells the front end: an eventfd for each virtqueue, and a channel for messages.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Mutex;

use rustix::net::SendFlags;

use super::{lock, wrong};
use crate::devices::bell::Bell;
use crate::devices::virtio::Interrupt;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, without content: a message's header.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The descriptors of one front end. Those of a virtqueue may change while it is served.
pub(super) struct Calls {
    queues: Vec<Queue>,
    channel: Mutex<Option<OwnedFd>>,
}

#[derive(Default)]
struct Queue {
    call: Mutex<Option<Bell<OwnedFd>>>,
    error: Mutex<Option<Bell<OwnedFd>>>,
}

/// An eventfd that a front end has sent. Anything else could be read for ever, or block.
pub(super) fn eventfd(file: File) -> io::Result<OwnedFd> {
    let link = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let target = std::fs::read_link(link)?;
    match target.as_os_str().as_encoded_bytes() {
        b"anon_inode:[eventfd]" => Ok(file.into()),
        _ => Err(wrong("a file that should be an eventfd is none")),
    }
}

fn signal(bell: &Mutex<Option<Bell<OwnedFd>>>) {
    if let Some(bell) = &mut *lock(bell) {
        bell.ring();
    }
}

impl Calls {
    pub(super) fn new(queues: usize) -> Calls {
        Calls {
            queues: (0..queues).map(|_| Queue::default()).collect(),
            channel: Mutex::default(),
        }
    }

    /// What to signal for used buffers; `None` is a front end that polls. Signalled at once, for
    /// what was used before it came.
    pub(super) fn set_call(&self, index: usize, call: Option<OwnedFd>) {
        if let Some(queue) = self.queues.get(index) {
            *lock(&queue.call) = call.map(Bell::new);
            signal(&queue.call);
        }
    }

    /// What to signal if the rings are broken.
    pub(super) fn set_error(&self, index: usize, error: Option<OwnedFd>) {
        if let Some(queue) = self.queues.get(index) {
            *lock(&queue.error) = error.map(Bell::new);
        }
    }

    /// Where messages go.
    pub(super) fn set_channel(&self, channel: Option<OwnedFd>) {
        *lock(&self.channel) = channel;
    }

    /// Forgets all of it: the front end is gone.
    pub(super) fn close(&self) {
        self.set_channel(None);
        for queue in &self.queues {
            *lock(&queue.call) = None;
            *lock(&queue.error) = None;
        }
    }
}

impl Interrupt for Calls {
    fn queue(&self, index: u16) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            signal(&queue.call);
        }
    }

    fn config_changed(&self) {
        let channel = lock(&self.channel);
        let Some(channel) = &*channel else { return };
        let message = CONFIG_CHANGE.map(u32::to_ne_bytes);
        // One that is full has such messages in it already, unread.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        if let Err(error) = rustix::net::send(channel, message.as_flattened(), flags) {
            tracing::debug!("a front end is not told of its configuration: {error}");
        }
    }

    fn needs_reset(&self) {
        for queue in &self.queues {
            signal(&queue.error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::event::EventfdFlags;

    use super::*;

    fn event(flags: EventfdFlags) -> (OwnedFd, OwnedFd) {
        let event = rustix::event::eventfd(0, flags).unwrap();
        (event.try_clone().unwrap(), event)
    }

    fn value(event: &OwnedFd) -> u64 {
        let mut value = [0; 8];
        rustix::io::read(event, &mut value).unwrap();
        u64::from_ne_bytes(value)
    }

    #[test]
    fn a_call_that_is_new_is_signalled_and_then_for_each_batch() {
        let calls = Calls::new(2);
        let (ours, theirs) = event(EventfdFlags::empty());
        calls.set_call(1, Some(ours));
        assert_eq!(value(&theirs), 1);
        calls.queue(1);
        calls.queue(1);
        calls.queue(0);
        calls.queue(9);
        assert_eq!(value(&theirs), 2);
    }

    #[test]
    fn a_full_counter_does_not_block() {
        let calls = Calls::new(1);
        let (ours, theirs) = event(EventfdFlags::empty());
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        calls.set_call(0, Some(ours));
        calls.queue(0);
        assert!(value(&theirs) >= u64::MAX - 1);
    }

    #[test]
    fn a_channel_that_is_full_does_not_block() {
        let calls = Calls::new(1);
        let (ours, theirs) = UnixStream::pair().unwrap();
        calls.set_channel(Some(ours.into()));
        for _ in 0..10_000 {
            calls.config_changed();
        }
        drop(theirs);
        calls.config_changed();
    }

    #[test]
    fn only_an_eventfd_is_one() {
        let (event, _) = event(EventfdFlags::NONBLOCK);
        assert!(eventfd(File::from(event)).is_ok());
        assert!(eventfd(File::open("/dev/zero").unwrap()).is_err());
        let (pipe, _) = rustix::pipe::pipe().unwrap();
        assert!(eventfd(File::from(pipe)).is_err());
    }
}
