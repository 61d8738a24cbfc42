//! One request's way on the disk's thread: taken from a virtqueue, checked, carried out by the
//! image, its status written, given back.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::Instant;

use formats::Disk;

use super::features::SECTOR_SIZE;
use super::latency::{Finished, Measured};
use super::reply::Reply;
use super::request::{Range, Request, Rules, Status};
use super::worker::{Cache, Gate, Serving, Worker};

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
struct Job {
    /// Which of the virtqueues being served.
    queue: usize,
    head: u16,
    /// When it was taken.
    taken: Instant,
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
        for index in 0..serving.queues.len() {
            self.take_from(serving, index, !more);
        }
        if serving.broken {
            // Nobody comes back for what was put off.
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

    /// Takes what is available in a virtqueue.
    pub(super) fn take(self: &Rc<Self>, index: usize) {
        if let Some(serving) = &mut *self.serving.borrow_mut() {
            self.take_from(serving, index, false);
        }
    }

    /// Takes what is available in a virtqueue; with `notify`, the driver notifies of the next if
    /// there is nothing.
    fn take_from(self: &Rc<Self>, serving: &mut Serving, index: usize, notify: bool) {
        if serving.broken || self.gate.get() != Gate::Open {
            return;
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

    /// Serves one request; returns its used length, and the bytes of its data.
    async fn serve(&self, job: Job) -> (u32, usize) {
        let (request, reply, durable) = match self.accept(job) {
            Ok(accepted) => accepted,
            Err(len) => return (len, 0),
        };
        let (bytes, kind) = match &request {
            Request::In { to, .. } => (to.len(), Some(Measured::Read)),
            Request::Out { from, .. } => (from.len(), Some(Measured::Write)),
            Request::Flush => (0, Some(Measured::Flush)),
            _ => (0, None),
        };
        let len = match self.execute(request, durable).await {
            Ok(written) => {
                if let Some(kind) = kind {
                    let taken = job.taken;
                    self.finished.borrow_mut().push(Finished { taken, kind });
                }
                reply.write(Status::Ok, written)
            }
            Err(failure) => {
                self.failed(&failure);
                reply.write(Status::IoErr, 0)
            }
        };
        (len, bytes)
    }

    /// Reads and checks the request of a job. The third value is whether a write must be durable
    /// before it completes. Fails with the used length of a request that is answered already.
    fn accept(&self, job: Job) -> Result<(Request, Reply, bool), u32> {
        let serving = self.serving.borrow();
        let Some(serving) = serving.as_ref() else {
            return Err(0);
        };
        let chain = serving.queues[job.queue].chain(job.head, &mut self.scratch.borrow_mut());
        let mut chain = chain.map_err(|broken| {
            self.refused(broken.reason, &"a descriptor chain");
            let status = broken
                .last
                .map(|last| last.copy_from(&[Status::IoErr as u8]));
            u32::from(status.is_some())
        })?;
        let Some(reply) = Reply::split_off(&mut chain.writable) else {
            self.refused("there is no byte for the status", &"a descriptor chain");
            return Err(0);
        };
        let rules = Rules {
            profile: &self.profile,
            features: serving.features,
            capacity: self.shared.size.load(Ordering::Relaxed) / SECTOR_SIZE,
        };
        match Request::parse(chain.readable, chain.writable, &rules) {
            Ok(request) => {
                let durable = match serving.cache {
                    Cache::WriteBack => false,
                    Cache::WriteThrough => true,
                    Cache::Configurable => !self.shared.writeback.load(Ordering::Acquire),
                };
                Ok((request, reply, durable))
            }
            Err(refused) => {
                self.refused(refused.reason, &refused.header);
                Err(reply.write(refused.status, 0))
            }
        }
    }

    /// Carries out a request; returns the number of bytes written to its data.
    async fn execute(&self, request: Request, durable: bool) -> Result<usize, Failure> {
        let counters = &self.shared.counters;
        let disk = self.disk().map_err(Failure::of("open", 0, 0))?;
        match request {
            Request::In { offset, to } => {
                let len = to.len();
                if len > 0 {
                    let read = disk.read(offset, to).await;
                    read.map_err(Failure::of("read", offset, len as u64))?;
                }
                counters.reads.add(1);
                counters.read_bytes.add(len as u64);
                return Ok(len);
            }
            Request::Out { offset, from } => {
                let len = from.len() as u64;
                if len > 0 {
                    let written = disk.write(offset, from).await;
                    written.map_err(Failure::of("write", offset, len))?;
                }
                self.harden(&**disk, durable).await?;
                counters.writes.add(1);
                counters.written_bytes.add(len);
            }
            Request::Flush => {
                self.harden(&**disk, true).await?;
                counters.flushes.add(1);
            }
            Request::GetId { to } => return Ok(to.copy_from(&self.id)),
            Request::Discard(ranges) => {
                for Range { offset, len, .. } in ranges {
                    if len > 0 {
                        let discarded = disk.discard(offset, len).await;
                        discarded.map_err(Failure::of("discard", offset, len))?;
                    }
                }
                counters.discards.add(1);
            }
            Request::WriteZeroes(ranges) => {
                for Range { offset, len, unmap } in ranges {
                    if len > 0 {
                        let zeroed = disk.write_zeroes(offset, len, unmap).await;
                        zeroed.map_err(Failure::of("write zeroes", offset, len))?;
                    }
                }
                self.harden(&**disk, durable).await?;
                counters.write_zeroes.add(1);
            }
        }
        Ok(0)
    }

    /// Makes what was written durable, if it has to be.
    async fn harden(&self, disk: &dyn Disk, durable: bool) -> Result<(), Failure> {
        if !durable {
            self.unflushed.completed(disk);
            return Ok(());
        }
        let flush = || Failure::of("flush", 0, 0);
        self.unflushed.check().map_err(flush())?;
        disk.flush().await.map_err(flush())?;
        self.unflushed.flushed(disk);
        Ok(())
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

    /// Logs a request that got no further than its checks.
    fn refused(&self, reason: &str, what: &dyn fmt::Display) {
        self.shared.counters.refused.add(1);
        if let Some(held_back) = self.shared.guest_errors.pass() {
            tracing::warn!(disk = self.name, held_back, "guest error: {reason}: {what}");
        }
    }

    /// Logs a request that failed on the host.
    fn failed(&self, failure: &Failure) {
        self.shared.counters.host_errors.add(1);
        if let Some(held_back) = self.host_errors.pass() {
            let Failure {
                op,
                offset,
                len,
                error,
            } = failure;
            tracing::error!(
                disk = self.name,
                offset,
                len,
                held_back,
                "{op} failed: {error}"
            );
        }
    }
}

/// A request that failed on the host.
struct Failure {
    op: &'static str,
    offset: u64,
    len: u64,
    error: io::Error,
}

impl Failure {
    fn of(op: &'static str, offset: u64, len: u64) -> impl FnOnce(io::Error) -> Failure {
        move |error| Failure {
            op,
            offset,
            len,
            error,
        }
    }
}
