//! What other threads can do with a disk.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Sender, SyncSender};

use super::command::{Command, Step};
use super::{Counters, Shared};

/// Acts on a disk from any thread, whether a guest is there or not.
#[derive(Clone)]
pub struct BlkHandle {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
}

impl BlkHandle {
    pub(super) fn new(shared: Arc<Shared>, commands: Sender<Command>, wake: OwnedFd) -> BlkHandle {
        BlkHandle {
            shared,
            commands,
            wake: Arc::new(wake),
        }
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.shared.size.load(Ordering::Acquire)
    }

    /// What the disk has done so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Changes the size of the image and tells the driver: all or nothing.
    ///
    /// Waits for the requests in flight. Fails if the disk is read-only, its format has a fixed
    /// size, or `size` is not a multiple of the block size; and with the host's error.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        self.resize_reporting(size, &mut |_, _| {})
    }

    /// The same; `progress` is told how many bytes are allocated, and of how many, where that
    /// takes long.
    pub fn resize_reporting(
        &self,
        size: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        let (steps, receiver) = mpsc::channel();
        self.send(Command::Resize(size, steps))?;
        for step in receiver {
            match step {
                Step::Progress { done, of } => progress(done, of),
                Step::Done(result) => return result,
            }
        }
        Err(closed_meanwhile())
    }

    /// The disk will be closed soon: what takes long and does not matter then, a resize, ends
    /// early and undone.
    pub fn give_up(&self) {
        self.shared.closing.store(true, Ordering::Relaxed);
    }

    /// The `len` bytes at `offset`, both multiples of the block size; a guest may be there.
    ///
    /// Fails with the host's error, or `UnexpectedEof` where the disk does not go that far.
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.call(|answer| Command::Read(offset, len, answer))?
    }

    /// Makes every completed write durable.
    pub fn flush(&self) -> io::Result<()> {
        self.call(Command::Flush)?
    }

    pub(super) fn send(&self, command: Command) -> io::Result<()> {
        let closed = || io::Error::new(io::ErrorKind::NotConnected, "the disk is closed");
        self.commands.send(command).map_err(|_| closed())?;
        rustix::io::write(&self.wake, &1u64.to_ne_bytes())?;
        Ok(())
    }

    /// Has a command carried out and waits for the answer.
    pub(super) fn call<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> io::Result<T> {
        let (answer, receiver) = mpsc::sync_channel(1);
        self.send(command(answer))?;
        receiver.recv().map_err(|_| closed_meanwhile())
    }
}

fn closed_meanwhile() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the disk was closed meanwhile")
}
