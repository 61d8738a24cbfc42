//! The tasks of a ring: an executor of one thread.

use std::cell::RefCell;
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Wake, Waker};
use std::{io, mem};

use rustix::event::EventfdFlags;

/// A task.
type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Names the root future of `block_on` among the tasks.
const ROOT: u32 = u32::MAX;

/// What threads other than the ring's own reach: which tasks are ready, and a way to say so.
pub(super) struct Ready {
    tasks: Mutex<Vec<u32>>,
    /// The ring's thread waits, or is about to, and looks at nothing but its engine.
    sleeping: AtomicBool,
    notify: OwnedFd,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds one of these locks can panic half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ready {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Ready {
            tasks: Mutex::new(Vec::new()),
            sleeping: AtomicBool::new(false),
            notify: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    fn push(&self, task: u32) {
        lock(&self.tasks).push(task);
        self.notify();
    }

    /// Ends the wait of the ring's thread, if it waits. What it is to find must be in place.
    pub(super) fn notify(&self) {
        // The thread sets the flag before it looks for the last time at what was to be found
        // under its lock, so either it finds it or the flag is seen here.
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::Relaxed) {
            // Fails only if the counter is full: then the thread is notified already.
            let _ = rustix::io::write(&self.notify, &1u64.to_ne_bytes());
        }
    }

    /// Whether a task is ready.
    pub(super) fn any(&self) -> bool {
        !lock(&self.tasks).is_empty()
    }

    /// Announces that the ring's thread is about to wait; false if a task is ready.
    pub(super) fn sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::Relaxed);
        !self.any()
    }

    /// The ring's thread is back.
    pub(super) fn awake(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    /// Takes notice of a notification.
    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&self.notify, &mut [0; 8]);
    }
}

impl AsFd for Ready {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notify.as_fd()
    }
}

/// The waker of whichever task uses one place of the table. A waker of a task that is long gone
/// merely wakes its successor, which must expect that anyway.
struct Place {
    index: u32,
    queued: AtomicBool,
    ready: Arc<Ready>,
}

impl Wake for Place {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.ready.push(self.index);
        }
    }
}

struct Slot {
    /// Out while it is polled.
    task: Option<Task>,
    place: Arc<Place>,
    /// A waker of the place, shared so that polling costs no locked instruction.
    waker: Rc<Waker>,
}

/// Tasks that were ready at one time.
struct Batch<'a> {
    tasks: &'a Tasks,
    list: Vec<u32>,
    next: usize,
}

impl Batch<'_> {
    fn next(&mut self) -> Option<u32> {
        let index = self.list.get(self.next)?;
        self.next += 1;
        Some(*index)
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        // After a panic of one task the others are still ready.
        lock(&self.tasks.ready.tasks).extend(self.list.drain(..).skip(self.next));
        *self.tasks.batch.borrow_mut() = mem::take(&mut self.list);
    }
}

/// All tasks of a ring.
pub(super) struct Tasks {
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<u32>>,
    batch: RefCell<Vec<u32>>,
    root: Arc<Place>,
    root_waker: Waker,
    ready: Arc<Ready>,
}

impl Tasks {
    pub(super) fn new(ready: Arc<Ready>) -> Self {
        let root = Arc::new(Place {
            index: ROOT,
            queued: AtomicBool::new(false),
            ready: Arc::clone(&ready),
        });
        Tasks {
            slots: RefCell::default(),
            free: RefCell::default(),
            batch: RefCell::default(),
            root_waker: Arc::clone(&root).into(),
            root,
            ready,
        }
    }

    /// The waker of the root future.
    pub(super) fn root_waker(&self) -> &Waker {
        &self.root_waker
    }

    pub(super) fn spawn(&self, task: Task) {
        let mut slots = self.slots.borrow_mut();
        let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
            let place = Arc::new(Place {
                index: slots.len() as u32,
                queued: AtomicBool::new(false),
                ready: Arc::clone(&self.ready),
            });
            slots.push(Slot {
                task: None,
                waker: Rc::new(Arc::clone(&place).into()),
                place,
            });
            slots.len() as u32 - 1
        });
        let slot = &mut slots[index as usize];
        slot.task = Some(task);
        let place = Arc::clone(&slot.place);
        drop(slots);
        place.wake_by_ref();
    }

    /// Runs every task that is ready now, once. `before` is called before each. Returns whether
    /// the root future is ready, and whether any task ran.
    pub(super) fn run(&self, before: impl Fn()) -> (bool, bool) {
        let mut batch = Batch {
            tasks: self,
            list: mem::take(&mut *self.batch.borrow_mut()),
            next: 0,
        };
        mem::swap(&mut batch.list, &mut lock(&self.ready.tasks));
        let mut root = false;
        while let Some(index) = batch.next() {
            if index == ROOT {
                self.root.queued.store(false, Ordering::Release);
                root = true;
            } else {
                before();
                self.poll(index);
            }
        }
        (root, batch.next > 0)
    }

    fn poll(&self, index: u32) {
        let (mut task, waker) = {
            let mut slots = self.slots.borrow_mut();
            let Some(slot) = slots.get_mut(index as usize) else {
                return;
            };
            slot.place.queued.store(false, Ordering::Release);
            let Some(task) = slot.task.take() else {
                return;
            };
            (task, Rc::clone(&slot.waker))
        };
        let done = task.as_mut().poll(&mut Context::from_waker(&waker));
        if done.is_pending() {
            let mut slots = self.slots.borrow_mut();
            if let Some(slot) = slots.get_mut(index as usize) {
                slot.task = Some(task);
            }
        } else {
            drop(task);
            self.free.borrow_mut().push(index);
        }
    }

    /// Drops every task. One that a dropped task spawns is dropped too.
    pub(super) fn clear(&self) {
        loop {
            let slots = mem::take(&mut *self.slots.borrow_mut());
            self.free.borrow_mut().clear();
            if slots.is_empty() {
                return;
            }
        }
    }
}
