//! I/O of one thread: an engine and an executor.

mod copies;
#[cfg(any(test, feature = "faults"))]
mod faults;
mod file;
mod inner;
mod linger;
mod merge;
mod op;
mod operation;
mod pool;
#[cfg(any(test, feature = "faults"))]
mod recorder;
mod shortcut;
mod table;
mod tasks;
mod uring;
mod wait;

use std::future::Future;
use std::io;
use std::mem;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

#[cfg(any(test, feature = "faults"))]
pub use faults::{Attempt, Fault, What};
pub use file::File;
pub use operation::{Operation, Whole};
#[cfg(any(test, feature = "faults"))]
pub use recorder::{Effect, FileId, Recorder, Step};

use crate::Segments;
use inner::{Inner, Scope};
use op::{End, Kind, Request};
use rustix::io::Errno;

/// How a [`Ring`] carries out its operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, and where the kernel refuses it, threads.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// A few threads that make blocking calls.
    Threads,
}

/// The I/O engine and executor of one thread. Clones share both.
///
/// The ring owns the memory of every operation until the kernel is done with it, even when the
/// operation's future is dropped early. Dropping the last clone waits for what is in flight.
#[derive(Clone)]
pub struct Ring(Rc<Inner>);

/// How far a long preparation of an image has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The file that is being allocated.
    pub path: &'a Path,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Since it began.
    pub elapsed: Duration,
}

type OnProgress = Rc<dyn Fn(&Progress<'_>)>;

/// Rounds of ready tasks before the engine is asked for completions.
const ROUNDS: u32 = 4;

impl Ring {
    /// A ring for the current thread.
    pub fn new(engine: Engine) -> io::Result<Ring> {
        Ok(Ring(Rc::new(Inner::new(engine)?)))
    }

    /// The engine in use: never [`Engine::Auto`].
    pub fn engine(&self) -> Engine {
        self.0.engine()
    }

    /// From now on `hook` is told how far long preparations of images have come.
    pub fn on_progress(&self, hook: impl Fn(&Progress<'_>) + 'static) {
        *self.0.progress.borrow_mut() = Some(Rc::new(hook));
    }

    /// Tells the hook of [`Ring::on_progress`].
    pub fn report(&self, progress: &Progress<'_>) {
        let hook = self.0.progress.borrow().clone();
        if let Some(hook) = hook {
            hook(progress);
        }
    }

    /// From now on long preparations of images end early, with the error ECANCELED and what they
    /// have done undone, once this is true.
    pub fn cancel_by(&self, unwanted: Arc<AtomicBool>) {
        *self.0.unwanted.borrow_mut() = Some(unwanted);
    }

    /// An error once nobody wants what takes long; see [`Ring::cancel_by`].
    pub(crate) fn check_wanted(&self) -> io::Result<()> {
        let unwanted = self.0.unwanted.borrow();
        match unwanted.as_ref().map(|flag| flag.load(Ordering::Relaxed)) {
            Some(true) => Err(Errno::CANCELED.into()),
            _ => Ok(()),
        }
    }

    /// From now on `faults` is asked before each attempt at an operation, and what it returns is
    /// what the kernel is said to have returned.
    #[cfg(any(test, feature = "faults"))]
    pub fn inject(&self, faults: impl FnMut(&Attempt) -> Option<Fault> + 'static) {
        *self.0.faults.borrow_mut() = Some(Box::new(faults));
    }

    /// From now on `recorder` witnesses every operation.
    #[cfg(any(test, feature = "faults"))]
    pub fn record(&self, recorder: &Recorder) {
        *self.0.recorder.borrow_mut() = Some(recorder.clone());
    }

    /// Adds a task, which [`Ring::block_on`] runs. It is dropped when the outermost `block_on`
    /// returns: what must come to its end is awaited by the root future.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.tasks.spawn(Box::pin(task));
    }

    /// Runs all tasks until `root` is done, and returns its output.
    ///
    /// Whenever no task is ready, and from time to time when some always are, `idle` is called;
    /// then everything queued is submitted and a completion is waited for, in one system call.
    ///
    /// When the outermost call returns, every task is gone and no operation whose future was
    /// dropped is in flight any more.
    pub fn block_on<F: Future>(&self, root: F, mut idle: impl FnMut()) -> F::Output {
        let scope = Scope::new(&self.0);
        let mut root = pin!(root);
        let waker = self.0.tasks.root_waker().clone();
        waker.wake_by_ref();
        loop {
            for _ in 0..ROUNDS {
                let (root_ready, any) = self.0.tasks.run(|| self.0.begin_turn());
                if root_ready {
                    self.0.begin_turn();
                    if let Poll::Ready(output) =
                        root.as_mut().poll(&mut Context::from_waker(&waker))
                    {
                        drop(scope);
                        return output;
                    }
                }
                if !any {
                    break;
                }
            }
            idle();
            self.0.turn(true);
        }
    }

    /// For the `idle` of [`Ring::block_on`]: submits everything queued and waits without sleeping
    /// until a task is ready, a completion is in, or `look` says that there is something to do.
    /// Returns after how long that was, or `None` if nothing came within `limit`.
    ///
    /// Other threads that want the processor have it first.
    pub fn linger(&self, limit: Duration, look: impl FnMut() -> bool) -> Option<Duration> {
        self.0.linger(limit, look)
    }

    /// Reads into `to` what the file has at `offset`. The result is the number of bytes: fewer
    /// than asked for at the end of the file, or when the kernel chooses so.
    pub fn read_at(&self, file: &File, offset: u64, to: Segments) -> Operation {
        self.operation(Request::transfer(Kind::Read, file, offset, to, End::Once))
    }

    /// Writes `from` at `offset`. The result is the number of bytes, maybe fewer than asked for.
    pub fn write_at(&self, file: &File, offset: u64, from: Segments) -> Operation {
        let request = Request::transfer(Kind::Write, file, offset, from, End::Once);
        self.operation(request)
    }

    /// Fills all of `to` from `offset` on. The end of the file before that is an error of kind
    /// [`io::ErrorKind::UnexpectedEof`].
    pub fn read_exact_at(&self, file: &File, offset: u64, to: Segments) -> Whole {
        let request = Request::transfer(Kind::Read, file, offset, to, End::Whole);
        Whole(self.operation(request))
    }

    /// Fills all of `to` from `offset` on; what lies past the end of the file reads as zeroes.
    pub fn read_zero_filled_at(&self, file: &File, offset: u64, to: Segments) -> Whole {
        let request = Request::transfer(Kind::Read, file, offset, to, End::ZeroFilled);
        Whole(self.operation(request))
    }

    /// Writes all of `from` at `offset`. No progress is an error of kind
    /// [`io::ErrorKind::WriteZero`].
    pub fn write_all_at(&self, file: &File, offset: u64, from: Segments) -> Whole {
        let request = Request::transfer(Kind::Write, file, offset, from, End::Whole);
        Whole(self.operation(request))
    }

    /// Makes every completed write durable: fdatasync(2).
    pub fn fdatasync(&self, file: &File) -> Whole {
        Whole(self.operation(Request::new(Kind::Sync, file, 0)))
    }

    /// fallocate(2) with the `FALLOC_FL_` bits of `mode`.
    pub fn fallocate(&self, file: &File, mode: i32, offset: u64, len: u64) -> Whole {
        let kind = Kind::Fallocate { mode, len };
        Whole(self.operation(Request::new(kind, file, offset)))
    }

    /// Carries out a call that may block on another thread. Once polled, it is carried out even
    /// if the future is dropped. An error of it that has no errno becomes EIO.
    pub fn call<F>(&self, file: &File, call: F) -> Whole
    where
        F: FnOnce(BorrowedFd<'_>) -> io::Result<()> + Send + 'static,
    {
        let kind = Kind::Call(Some(Box::new(call)));
        Whole(self.operation(Request::new(kind, file, 0)))
    }

    /// Waits until the file is readable; the result holds the `POLL` bits of poll(2).
    pub fn wait_readable(&self, file: &File) -> Operation {
        self.operation(Request::new(Kind::Poll, file, 0))
    }

    /// Waits for an eventfd's counter to leave zero, takes and resets it. Only one such call for
    /// one [`File`] may be under way. Dropped early, it may have taken the counter already.
    pub async fn read_eventfd(&self, file: &File) -> io::Result<u64> {
        if !file.opened().nonblocking && self.engine() == Engine::IoUring {
            let counter = file.counter()?;
            let mut request = Request::new(Kind::Counter, file, u64::MAX);
            request.segments = Some(counter.clone());
            self.operation(request).await?;
            let mut value = [0; 8];
            counter.copy_to(&mut value);
            return Ok(u64::from_ne_bytes(value));
        }
        loop {
            self.wait_readable(file).await?;
            if let Some(value) = file.try_counter()? {
                return Ok(value);
            }
        }
    }

    /// Lets every other ready task run first.
    pub async fn yield_now(&self) {
        let mut yielded = false;
        std::future::poll_fn(|cx| {
            if mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    fn operation(&self, request: Request) -> Operation {
        let token = self.0.insert(request);
        Operation::new(self.clone(), token)
    }
}

#[cfg(test)]
mod tests;
