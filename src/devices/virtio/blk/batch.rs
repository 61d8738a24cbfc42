//! How requests come from the virtqueues and go back to them: some at a time, each to a task of
//! its own, and one interrupt for many.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Instant;

use super::features::SECTOR_SIZE;
use super::worker::{Gate, Serving, Worker};

/// Bytes of data after which the driver is told at once, while other requests are served: then
/// it uses that time to make more available, rather than both waiting for each other in turn.
/// It is 16 requests of 4 KiB; a request counts as a sector at least.
const TELL_AFTER: usize = 64 << 10;

/// Heads that are taken at a time from a disk whose data the page cache has: their data is still
/// in the processor's own cache when the driver is told of them, and the driver does not wait for
/// a whole queue of others. Neighbours among them are one transfer to the host.
pub(super) const AT_ONCE: usize = 8;

/// A head that was taken from a virtqueue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    /// Which of the virtqueues being served.
    pub(super) queue: usize,
    pub(super) head: u16,
    /// When it was taken.
    pub(super) taken: Instant,
}

/// A task that serves one request at a time, and then the next: no task is made per request.
#[derive(Default)]
pub(super) struct Slot {
    job: Cell<Option<Job>>,
    waker: RefCell<Option<Waker>>,
}

impl Slot {
    async fn next(&self) -> Job {
        poll_fn(|cx| match self.job.take() {
            Some(job) => Poll::Ready(job),
            None => {
                match &mut *self.waker.borrow_mut() {
                    Some(waker) => waker.clone_from(cx.waker()),
                    none => *none = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
        })
        .await
    }
}

impl Worker {
    /// Called before the thread sleeps: tells the driver of what was used, and looks for more.
    pub(super) fn idle(self: &Rc<Self>) {
        if self.asleep.get().is_some() {
            self.woken(Instant::now());
        }
        let mut serving = self.serving.borrow_mut();
        let Some(serving) = serving.as_mut() else {
            return;
        };
        let open = !serving.broken && self.gate.get() == Gate::Open;
        // What is available already comes first, as long as that is not for long.
        let first = open && self.untold.get() < TELL_AFTER && serving.has_available();
        if !first {
            self.signal(serving);
        }
        // The rings may have been found broken just now.
        if serving.broken || !open {
            return;
        }
        let more = self.linger(serving);
        let mut taken = false;
        for index in 0..serving.queues.len() {
            taken |= self.take_from(serving, index, !more);
        }
        if first && !taken {
            // The rings are broken, or not what they were a moment ago, against the rules
            // (section 2.7.6.1): nobody may come back for what was put off.
            self.signal(serving);
        }
    }

    /// Tells the driver of what was used.
    pub(super) fn signal(&self, serving: &mut Serving) {
        self.untold.set(0);
        self.measure();
        for index in 0..serving.queues.len() {
            match serving.queues[index].signal() {
                Ok(sent) => self.shared.counters.interrupts.add(u64::from(sent)),
                Err(error) => self.break_off(serving, &error),
            }
        }
    }

    /// Takes some of what is available in a virtqueue; the rest is for `idle`.
    pub(super) fn take(self: &Rc<Self>, index: usize) {
        if let Some(serving) = &mut *self.serving.borrow_mut() {
            self.take_from(serving, index, false);
        }
    }

    /// Takes some of what is available in a virtqueue; returns whether there was any. With
    /// `notify`, the driver notifies of the next if there is nothing.
    fn take_from(self: &Rc<Self>, serving: &mut Serving, index: usize, notify: bool) -> bool {
        if serving.broken || self.gate.get() != Gate::Open {
            return false;
        }
        // All that is taken in one go has waited for the same look at the clock.
        let mut now = None;
        let take = |head| {
            self.dispatch(Job {
                queue: index,
                head,
                taken: *now.get_or_insert_with(Instant::now),
            });
        };
        let queue = &mut serving.queues[index];
        let result = match notify {
            true => queue.take(self.at_once, take),
            false => queue.take_available(self.at_once, take),
        };
        if let Some(now) = now {
            self.woken(now);
        }
        if let Err(error) = result {
            self.break_off(serving, &error);
        }
        now.is_some()
    }

    /// Gives a job to a slot that has none, or to a new one.
    fn dispatch(self: &Rc<Self>, job: Job) {
        self.in_flight.set(self.in_flight.get() + 1);
        let slot = self.free.borrow_mut().pop();
        let slot = slot.unwrap_or_else(|| {
            let slot = Rc::new(Slot::default());
            self.ring.spawn(Rc::clone(self).slot(Rc::clone(&slot)));
            slot
        });
        slot.job.set(Some(job));
        if let Some(waker) = &*slot.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    async fn slot(self: Rc<Self>, slot: Rc<Slot>) {
        loop {
            let job = slot.next().await;
            let (len, bytes) = self.serve(job).await;
            self.give_back(job, len, bytes);
            self.free.borrow_mut().push(Rc::clone(&slot));
        }
    }

    /// Gives a head back whose request transferred `bytes` and wrote `len`.
    fn give_back(&self, job: Job, len: u32, bytes: usize) {
        if let Some(serving) = &mut *self.serving.borrow_mut() {
            if let Err(error) = serving.queues[job.queue].give_back(job.head, len) {
                self.break_off(serving, &error);
            }
            // Also requests without data: those of another virtqueue must not wait for ever.
            let untold = self.untold.get() + bytes.max(SECTOR_SIZE as usize);
            self.untold.set(untold);
            if untold >= TELL_AFTER {
                self.signal(serving);
            }
        }
        self.in_flight.set(self.in_flight.get() - 1);
        self.ended();
    }

    /// The rings make no sense: nothing is taken any more until the driver resets the device.
    pub(super) fn break_off(&self, serving: &mut Serving, why: &dyn fmt::Display) {
        if std::mem::replace(&mut serving.broken, true) {
            return;
        }
        if let Some(held_back) = self.shared.guest_errors.pass() {
            tracing::warn!(disk = self.name, held_back, "device needs reset: {why}");
        }
        serving.interrupt.needs_reset();
    }
}
