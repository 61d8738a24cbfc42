//! One operation: what it asks for, and what a result of the kernel means for it.

use std::io;
use std::mem;
use std::os::fd::BorrowedFd;
use std::task::Waker;

use super::File;
use crate::Segments;

/// A call that may block, for a thread of the pool.
pub(super) type Call = Box<dyn FnOnce(BorrowedFd<'_>) -> io::Result<()> + Send>;

/// What an operation does.
pub(super) enum Kind {
    Read,
    Write,
    Sync,
    Fallocate { mode: i32, len: u64 },
    Poll,
    Counter,
    Call(Option<Call>),
}

/// When a transfer is done.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// After the first result, short or not.
    Once,
    /// When every byte is transferred.
    Whole,
    /// When every byte is transferred; bytes past the end of the file are zeroes.
    ZeroFilled,
}

/// How often an operation is tried again in a row without a byte transferred.
const MAX_ATTEMPTS: u32 = 1000;

/// What an entry of the table asks for.
pub(super) struct Request {
    pub(super) kind: Kind,
    pub(super) file: File,
    pub(super) offset: u64,
    /// What is left to transfer.
    pub(super) segments: Option<Segments>,
    pub(super) end: End,
    done: usize,
    attempts: u32,
    /// The kernel answered EAGAIN: asks for a context that may block.
    pub(super) may_block: bool,
}

impl Request {
    pub(super) fn new(kind: Kind, file: &File, offset: u64) -> Self {
        Request {
            kind,
            file: file.clone(),
            offset,
            segments: None,
            end: End::Once,
            done: 0,
            attempts: 0,
            may_block: false,
        }
    }

    pub(super) fn transfer(
        kind: Kind,
        file: &File,
        offset: u64,
        segments: Segments,
        end: End,
    ) -> Self {
        Request {
            segments: Some(segments),
            end,
            ..Request::new(kind, file, offset)
        }
    }

    /// Bytes that the next attempt asks for: at most `IOV_MAX` pieces.
    pub(super) fn iovecs(&self) -> &[libc::iovec] {
        const IOV_MAX: usize = 1024;
        let all = self.segments.as_ref().map_or(&[][..], Segments::iovecs);
        &all[..all.len().min(IOV_MAX)]
    }

    /// Bytes left to transfer.
    pub(super) fn left(&self) -> usize {
        self.segments.as_ref().map_or(0, Segments::len)
    }

    /// What a result of the kernel (a count, or a negated errno) means: the operation's result,
    /// or `None` if it is to be issued again.
    pub(super) fn complete(&mut self, result: i32) -> Option<io::Result<usize>> {
        let Ok(count) = usize::try_from(result) else {
            let errno = -result;
            self.attempts += 1;
            let again = matches!(errno, libc::EINTR | libc::EAGAIN)
                && !matches!(self.kind, Kind::Call(_) | Kind::Poll);
            if !again || self.attempts >= MAX_ATTEMPTS {
                return Some(Err(io::Error::from_raw_os_error(errno)));
            }
            self.may_block |= errno == libc::EAGAIN;
            return None;
        };
        let (Kind::Read | Kind::Write, Some(left)) = (&self.kind, &mut self.segments) else {
            return Some(Ok(count));
        };
        let count = count.min(left.len());
        self.done += count;
        if self.end == End::Once || count == left.len() {
            return Some(Ok(self.done));
        }
        if count == 0 {
            return Some(match (&self.kind, self.end) {
                (Kind::Write, _) => Err(io::ErrorKind::WriteZero.into()),
                (_, End::ZeroFilled) => {
                    left.fill(0);
                    Ok(self.done + left.len())
                }
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            });
        }
        left.advance(count);
        self.offset += count as u64;
        self.attempts = 0;
        None
    }

    /// Whether it may never complete by itself, so that it is cancelled when nobody waits.
    pub(super) fn is_wait(&self) -> bool {
        matches!(self.kind, Kind::Poll | Kind::Counter)
    }
}

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

    fn index(self) -> usize {
        self.0 as u32 as usize
    }
}

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
        // The two highest generations are kept free for the engine's own tokens.
        entry.generation = (entry.generation + 1) % (u32::MAX - 1);
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
