//! An image without a device: what QEMU's block layer is compared with.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use formats::{Buffer, Disk, Engine, Format, Image, Ring, Segments};

use crate::Result;
use crate::qemu::PATTERN;
use crate::rows::Row;

/// What the tasks of a run share: there are as many as requests may be in flight.
struct Run<I> {
    disk: Box<dyn Disk>,
    write: bool,
    /// One buffer for all, as `qemu-img bench` has it.
    data: Segments,
    offsets: RefCell<I>,
    /// Requests that may still be made before a flush.
    left: Cell<u64>,
    tasks: Cell<usize>,
    /// Woken by the last task.
    waiting: RefCell<Option<Waker>>,
    error: RefCell<Option<io::Error>>,
}

impl<I: Iterator<Item = u64> + 'static> Run<I> {
    fn next(&self) -> Option<u64> {
        self.left.set(self.left.get().checked_sub(1)?);
        self.offsets.borrow_mut().next()
    }

    async fn task(self: Rc<Self>) {
        while let Some(offset) = self.next() {
            let data = self.data.clone();
            let result = match self.write {
                true => self.disk.write(offset, data).await,
                false => self.disk.read(offset, data).await,
            };
            if let Err(error) = result {
                self.error.replace(Some(error));
                break;
            }
        }
        self.tasks.set(self.tasks.get() - 1);
        if self.tasks.get() == 0
            && let Some(waker) = self.waiting.take()
        {
            waker.wake();
        }
    }

    /// Makes `count` requests, and waits for them.
    async fn transfer(self: &Rc<Self>, ring: &Ring, depth: usize, count: u64) -> io::Result<()> {
        self.left.set(count);
        self.tasks.set(depth);
        for _ in 0..depth {
            ring.spawn(Rc::clone(self).task());
        }
        poll_fn(|context| {
            if self.tasks.get() == 0 {
                return Poll::Ready(());
            }
            self.waiting.replace(Some(context.waker().clone()));
            Poll::Pending
        })
        .await;
        self.error.take().map_or(Ok(()), Err)
    }
}

/// Makes `count` requests of a row. The time from the first to the end of the last, with the
/// flushes between them; the one after them is not in QEMU's time either.
pub(crate) fn run(format: &Format, image: &Image, row: &Row, count: u64) -> Result<Duration> {
    let ring = Ring::new(Engine::Auto)?;
    let mut data = Buffer::zeroed(row.len, 4096)?;
    data.fill(PATTERN);
    let work = async {
        let run = Rc::new(Run {
            disk: (format.open)(&ring, image).await?,
            write: row.write,
            data: Segments::from_buffer(data),
            offsets: RefCell::new(row.offsets(count)),
            left: Cell::new(0),
            tasks: Cell::new(0),
            waiting: RefCell::new(None),
            error: RefCell::new(None),
        });
        let interval = row.flush.unwrap_or(count);
        let start = Instant::now();
        for begun in (0..count).step_by(interval as usize) {
            if begun > 0 {
                run.disk.flush().await?;
            }
            let part = interval.min(count - begun);
            run.transfer(&ring, row.depth, part).await?;
        }
        let time = start.elapsed();
        let run = Rc::into_inner(run).ok_or("a task has not come to its end")?;
        run.disk.close().await?;
        Ok(time)
    };
    ring.block_on(work, || {})
}
