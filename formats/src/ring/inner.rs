//! The two halves of a ring at work: operations go to the engine, results come back.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Poll, Waker};
use std::{io, mem};

use super::copies::Copies;
use super::op::{Kind, Request};
use super::pool::Pool;
use super::table::{Outcome, Table, Token};
use super::tasks::{Ready, Tasks};
use super::uring::Uring;
use super::wait::Waits;
use super::{Engine, OnProgress, shortcut};

/// Operations that one task may complete in a row before others get their turn.
const BUDGET: u32 = 32;

pub(super) enum Backend {
    Uring(Box<Uring>),
    Threads(Waits),
}

/// What the clones of a ring share.
pub(super) struct Inner {
    pub(super) backend: RefCell<Backend>,
    pub(super) pool: RefCell<Option<Pool>>,
    copies: Copies,
    pub(super) table: RefCell<Table>,
    pub(super) tasks: Tasks,
    pub(super) ready: Arc<Ready>,
    /// Results to be dispatched; those that were found without the engine among them.
    pub(super) done: RefCell<Vec<(Token, i32)>>,
    /// Operations that the current task may still complete without waiting.
    budget: Cell<u32>,
    /// How many `block_on` are under way, one inside the other.
    depth: Cell<u32>,
    pub(super) progress: RefCell<Option<OnProgress>>,
    /// Whether what takes long is to end early.
    pub(super) unwanted: RefCell<Option<Arc<AtomicBool>>>,
    #[cfg(any(test, feature = "faults"))]
    pub(super) faults: RefCell<Option<super::faults::Faults>>,
    #[cfg(any(test, feature = "faults"))]
    pub(super) recorder: RefCell<Option<super::Recorder>>,
}

impl Inner {
    pub(super) fn new(engine: Engine) -> io::Result<Self> {
        let uring = || Uring::new().map(|uring| Backend::Uring(Box::new(uring)));
        let threads = || Backend::Threads(Waits::default());
        let backend = match engine {
            Engine::IoUring => uring()?,
            Engine::Threads => threads(),
            Engine::Auto => uring().unwrap_or_else(|error| {
                tracing::debug!(%error, "no io_uring: threads do the I/O");
                threads()
            }),
        };
        let ready = Arc::new(Ready::new()?);
        Ok(Inner {
            backend: RefCell::new(backend),
            pool: RefCell::new(None),
            copies: Copies::new(),
            table: RefCell::default(),
            tasks: Tasks::new(Arc::clone(&ready)),
            ready,
            done: RefCell::default(),
            budget: Cell::new(BUDGET),
            depth: Cell::new(0),
            progress: RefCell::default(),
            unwanted: RefCell::default(),
            #[cfg(any(test, feature = "faults"))]
            faults: RefCell::default(),
            #[cfg(any(test, feature = "faults"))]
            recorder: RefCell::default(),
        })
    }

    pub(super) fn engine(&self) -> Engine {
        match &*self.backend.borrow() {
            Backend::Uring(_) => Engine::IoUring,
            Backend::Threads(_) => Engine::Threads,
        }
    }

    /// A task's turn begins: it may complete some operations without waiting.
    pub(super) fn begin_turn(&self) {
        self.budget.set(BUDGET);
    }

    pub(super) fn insert(&self, request: Request) -> Token {
        self.table.borrow_mut().insert(request)
    }

    /// Begins an operation, or looks whether it is complete.
    pub(super) fn poll(&self, token: Token, waker: &Waker) -> Poll<io::Result<usize>> {
        let mut table = self.table.borrow_mut();
        if !table.is_new(token) {
            return table.fetch(token, waker).map_or(Poll::Pending, Poll::Ready);
        }
        let first = table.request(token).and_then(|request| {
            let batches = self.engine() == Engine::IoUring;
            let result = self
                .fault(request)
                .or_else(|| shortcut::attempt(request, batches))?;
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
        super::faults::result(self.faults.borrow_mut().as_mut()?, request)
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
            (Backend::Uring(uring), _) => {
                self.copies.begin(request);
                uring.push(token, request);
            }
        }
    }

    /// The future of an operation is gone.
    pub(super) fn abandon(&self, token: Token) {
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
    pub(super) fn turn(&self, wait: bool) {
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
pub(super) struct Scope<'a>(&'a Inner);

impl<'a> Scope<'a> {
    pub(super) fn new(inner: &'a Inner) -> Self {
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
