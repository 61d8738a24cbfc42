//! What other threads have a disk's thread do.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, SyncSender};
use std::time::{Duration, Instant};

use formats::{Buffer, File, Segments};

use super::worker::{Gate, Worker};
use crate::devices::virtio::Activation;

/// What other threads ask of a disk's thread. It answers when it is done; an answer that never
/// comes, because the thread is gone, is an error at the other end.
pub(super) enum Command {
    /// Serves the virtqueues.
    Activate(Activation, SyncSender<io::Result<()>>),
    /// Stops serving, once no request is in flight.
    Reset(SyncSender<()>),
    /// Changes the size of the image, in bytes.
    Resize(u64, Sender<Step>),
    /// Reads so many bytes at an offset.
    Read(u64, usize, SyncSender<io::Result<Vec<u8>>>),
    /// Makes what was written durable.
    Flush(SyncSender<io::Result<()>>),
    /// Stops serving, closes the image and ends the thread.
    Close,
}

/// How far a resize is.
pub(super) enum Step {
    /// Bytes that are allocated, of all.
    Progress { done: u64, of: u64 },
    /// It is over.
    Done(io::Result<()>),
}

/// Passes on how far a resize is, ten times a second at most.
fn reporter(steps: Sender<Step>) -> impl Fn(&formats::Progress<'_>) {
    const PAUSE: Duration = Duration::from_millis(100);
    let last = Cell::new(None::<Instant>);
    move |progress| {
        let now = Instant::now();
        if last.get().is_some_and(|last| now - last < PAUSE) {
            return;
        }
        last.set(Some(now));
        let (done, of) = (progress.done, progress.total);
        let _ = steps.send(Step::Progress { done, of });
    }
}

impl Worker {
    /// Carries out commands until there are none to come.
    pub(super) async fn obey(
        self: &Rc<Self>,
        commands: &Receiver<Command>,
        wake: &File,
    ) -> io::Result<()> {
        let result = loop {
            if let Err(error) = self.ring.read_eventfd(wake).await {
                break Err(error);
            }
            let mut close = false;
            for command in commands.try_iter() {
                match command {
                    Command::Activate(activation, answer) => {
                        let _ = answer.send(self.activate(activation));
                    }
                    Command::Reset(answer) => {
                        self.reset().await;
                        let _ = answer.send(());
                    }
                    Command::Resize(size, steps) => {
                        self.ring.on_progress(reporter(steps.clone()));
                        let result = self.resize(size).await;
                        self.ring.on_progress(|_| {});
                        let _ = steps.send(Step::Done(result));
                    }
                    Command::Read(offset, len, answer) => {
                        let _ = answer.send(self.read(offset, len).await);
                    }
                    Command::Flush(answer) => {
                        let _ = answer.send(self.flush().await);
                    }
                    Command::Close => close = true,
                }
            }
            if close {
                break Ok(());
            }
        };
        self.reset().await;
        result
    }

    pub(super) async fn resize(&self, size: u64) -> io::Result<()> {
        let refused = |message: String| Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        let block_size = self.profile.block_size;
        if self.profile.ro {
            return refused(format!(
                "`{}` is read-only, it cannot be resized",
                self.name
            ));
        }
        if !self.profile.limits.resize {
            return refused(format!("the format of `{}` cannot be resized", self.name));
        }
        if !size.is_multiple_of(u64::from(block_size)) {
            return refused(format!(
                "the size {size} is no multiple of `block_size`, {block_size}"
            ));
        }
        let disk = self.disk()?;
        // No request that was checked against the old size may meet the new one.
        self.gate.set(Gate::Paused);
        self.until(|worker| worker.in_flight.get() == 0).await;
        let result = disk.resize(size).await;
        let old = self.shared.size.swap(disk.size(), Ordering::AcqRel);
        self.gate.set(Gate::Open);
        let interrupt = self.shared.interrupt().clone();
        if let Some(interrupt) = interrupt.filter(|_| old != disk.size()) {
            interrupt.config_changed();
        }
        result
    }

    async fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let disk = self.disk()?;
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > disk.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let align = disk.limits().memory_alignment.max(1) as usize;
        let to = Segments::from_buffer(Buffer::zeroed(len, align)?);
        disk.read(offset, to.clone()).await?;
        let mut bytes = vec![0; len];
        to.copy_to(&mut bytes);
        Ok(bytes)
    }

    async fn flush(&self) -> io::Result<()> {
        match self.profile.ro {
            true => Ok(()),
            false => {
                let disk = self.disk()?;
                disk.flush().await?;
                self.unflushed.flushed(&**disk);
                Ok(())
            }
        }
    }
}
