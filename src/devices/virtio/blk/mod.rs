//! Block device (virtio 1.3 section 5.2): a disk image as a guest sees it.
//!
//! One disk is one thread with one [`formats::Ring`]; all virtqueues are served there.

mod affinity;
mod batch;
mod command;
mod counters;
mod features;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod handle;
mod histogram;
mod latency;
mod polling;
mod reply;
mod request;
mod serve;
#[cfg(test)]
mod tests;
mod unflushed;
mod unopened;
mod worker;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use formats::{Engine, Format, Image, OpenError};
use rustix::event::EventfdFlags;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Activation, Device, Interrupt};
use crate::devices::throttle::Throttle;
use command::Command;
use features::{CONFIG_WRITEBACK, Profile, QUEUE_SIZE, SECTOR_SIZE, has};

pub use counters::{Counter, Counters};
pub use handle::BlkHandle;
pub use histogram::{Histogram, Percentiles};
pub use unflushed::Unflushed;
pub use unopened::Unopened;

/// Most virtqueues of one disk.
pub const MAX_QUEUES: u16 = 64;

/// What a disk is opened from.
#[derive(Clone)]
pub struct BlkOptions {
    /// The image and how to open it. Its size must be a multiple of its `block_size`.
    pub image: Image,
    /// Its format.
    pub format: &'static Format,
    /// Whether the image is only read, and what the guest writes is dropped when the disk closes;
    /// see [`formats::open_ephemeral`].
    pub ephemeral: bool,
    /// What VIRTIO_BLK_T_GET_ID answers: at most 20 bytes. `None` is the empty string.
    pub id: Option<String>,
    /// Number of virtqueues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// How I/O is done.
    pub engine: Engine,
    /// How long the disk's thread looks for requests, at most, before it sleeps. How long it does
    /// follows from what has come of it. `None` is 50 us, and 0 not at all.
    pub poll: Option<Duration>,
    /// CPUs of the host that the disk's thread runs on; none is any.
    pub cpus: Vec<u16>,
}

impl BlkOptions {
    fn path(&self) -> std::path::Display<'_> {
        self.image.path.display()
    }

    fn check(&self) -> Result<(), OpenError> {
        let wrong = |key, message| {
            Err(OpenError {
                message,
                help: None,
                key,
            })
        };
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            let message = format!("`queues` is {}, expected 1 to {MAX_QUEUES}", self.queues);
            return wrong("queues", message);
        }
        let block_size = self.image.block_size;
        if !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
            let message =
                format!("`block_size` is {block_size}, expected a power of two from 512 to 65536");
            return wrong("block_size", message);
        }
        match &self.id {
            Some(id) if id.len() > VIRTIO_BLK_ID_BYTES as usize => wrong(
                "id",
                format!("`id` is `{id}`, expected at most 20 characters"),
            ),
            _ => Ok(()),
        }
    }
}

/// What the threads that deal with a disk share.
struct Shared {
    /// Size in bytes.
    size: AtomicU64,
    /// The field `writeback` of the configuration space.
    writeback: AtomicBool,
    counters: Counters,
    /// What takes long is not wanted any more.
    closing: Arc<AtomicBool>,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    /// What the next activation keeps its record of unflushed writes in.
    unflushed: Mutex<Option<Arc<dyn Unflushed>>>,
    /// Limits what a guest can have us log.
    guest_errors: Throttle,
}

impl Shared {
    fn interrupt(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the driver when the disk's thread panics: its requests will never be answered.
struct OnPanic(Arc<Shared>);

impl Drop for OnPanic {
    fn drop(&mut self) {
        if thread::panicking()
            && let Some(interrupt) = &*self.0.interrupt()
        {
            interrupt.needs_reset();
        }
    }
}

/// A disk: an open image and the virtio device that shows it to a guest.
///
/// Dropping it closes the image as [`Blk::close`] does, and logs the error if there is one.
pub struct Blk {
    profile: Profile,
    /// What was negotiated, once that is known.
    features: Option<u64>,
    handle: BlkHandle,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Blk {
    /// Opens the image, on the thread that will serve it.
    pub fn open(options: BlkOptions) -> Result<Blk, OpenError> {
        options.check()?;
        let path = options.path().to_string();
        let failed = |what: &str, error: io::Error| OpenError {
            message: format!("no {what} for `{path}`: {error}"),
            help: None,
            key: OpenError::HOST,
        };
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|error| failed("eventfd", error.into()))?;
        let wake_reader = wake.try_clone().map_err(|error| failed("eventfd", error))?;
        let shared = Arc::new(Shared {
            size: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            counters: Counters::default(),
            closing: Arc::default(),
            interrupt: Mutex::default(),
            unflushed: Mutex::default(),
            guest_errors: Throttle::default(),
        });
        let (commands, receiver) = mpsc::channel();
        let (opened, profile) = mpsc::sync_channel(1);
        let handle = BlkHandle::new(Arc::clone(&shared), commands, wake);
        let file_name = Path::file_name(&options.image.path).unwrap_or_default();
        let thread = thread::Builder::new()
            .name(format!("disk {}", file_name.display()))
            .spawn(move || {
                let on_panic = OnPanic(shared);
                worker::run(&options, &on_panic.0, receiver, wake_reader.into(), opened)
            })
            .map_err(|error| failed("thread", error))?;
        let profile = match profile.recv() {
            Ok(opened) => opened,
            Err(_) => Err(failed("thread", io::Error::other("it has panicked"))),
        };
        match profile {
            Ok(profile) => Ok(Blk {
                profile,
                features: None,
                handle,
                thread: Some(thread),
            }),
            Err(error) => {
                // The thread is at its end: let it release the file first.
                let _ = thread.join();
                Err(error)
            }
        }
    }

    /// Resizes and watches the disk from elsewhere.
    pub fn handle(&self) -> BlkHandle {
        self.handle.clone()
    }

    /// Has a record kept of unflushed writes, or none any more, from the next activation on.
    ///
    /// A flush ends what the record says, [`BlkHandle::flush`] too, which works after a reset.
    pub fn record_unflushed(&self, record: Option<Arc<dyn Unflushed>>) {
        let place = &self.handle.shared().unflushed;
        *place.lock().unwrap_or_else(PoisonError::into_inner) = record;
    }

    /// Waits for the requests in flight, flushes and closes the image, and ends its thread.
    pub fn close(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        // Fails only if the thread is gone.
        self.handle.give_up();
        let _ = self.handle.send(Command::Close);
        match thread.join() {
            Ok(result) => result,
            Err(_) => Err(io::Error::other("the disk's thread has panicked")),
        }
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!("a disk did not close cleanly: {error}");
        }
    }
}

impl Device for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.profile.features()
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.profile.queues)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let capacity = self.handle.size() / SECTOR_SIZE;
        let writeback = self.handle.shared().writeback.load(Ordering::Acquire);
        let config = self.profile.config(capacity, writeback);
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(config.len());
        let len = data.len().min(config.len() - start);
        data[..len].copy_from_slice(&config[start..start + len]);
        data[len..].fill(0);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let configurable = self
            .features
            .is_some_and(|features| has(features, VIRTIO_BLK_F_CONFIG_WCE));
        let written = CONFIG_WRITEBACK
            .checked_sub(offset)
            .and_then(|at| data.get(usize::try_from(at).ok()?));
        if let (true, Some(writeback)) = (configurable, written) {
            let writeback = *writeback != 0;
            self.handle
                .shared()
                .writeback
                .store(writeback, Ordering::Release);
        }
    }

    fn negotiated(&mut self, features: u64) {
        self.features = Some(features);
        // Section 5.2.5.2: the cache of a driver that cannot flush is write-through.
        let writeback = has(features, VIRTIO_BLK_F_FLUSH);
        self.handle
            .shared()
            .writeback
            .store(writeback, Ordering::Release);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        if self.features != Some(activation.features) {
            self.negotiated(activation.features);
        }
        self.handle
            .call(|answer| Command::Activate(activation, answer))?
    }

    fn reset(&mut self) {
        if let Err(error) = self.handle.call(Command::Reset)
            && let Some(held_back) = self.handle.shared().guest_errors.pass()
        {
            tracing::error!(held_back, "a disk cannot be reset: {error}");
        }
        self.features = None;
        self.handle
            .shared()
            .writeback
            .store(true, Ordering::Release);
    }

    fn connect(&mut self, interrupt: Arc<dyn Interrupt>) {
        *self.handle.shared().interrupt() = Some(interrupt);
    }
}

impl fmt::Debug for Blk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blk")
            .field("profile", &self.profile)
            .finish()
    }
}
