//! The thread of one disk: it opens the image, serves all virtqueues on one ring, and closes the
//! image at the end.

use std::cell::{Cell, OnceCell, RefCell};
use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, PoisonError};
use std::task::{Poll, Waker};

use formats::{Disk, File, OpenError, Ring};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::batch::{AT_ONCE, Slot};
use super::command::Command;
use super::features::{Profile, has};
use super::latency::Finished;
use super::polling::{LONGEST, Polling, Sleep};
use super::unflushed::Ledger;
use super::{BlkOptions, Shared, affinity};
use crate::devices::GuestMemory;
use crate::devices::throttle::Throttle;
use crate::devices::virtio::chain::Scratch;
use crate::devices::virtio::queue::Virtqueue;
use crate::devices::virtio::{Activation, Interrupt};
use crate::progress;

/// How the cache mode follows from the negotiated features (section 5.2.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cache {
    /// A write is durable when it completes.
    WriteThrough,
    /// A write is durable when a flush after it completes.
    WriteBack,
    /// As the field `writeback` in the configuration space says.
    Configurable,
}

/// What the driver set up: there from activation to reset.
pub(super) struct Serving {
    pub(super) queues: Vec<Virtqueue>,
    pub(super) features: u64,
    pub(super) cache: Cache,
    pub(super) interrupt: Arc<dyn Interrupt>,
    /// A virtqueue is broken: nothing is taken any more.
    pub(super) broken: bool,
    /// What the driver's notifications signal.
    kicks: Vec<File>,
}

impl Serving {
    /// Whether a virtqueue has something to take, or to find out about.
    pub(super) fn has_available(&self) -> bool {
        self.queues.iter().any(Virtqueue::has_available)
    }
}

/// Whether requests are taken from the virtqueues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Gate {
    #[default]
    Open,
    /// Not now: a resize waits for the requests in flight.
    Paused,
    /// Not any more: a reset waits for them.
    Shut,
}

/// The state of a disk's thread.
pub(super) struct Worker {
    pub(super) ring: Ring,
    /// There until the image is closed. A request in flight holds it too.
    disk: RefCell<Option<Rc<Box<dyn Disk>>>>,
    pub(super) name: String,
    pub(super) profile: Profile,
    pub(super) id: [u8; 20],
    pub(super) shared: Arc<Shared>,
    pub(super) serving: RefCell<Option<Serving>>,
    pub(super) scratch: RefCell<Scratch>,
    pub(super) host_errors: Throttle,
    pub(super) unflushed: Ledger,
    pub(super) gate: Cell<Gate>,
    /// Heads that are taken from a virtqueue at a time.
    pub(super) at_once: usize,
    /// Slots without a job.
    pub(super) free: RefCell<Vec<Rc<Slot>>>,
    /// Requests taken and not given back.
    pub(super) in_flight: Cell<usize>,
    /// Bytes transferred since the driver was last told.
    pub(super) untold: Cell<usize>,
    /// Requests given back of which the driver was not told yet.
    pub(super) finished: RefCell<Vec<Finished>>,
    /// How long to look for more before the thread sleeps.
    pub(super) polling: RefCell<Polling>,
    /// The sleep that began last, until something has come.
    pub(super) asleep: Cell<Option<Sleep>>,
    /// Tasks that wait for notifications.
    listeners: Cell<usize>,
    /// What wakes each of them when the gate is shut.
    sleepers: RefCell<Vec<Option<Waker>>>,
    /// Woken when a request or a task comes to its end.
    waiter: RefCell<Option<Waker>>,
}

/// Opens the image, reports through `opened`, and serves until it is told to close.
pub(super) fn run(
    options: &BlkOptions,
    shared: &Arc<Shared>,
    commands: Receiver<Command>,
    wake: File,
    opened: SyncSender<Result<Profile, OpenError>>,
) -> io::Result<()> {
    if let Err(error) = affinity::pin(&options.cpus) {
        let _ = opened.send(Err(error));
        return Ok(());
    }
    let ring = match Ring::new(options.engine) {
        Ok(ring) => ring,
        Err(error) => {
            let _ = opened.send(Err(OpenError {
                message: format!("no I/O engine for `{}`: {error}", options.path()),
                help: Some("see `launcher doctor`".into()),
                key: OpenError::HOST,
            }));
            return Ok(());
        }
    };
    let current: OnceCell<Rc<Worker>> = OnceCell::new();
    ring.cancel_by(Arc::clone(&shared.closing));
    ring.on_progress(progress::hook());
    let root = async {
        let worker = Worker::open(options, &ring, shared).await;
        // From here on the terminal is the guest's, or for an error.
        ring.on_progress(|_| {});
        let worker = match worker {
            Ok(worker) => Rc::clone(current.get_or_init(|| Rc::new(worker))),
            Err(error) => {
                let _ = opened.send(Err(error));
                return Ok(());
            }
        };
        // Whoever opened the disk may have given up waiting: then the next command says so.
        let _ = opened.send(Ok(worker.profile));
        drop(opened);
        let served = worker.obey(&commands, &wake).await;
        let closed = worker.close().await;
        served.and(closed)
    };
    ring.block_on(root, || {
        if let Some(worker) = current.get() {
            worker.idle();
        }
    })
}

impl Worker {
    pub(super) async fn open(
        options: &BlkOptions,
        ring: &Ring,
        shared: &Arc<Shared>,
    ) -> Result<Worker, OpenError> {
        let image = &options.image;
        let disk = match options.ephemeral {
            true => formats::open_ephemeral(options.format, ring, image).await?,
            false => (options.format.open)(ring, image).await?,
        };
        let size = disk.size();
        if !size.is_multiple_of(u64::from(image.block_size)) {
            return Err(OpenError {
                message: format!(
                    "`{}` has {size} bytes, expected a multiple of `block_size`, {}",
                    options.path(),
                    image.block_size
                ),
                help: Some("choose a smaller `block_size`, or grow the image".into()),
                key: "block_size",
            });
        }
        shared.size.store(size, Ordering::Release);
        let mut id = [0; 20];
        for (to, from) in id
            .iter_mut()
            .zip(options.id.iter().flat_map(|id| id.bytes()))
        {
            *to = from;
        }
        Ok(Worker {
            ring: ring.clone(),
            name: options.path().to_string(),
            profile: Profile {
                block_size: image.block_size,
                ro: image.ro,
                sparse: image.sparse,
                queues: options.queues,
                limits: disk.limits(),
            },
            disk: RefCell::new(Some(Rc::new(disk))),
            id,
            shared: Arc::clone(shared),
            serving: RefCell::default(),
            scratch: RefCell::default(),
            host_errors: Throttle::default(),
            unflushed: Ledger::default(),
            gate: Cell::default(),
            at_once: match image.o_direct {
                // What waits for the disk is best with all of it there.
                true => usize::MAX,
                false => AT_ONCE,
            },
            free: RefCell::default(),
            in_flight: Cell::default(),
            untold: Cell::default(),
            finished: RefCell::default(),
            polling: RefCell::new(Polling::new(options.poll.unwrap_or(LONGEST))),
            asleep: Cell::default(),
            listeners: Cell::default(),
            sleepers: RefCell::default(),
            waiter: RefCell::default(),
        })
    }

    /// The open image.
    pub(super) fn disk(&self) -> io::Result<Rc<Box<dyn Disk>>> {
        let disk = self.disk.borrow();
        disk.clone()
            .ok_or_else(|| io::Error::other("the image is closed"))
    }

    pub(super) fn activate(self: &Rc<Self>, activation: Activation) -> io::Result<()> {
        let Activation {
            memory,
            features,
            queues,
            interrupt,
        } = activation;
        if self.serving.borrow().is_some() {
            return Err(io::Error::other("the device is active already"));
        }
        // A clone shares the mappings; an `Rc` spares each request an atomic counter.
        let memory = Rc::new(GuestMemory::clone(&memory));
        let mut serving = Serving {
            queues: Vec::with_capacity(queues.len()),
            features,
            kicks: Vec::with_capacity(queues.len()),
            cache: if has(features, VIRTIO_BLK_F_CONFIG_WCE) {
                Cache::Configurable
            } else if has(features, VIRTIO_BLK_F_FLUSH) {
                Cache::WriteBack
            } else {
                Cache::WriteThrough
            },
            interrupt,
            broken: false,
        };
        for active in queues {
            let (queue, kick) = Virtqueue::new(active, &memory, features, &serving.interrupt)?;
            serving.queues.push(queue);
            serving.kicks.push(kick.into());
        }
        let record = self.shared.unflushed.lock();
        let record = record.unwrap_or_else(PoisonError::into_inner).clone();
        self.unflushed.open(record);
        *self.sleepers.borrow_mut() = vec![None; serving.kicks.len()];
        for (index, kick) in serving.kicks.iter().enumerate() {
            self.listeners.set(self.listeners.get() + 1);
            self.ring.spawn(Rc::clone(self).listen(index, kick.clone()));
        }
        *self.serving.borrow_mut() = Some(serving);
        Ok(())
    }

    /// Ends what `activate` began: waits for the requests in flight, and tells the driver of them.
    pub(super) async fn reset(&self) {
        self.gate.set(Gate::Shut);
        // Not by their eventfds, which the driver's side may hold too: it could take the signal.
        let sleepers = std::mem::take(&mut *self.sleepers.borrow_mut());
        sleepers.into_iter().flatten().for_each(Waker::wake);
        self.until(|worker| worker.in_flight.get() == 0 && worker.listeners.get() == 0)
            .await;
        // A front end goes on with the same rings, and the last of these requests has not come as
        // far as `idle`: nobody would tell the driver of it later.
        let serving = self.serving.borrow_mut().take();
        if let Some(mut serving) = serving {
            self.signal(&mut serving);
        }
        self.gate.set(Gate::Open);
    }

    pub(super) async fn close(&self) -> io::Result<()> {
        let disk = self.disk.borrow_mut().take().and_then(Rc::into_inner);
        match disk {
            Some(disk) => disk.close().await,
            None => Err(io::Error::other("the image is in use")),
        }
    }

    /// Waits until `done`, which is looked at whenever a request or a task has come to its end.
    pub(super) async fn until(&self, done: impl Fn(&Self) -> bool) {
        poll_fn(|cx| {
            if done(self) {
                return Poll::Ready(());
            }
            *self.waiter.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Takes what is available in a virtqueue whenever the driver notifies, until reset.
    async fn listen(self: Rc<Self>, queue: usize, kick: File) {
        while self.gate.get() != Gate::Shut {
            self.take(queue);
            let Some(notified) = self.notified(queue, &kick).await else {
                break;
            };
            if let Err(error) = notified {
                if let Some(serving) = &mut *self.serving.borrow_mut() {
                    self.break_off(serving, &format!("notifications cannot be read: {error}"));
                }
                break;
            }
        }
        self.listeners.set(self.listeners.get() - 1);
        self.ended();
    }

    /// Waits for a notification, or until the gate is shut: `None`.
    async fn notified(&self, queue: usize, kick: &File) -> Option<io::Result<u64>> {
        let mut read = pin!(self.ring.read_eventfd(kick));
        poll_fn(|cx| {
            if self.gate.get() == Gate::Shut {
                return Poll::Ready(None);
            }
            if let Some(sleeper) = self.sleepers.borrow_mut().get_mut(queue) {
                match sleeper {
                    Some(waker) => waker.clone_from(cx.waker()),
                    none => *none = Some(cx.waker().clone()),
                }
            }
            read.as_mut().poll(cx).map(Some)
        })
        .await
    }

    /// A request or a task has come to its end.
    pub(super) fn ended(&self) {
        if let Some(waker) = self.waiter.borrow_mut().take() {
            waker.wake();
        }
    }
}
