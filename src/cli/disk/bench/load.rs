//! Requests to a disk, as many at once as are wanted, for a time.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use formats::{Buffer, Disk, Ring, Segments};
use rustix::time::{ClockId, clock_gettime};

use crate::devices::virtio::blk::{Histogram, Percentiles};

/// A disk that requests are made to.
pub(super) struct Load<'a> {
    ring: &'a Ring,
    disk: Rc<Box<dyn Disk>>,
    window: Duration,
}

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub(super) requests: u64,
    pub(super) time: Duration,
    /// Processor time of all threads of this process.
    pub(super) processor: Duration,
    pub(super) latency: Percentiles,
}

/// What the tasks share: there is one for each request that may be in flight.
struct Run<I> {
    disk: Rc<Box<dyn Disk>>,
    write: bool,
    offsets: RefCell<I>,
    warm_up: Duration,
    window: Duration,
    begun: Instant,
    /// Since when requests are counted, and the processor time until then.
    since: Cell<Option<(Instant, Duration)>>,
    requests: Cell<u64>,
    latency: Histogram,
    /// Set when it is over.
    ended: Cell<Option<(Duration, Duration)>>,
    tasks: Cell<usize>,
    /// Woken by the last task.
    waiting: RefCell<Option<Waker>>,
    error: RefCell<Option<io::Error>>,
}

impl<'a> Load<'a> {
    /// A row takes about the window, after a quarter of it.
    pub(super) fn new(ring: &'a Ring, disk: Box<dyn Disk>, window: Duration) -> Load<'a> {
        Load {
            ring,
            disk: Rc::new(disk),
            window,
        }
    }

    pub(super) async fn read(
        &mut self,
        len: u64,
        depth: usize,
        offsets: impl Iterator<Item = u64> + 'static,
    ) -> io::Result<Measured> {
        self.measure(false, self.window / 4, len, depth, offsets)
            .await
    }

    pub(super) async fn write(
        &mut self,
        len: u64,
        depth: usize,
        offsets: impl Iterator<Item = u64> + 'static,
    ) -> io::Result<Measured> {
        self.measure(true, self.window / 4, len, depth, offsets)
            .await
    }

    /// Writes that can be made once: there is nothing to warm up with, and the time may end before
    /// the offsets do, or after them.
    pub(super) async fn write_new(
        &mut self,
        len: u64,
        depth: usize,
        offsets: impl Iterator<Item = u64> + 'static,
    ) -> io::Result<Measured> {
        self.measure(true, Duration::ZERO, len, depth, offsets)
            .await
    }

    async fn measure(
        &mut self,
        write: bool,
        warm_up: Duration,
        len: u64,
        depth: usize,
        offsets: impl Iterator<Item = u64> + 'static,
    ) -> io::Result<Measured> {
        let begun = Instant::now();
        let run = Rc::new(Run {
            disk: Rc::clone(&self.disk),
            write,
            offsets: RefCell::new(offsets),
            warm_up,
            window: self.window,
            begun,
            since: Cell::new(warm_up.is_zero().then(|| (begun, processor()))),
            requests: Cell::new(0),
            latency: Histogram::default(),
            ended: Cell::new(None),
            tasks: Cell::new(depth),
            waiting: RefCell::new(None),
            error: RefCell::new(None),
        });
        for number in 0..depth {
            let align = self.disk.limits().memory_alignment.max(4096);
            let mut data = Buffer::zeroed(len as usize, align as usize)?;
            if write {
                // No zeroes: they might be stored as none.
                data.fill(number as u8 | 1);
            }
            let task = Rc::clone(&run).task(self.ring.clone(), Segments::from_buffer(data));
            self.ring.spawn(task);
        }
        poll_fn(|context| {
            if run.tasks.get() == 0 {
                return Poll::Ready(());
            }
            run.waiting.replace(Some(context.waker().clone()));
            Poll::Pending
        })
        .await;
        run.end();
        if let Some(error) = run.error.take() {
            return Err(error);
        }
        let (time, processor) = run.ended.get().unwrap_or_default();
        Ok(Measured {
            requests: run.requests.get(),
            time,
            processor,
            latency: run.latency.percentiles(),
        })
    }

    /// Closes the disk.
    pub(super) async fn close(self) -> io::Result<()> {
        match Rc::into_inner(self.disk) {
            Some(disk) => disk.close().await,
            None => Err(io::Error::other("a request has not come to its end")),
        }
    }
}

impl<I: Iterator<Item = u64>> Run<I> {
    async fn task(self: Rc<Self>, ring: Ring, data: Segments) {
        while self.ended.get().is_none()
            && let Some(offset) = self.next()
        {
            let begun = Instant::now();
            let result = match self.write {
                true => self.disk.write(offset, data.clone()).await,
                false => self.disk.read(offset, data.clone()).await,
            };
            if let Err(error) = result {
                self.error.replace(Some(error));
                self.end();
                break;
            }
            self.done(begun);
            // What ends at once must not keep the others from beginning.
            ring.yield_now().await;
        }
        self.tasks.set(self.tasks.get() - 1);
        if self.tasks.get() == 0
            && let Some(waker) = self.waiting.take()
        {
            waker.wake();
        }
    }

    fn next(&self) -> Option<u64> {
        self.offsets.borrow_mut().next()
    }

    fn done(&self, begun: Instant) {
        let now = Instant::now();
        match self.since.get() {
            None if now - self.begun >= self.warm_up => {
                self.since.set(Some((now, processor())));
            }
            Some((since, _)) if self.ended.get().is_none() => {
                self.requests.set(self.requests.get() + 1);
                self.latency.record(now - begun);
                if now - since >= self.window {
                    self.end();
                }
            }
            _ => {}
        }
    }

    fn end(&self) {
        if let (None, Some((since, used))) = (self.ended.get(), self.since.get()) {
            let processor = processor().saturating_sub(used);
            self.ended.set(Some((since.elapsed(), processor)));
        }
    }
}

fn processor() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
