//! The operations of a ring, from the first poll of their futures to the last word of the
//! kernel.

use std::io;
use std::mem;
use std::task::Waker;

use super::op::Request;

/// Where an operation stands.
enum State {
    /// The entry is free; `next` is the next free one.
    Free { next: Option<u32> },
    /// Not issued yet.
    New,
    /// With the engine.
    Flying,
    /// With the engine, and its future is gone.
    Abandoned,
    /// Complete, its result not fetched yet.
    Done(io::Result<usize>),
}

struct Entry {
    generation: u32,
    state: State,
    request: Option<Request>,
    waker: Option<Waker>,
}

/// All operations of a ring. Entries are used again, and stay where they are in memory.
#[derive(Default)]
pub(super) struct Table {
    #[expect(
        clippy::vec_box,
        reason = "the kernel reads iovecs in there: entries never move"
    )]
    entries: Vec<Box<Entry>>,
    free: Option<u32>,
    abandoned: usize,
}

/// Names an operation to the engine, and never two: its place and how often that was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token(pub(super) u64);

impl Token {
    fn new(index: u32, generation: u32) -> Self {
        Token(u64::from(generation) << 32 | u64::from(index))
    }

    /// Names several operations that the kernel has as one.
    pub(super) fn merged(index: usize) -> Self {
        Token::new(index as u32, MERGED)
    }

    /// What it was made of by [`Token::merged`].
    pub(super) fn as_merged(self) -> Option<usize> {
        ((self.0 >> 32) as u32 == MERGED).then(|| self.index())
    }

    fn index(self) -> usize {
        self.0 as u32 as usize
    }
}

/// A generation that no entry has: that of operations made into one. The highest is kept free
/// for the engine's own.
const MERGED: u32 = u32::MAX - 1;

/// What became of an operation that the engine reported on.
pub(super) enum Outcome {
    /// To be issued again.
    Again,
    /// The request is to be dropped, outside of the table, and then the future to be woken.
    Done(Option<Request>, Option<Waker>),
}

impl Table {
    pub(super) fn insert(&mut self, request: Request) -> Token {
        let index = self.free.take().unwrap_or_else(|| {
            self.entries.push(Box::new(Entry {
                generation: 0,
                state: State::Free { next: None },
                request: None,
                waker: None,
            }));
            self.entries.len() as u32 - 1
        });
        let entry = &mut self.entries[index as usize];
        if let State::Free { next } = entry.state {
            self.free = next;
        }
        entry.state = State::New;
        entry.request = Some(request);
        Token::new(index, entry.generation)
    }

    fn free(&mut self, index: usize) -> Option<Request> {
        let entry = &mut self.entries[index];
        entry.generation = (entry.generation + 1) % MERGED;
        entry.state = State::Free { next: self.free };
        self.free = Some(index as u32);
        entry.request.take()
    }

    fn entry(&mut self, token: Token) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(token.index())?;
        (entry.generation == (token.0 >> 32) as u32).then_some(&mut **entry)
    }

    /// The request of an operation that was not fetched yet.
    pub(super) fn request(&mut self, token: Token) -> Option<&mut Request> {
        self.entry(token)?.request.as_mut()
    }

    /// Whether the operation still waits for its first poll.
    pub(super) fn is_new(&mut self, token: Token) -> bool {
        self.entry(token)
            .is_some_and(|entry| matches!(entry.state, State::New))
    }

    /// The engine has the operation now.
    pub(super) fn launch(&mut self, token: Token) {
        if let Some(entry) = self.entry(token) {
            entry.state = State::Flying;
        }
    }

    /// The operation is complete without the engine, but its result is fetched later.
    pub(super) fn finish(&mut self, token: Token, result: io::Result<usize>) -> Option<Request> {
        let entry = self.entry(token)?;
        entry.state = State::Done(result);
        entry.request.take()
    }

    /// The engine reports a result.
    pub(super) fn report(&mut self, token: Token, result: i32) -> Outcome {
        let Some(entry) = self.entry(token) else {
            return Outcome::Done(None, None);
        };
        let abandoned = matches!(entry.state, State::Abandoned);
        let finished = match &mut entry.request {
            Some(request) if !(abandoned && request.is_wait()) => request.complete(result),
            _ => Some(Ok(0)),
        };
        let Some(result) = finished else {
            return Outcome::Again;
        };
        if abandoned {
            self.abandoned -= 1;
            return Outcome::Done(self.free(token.index()), None);
        }
        entry.state = State::Done(result);
        Outcome::Done(entry.request.take(), entry.waker.take())
    }

    /// Fetches the result, or leaves `waker` to be woken when there is one.
    pub(super) fn fetch(&mut self, token: Token, waker: &Waker) -> Option<io::Result<usize>> {
        let entry = self.entry(token)?;
        if let State::Done(result) = &mut entry.state {
            let result = mem::replace(result, Ok(0));
            self.free(token.index());
            return Some(result);
        }
        match &mut entry.waker {
            Some(old) => old.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        None
    }

    /// The future of the operation is gone. Returns what may be dropped now, and whether the
    /// engine is to cancel the operation.
    pub(super) fn abandon(&mut self, token: Token) -> (Option<Request>, Option<Waker>, bool) {
        let Some(entry) = self.entry(token) else {
            return (None, None, false);
        };
        let waker = entry.waker.take();
        if matches!(entry.state, State::Flying) {
            entry.state = State::Abandoned;
            let cancel = entry.request.as_ref().is_some_and(Request::is_wait);
            self.abandoned += 1;
            return (None, waker, cancel);
        }
        (self.free(token.index()), waker, false)
    }

    /// Number of operations that the engine has and nobody waits for any more.
    pub(super) fn abandoned(&self) -> usize {
        self.abandoned
    }
}
