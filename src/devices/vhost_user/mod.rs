//! A block device that another process serves: the front end of vhost-user (the
//! [vhost-user protocol][spec]), with a disk at the other end.
//!
//! Features and configuration space are the back end's. It is given guest memory, the virtqueues,
//! the eventfds that the driver's notifications signal, and those that interrupt the driver: a
//! request goes from the guest to the back end and back without passing through us.
//!
//! A back end that dies is waited for. The requests that it had taken are in a record, of which we
//! hold the file: the next one at the same socket does them again. The guest sees a pause.
//!
//! [spec]: https://www.qemu.org/docs/master/interop/vhost-user.html

mod channel;
mod link;
mod offer;
mod reconnect;
#[cfg(test)]
mod tests;
mod worker;

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use formats::OpenError;
use rustix::event::EventfdFlags;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::pci::lock;
use super::virtio::blk::MAX_QUEUES;
use super::virtio::{Activation, Device, Interrupt};
use offer::{Config, WRITEBACK, has};

/// Largest size of each virtqueue: that of our own disks.
const QUEUE_SIZE: u16 = 256;

/// How long a back end may take to say what it offers when a disk is opened.
const OPENING: Duration = Duration::from_secs(5);
/// How long it may take for anything else that somebody waits for. It may have to finish requests
/// first.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same when the VM ends.
const IMPATIENCE: Duration = Duration::from_secs(2);

/// What a disk is opened from.
pub struct VhostUserOptions {
    /// The back end's socket, for messages.
    pub socket: PathBuf,
    /// Connects to it.
    pub connect: Connect,
    /// Number of virtqueues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Whether the disk is to be read-only. It is the back end that sees to that.
    pub ro: bool,
}

/// Connects to a back end, without waiting long for it.
pub type Connect = Box<dyn Fn() -> io::Result<UnixStream> + Send>;

/// Is told of a size that the disk had, and the one that it has now, in bytes.
type OnResize = Box<dyn Fn(u64, u64) + Send>;

/// What other threads ask of the device's.
enum Command {
    /// Hands the virtqueues to the back end, as soon as there is one.
    Activate(Activation, SyncSender<()>),
    /// Takes them back.
    Reset(SyncSender<()>),
    /// Has the back end cache writes, or not.
    Writeback(u8, SyncSender<()>),
    /// Interrupts go other ways than before.
    Remap(SyncSender<()>),
    /// Ends the thread.
    Close(SyncSender<()>),
}

/// What the threads that deal with a disk share.
struct Shared {
    /// As the guest sees it.
    config: Mutex<Config>,
    connected: AtomicBool,
    /// The VM ends.
    ending: AtomicBool,
    /// Commands that nobody has taken yet.
    waiting: AtomicUsize,
    line: Mutex<Line>,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    on_resize: Mutex<Option<OnResize>>,
    wake: OwnedFd,
}

/// The connection, for those who may have to cut it.
#[derive(Default)]
struct Line {
    stream: Option<UnixStream>,
    /// Nobody waits for what is said there: another may be tried later.
    negotiating: bool,
}

impl Line {
    fn cut(&self) {
        if let Some(stream) = &self.stream {
            // Fails only if it is cut already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// A disk that another process serves, and the virtio device that shows it to a guest.
pub struct VhostUser {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
    /// What drivers are offered.
    offered: u64,
    queues: u16,
    /// The field `writeback` that a driver finds.
    writeback: u8,
    /// What was negotiated, once that is known.
    features: Option<u64>,
    active: bool,
}

/// Watches the disk from any thread.
#[derive(Clone)]
pub struct VhostUserHandle {
    shared: Arc<Shared>,
}

impl VhostUserHandle {
    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        lock(&self.shared.config).size()
    }

    /// From now on tells of sizes that the disk gets at its server: the one before, and the new
    /// one, in bytes. It is called on the disk's thread, and must not block.
    pub fn on_resize(&self, tell: impl Fn(u64, u64) + Send + 'static) {
        *lock(&self.shared.on_resize) = Some(Box::new(tell));
    }

    /// Whether there is a back end. Without one, the guest waits.
    pub fn is_connected(&self) -> bool {
        self.shared.connected.load(Ordering::Relaxed)
    }

    /// The VM will end soon: a back end that hangs is not waited for long.
    pub fn give_up(&self) {
        self.shared.ending.store(true, Ordering::Relaxed);
    }
}

impl VhostUser {
    /// Connects to the back end, and looks whether it is the disk that is asked for.
    ///
    /// # Errors
    ///
    /// Nobody is there, or is no such disk: about the key `vhost_user`, `ro` or `queues`.
    pub fn open(options: VhostUserOptions) -> Result<VhostUser, OpenError> {
        let (queues, shown) = (options.queues, options.socket.display().to_string());
        let failed = |what: &str, error: io::Error| OpenError {
            message: format!("no {what} for the disk at `{shown}`: {error}"),
            help: None,
            key: OpenError::HOST,
        };
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(OpenError {
                message: format!("`queues` is {queues}, expected 1 to {MAX_QUEUES}"),
                help: None,
                key: "queues",
            });
        }
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake =
            rustix::event::eventfd(0, flags).map_err(|error| failed("eventfd", error.into()))?;
        let shared = Arc::new(Shared {
            config: Mutex::new(Config([0; offer::CONFIG_LEN])),
            connected: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            line: Mutex::default(),
            interrupt: Mutex::default(),
            on_resize: Mutex::default(),
            wake,
        });
        let (commands, receiver) = mpsc::channel();
        let (opened, offer) = mpsc::sync_channel(1);
        let name = options.socket.file_name().unwrap_or_default();
        let thread = thread::Builder::new()
            .name(format!("disk {}", name.display()))
            .spawn({
                let shared = Arc::clone(&shared);
                move || worker::run(options, &shared, receiver, opened)
            })
            .map_err(|error| failed("thread", error))?;
        let offer = match offer.recv_timeout(OPENING) {
            Ok(opened) => opened,
            Err(RecvTimeoutError::Disconnected) => {
                Err(failed("thread", io::Error::other("it has panicked")))
            }
            Err(RecvTimeoutError::Timeout) => {
                // Its thread ends with the connection.
                lock(&shared.line).cut();
                let message = format!("the server at `{shown}` does not answer within {OPENING:?}");
                Err(OpenError {
                    message,
                    help: Some(
                        "another VM may have the disk: a server has one front end at a time".into(),
                    ),
                    key: "vhost_user",
                })
            }
        };
        let offer = match offer {
            Ok(offer) => offer,
            Err(error) => {
                // Its thread ends without them.
                drop(commands);
                let _ = thread.join();
                return Err(error);
            }
        };
        Ok(VhostUser {
            shared,
            commands,
            thread: Some(thread),
            offered: offer.passed(queues),
            queues,
            writeback: offer.config.0[WRITEBACK],
            features: None,
            active: false,
        })
    }

    /// Watches the disk from elsewhere.
    pub fn handle(&self) -> VhostUserHandle {
        VhostUserHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    fn send(&self, command: Command) {
        self.shared.waiting.fetch_add(1, Ordering::SeqCst);
        // Fails only if the thread is gone.
        let _ = self.commands.send(command);
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        let line = lock(&self.shared.line);
        if line.negotiating {
            line.cut();
        }
    }

    /// Has a command carried out and waits for it; whether it was. A back end that holds it up for
    /// too long is given up: the device goes on as if it had died.
    fn ask(&self, command: impl FnOnce(SyncSender<()>) -> Command) -> bool {
        /// After the first cut, the thread waits for nobody any more. It may connect to the next
        /// that hangs, and be cut again.
        const CUTS: u32 = 3;
        let (answer, answered) = mpsc::sync_channel(1);
        self.send(command(answer));
        for _ in 0..CUTS {
            let patience = match self.shared.ending.load(Ordering::Relaxed) {
                true => IMPATIENCE,
                false => PATIENCE,
            };
            match answered.recv_timeout(patience) {
                Ok(()) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => lock(&self.shared.line).cut(),
            }
        }
        tracing::error!("the thread of a disk that another process serves hangs");
        false
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.handle().give_up();
        if self.ask(Command::Close)
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

impl Device for VhostUser {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = lock(&self.shared.config).0;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let fields = config.get(start..).unwrap_or_default();
        let fields = fields.iter().copied().chain(std::iter::repeat(0));
        for (byte, field) in data.iter_mut().zip(fields) {
            *byte = field;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let configurable = self
            .features
            .is_some_and(|features| has(features, VIRTIO_BLK_F_CONFIG_WCE));
        let written = (WRITEBACK as u64)
            .checked_sub(offset)
            .and_then(|at| data.get(usize::try_from(at).ok()?));
        if let (true, Some(written)) = (configurable, written) {
            let writeback = u8::from(*written != 0);
            lock(&self.shared.config).0[WRITEBACK] = writeback;
            self.ask(|answer| Command::Writeback(writeback, answer));
        }
    }

    fn negotiated(&mut self, features: u64) {
        self.features = Some(features);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.features = Some(activation.features);
        self.active = true;
        self.ask(|answer| Command::Activate(activation, answer));
        Ok(())
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.active) {
            self.ask(Command::Reset);
        }
        self.features = None;
        lock(&self.shared.config).0[WRITEBACK] = self.writeback;
    }

    fn connect(&mut self, interrupt: Arc<dyn Interrupt>) {
        *lock(&self.shared.interrupt) = Some(interrupt);
    }

    fn remapped(&mut self) {
        if self.active {
            self.ask(Command::Remap);
        }
    }
}

impl fmt::Debug for VhostUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUser")
            .field("offered", &self.offered)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}
