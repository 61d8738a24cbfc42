//! I/O of one thread: an engine and an executor.

#[cfg(any(test, feature = "faults"))]
mod faults;
mod file;
mod op;
mod operation;
mod pool;
mod shortcut;
mod tasks;
mod uring;
mod wait;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use std::{io, mem};

#[cfg(any(test, feature = "faults"))]
pub use faults::{Attempt, Fault, What};
pub use file::File;
pub use operation::{Operation, Whole};

use crate::Segments;
use op::{End, Kind, Outcome, Request, Table, Token};
use pool::Pool;
use tasks::{Ready, Tasks};
use uring::Uring;
use wait::Waits;

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

enum Backend {
    Uring(Box<Uring>),
    Threads(Waits),
}

struct Inner {
    backend: RefCell<Backend>,
    pool: RefCell<Option<Pool>>,
    table: RefCell<Table>,
    tasks: Tasks,
    ready: Arc<Ready>,
    /// Results to be dispatched; those that were found without the engine among them.
    done: RefCell<Vec<(Token, i32)>>,
    /// Operations that the current task may still complete without waiting.
    budget: Cell<u32>,
    /// How many `block_on` are under way, one inside the other.
    depth: Cell<u32>,
    progress: RefCell<Option<OnProgress>>,
    #[cfg(any(test, feature = "faults"))]
    faults: RefCell<Option<faults::Faults>>,
}

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

/// Operations that one task may complete in a row before others get their turn.
const BUDGET: u32 = 32;
/// Rounds of ready tasks before the engine is asked for completions.
const ROUNDS: u32 = 4;

impl Ring {
    /// A ring for the current thread.
    pub fn new(engine: Engine) -> io::Result<Ring> {
        let backend = match engine {
            Engine::IoUring => Backend::Uring(Box::new(Uring::new()?)),
            Engine::Threads => Backend::Threads(Waits::default()),
            Engine::Auto => match Uring::new() {
                Ok(uring) => Backend::Uring(Box::new(uring)),
                Err(error) => {
                    tracing::debug!(%error, "no io_uring: threads do the I/O");
                    Backend::Threads(Waits::default())
                }
            },
        };
        let ready = Arc::new(Ready::new()?);
        Ok(Ring(Rc::new(Inner {
            backend: RefCell::new(backend),
            pool: RefCell::new(None),
            table: RefCell::default(),
            tasks: Tasks::new(Arc::clone(&ready)),
            ready,
            done: RefCell::default(),
            budget: Cell::new(BUDGET),
            depth: Cell::new(0),
            progress: RefCell::default(),
            #[cfg(any(test, feature = "faults"))]
            faults: RefCell::default(),
        })))
    }

    /// The engine in use: never [`Engine::Auto`].
    pub fn engine(&self) -> Engine {
        match &*self.0.backend.borrow() {
            Backend::Uring(_) => Engine::IoUring,
            Backend::Threads(_) => Engine::Threads,
        }
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

    /// From now on `faults` is asked before each attempt at an operation, and what it returns is
    /// what the kernel is said to have returned.
    #[cfg(any(test, feature = "faults"))]
    pub fn inject(&self, faults: impl FnMut(&Attempt) -> Option<Fault> + 'static) {
        *self.0.faults.borrow_mut() = Some(Box::new(faults));
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
                let (root_ready, any) = self.0.tasks.run(|| self.0.budget.set(BUDGET));
                if root_ready {
                    self.0.budget.set(BUDGET);
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
        let token = self.0.table.borrow_mut().insert(request);
        Operation::new(self.clone(), token)
    }

    fn poll_operation(&self, token: Token, waker: &Waker) -> Poll<io::Result<usize>> {
        self.0.poll_operation(token, waker)
    }

    fn abandon(&self, token: Token) {
        self.0.abandon(token);
    }
}

impl Inner {
    fn poll_operation(&self, token: Token, waker: &Waker) -> Poll<io::Result<usize>> {
        let mut table = self.table.borrow_mut();
        if !table.is_new(token) {
            return table.fetch(token, waker).map_or(Poll::Pending, Poll::Ready);
        }
        let first = table.request(token).and_then(|request| {
            let result = self.fault(request).or_else(|| shortcut::attempt(request))?;
            Some(request.complete(result))
        });
        let Some(Some(result)) = first else {
            table.launch(token);
            match first {
                None => self.issue(&mut table, token),
                Some(_) => self.reissue(&mut table, token),
            }
            return table.fetch(token, waker).map_or(Poll::Pending, Poll::Ready);
        };
        let request = table.finish(token, result);
        // Even a task that never has to wait leaves the others their turn.
        let result = match self.budget.get().checked_sub(1) {
            Some(left) => {
                self.budget.set(left);
                table.fetch(token, waker)
            }
            None => None,
        };
        drop(table);
        drop(request);
        match result {
            Some(result) => Poll::Ready(result),
            None => {
                waker.wake_by_ref();
                Poll::Pending
            }
        }
    }

    #[cfg(any(test, feature = "faults"))]
    fn fault(&self, request: &Request) -> Option<i32> {
        faults::result(self.faults.borrow_mut().as_mut()?, request)
    }

    #[cfg(not(any(test, feature = "faults")))]
    fn fault(&self, _: &Request) -> Option<i32> {
        None
    }

    /// Gives an operation to the engine again.
    fn reissue(&self, table: &mut Table, token: Token) {
        match table.request(token).and_then(|request| self.fault(request)) {
            Some(result) => self.done.borrow_mut().push((token, result)),
            None => self.issue(table, token),
        }
    }

    /// Gives an operation to the engine.
    fn issue(&self, table: &mut Table, token: Token) {
        let Some(request) = table.request(token) else {
            return;
        };
        match (&mut *self.backend.borrow_mut(), &request.kind) {
            (Backend::Threads(waits), Kind::Poll) => waits.push(token, request),
            (Backend::Threads(_), _) | (_, Kind::Call(_)) => self
                .pool
                .borrow_mut()
                .get_or_insert_with(|| Pool::new(Arc::clone(&self.ready)))
                .push(token, request),
            (Backend::Uring(uring), _) => uring.push(token, request),
        }
    }

    fn abandon(&self, token: Token) {
        let (request, waker, cancel) = self.table.borrow_mut().abandon(token);
        if cancel {
            match &mut *self.backend.borrow_mut() {
                Backend::Uring(uring) => uring.cancel(token),
                Backend::Threads(waits) => waits.cancel(token, &mut self.done.borrow_mut()),
            }
        }
        drop((request, waker));
    }

    /// Submits what is queued, waits for results if there is nothing else to do, and hands them
    /// to their operations.
    fn turn(&self, wait: bool) {
        let results = |pool: &Option<Pool>| pool.as_ref().is_some_and(Pool::has_results);
        let wait = wait
            && self.ready.sleep()
            && self.done.borrow().is_empty()
            && !results(&self.pool.borrow());
        let mut done = mem::take(&mut *self.done.borrow_mut());
        match &mut *self.backend.borrow_mut() {
            Backend::Uring(uring) => {
                uring.enter(&self.ready, wait);
                uring.reap(&self.ready, &mut done);
            }
            Backend::Threads(waits) => waits.enter(&self.ready, wait, &mut done),
        }
        self.ready.awake();
        if let Some(pool) = &*self.pool.borrow() {
            pool.reap(&mut done);
        }
        for (token, result) in done.drain(..) {
            self.dispatch(token, result);
        }
        let mut own = self.done.borrow_mut();
        if own.is_empty() {
            *own = done;
        }
    }

    fn dispatch(&self, token: Token, result: i32) {
        let mut table = self.table.borrow_mut();
        match table.report(token, result) {
            Outcome::Again => self.reissue(&mut table, token),
            Outcome::Done(request, waker) => {
                drop(table);
                drop(request);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        }
    }

    /// Waits until no operation is in flight whose future is gone.
    fn drain(&self) {
        while self.table.borrow().abandoned() > 0 {
            self.turn(true);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.clear();
        // Every future holds the ring, so there is none any more.
        self.drain();
    }
}

/// A `block_on` under way.
struct Scope<'a>(&'a Inner);

impl<'a> Scope<'a> {
    fn new(inner: &'a Inner) -> Self {
        inner.depth.set(inner.depth.get() + 1);
        Scope(inner)
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        let depth = self.0.depth.get() - 1;
        self.0.depth.set(depth);
        if depth == 0 {
            self.0.tasks.clear();
            self.0.drain();
        }
    }
}

#[cfg(test)]
mod tests;
