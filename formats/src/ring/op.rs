//! One operation: what it asks for, and what a result of the kernel means for it.

use std::io;
use std::os::fd::BorrowedFd;

use super::File;
use super::copies::LongCopy;
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

/// What the future of an operation asks for.
pub(super) struct Request {
    pub(super) kind: Kind,
    pub(super) file: File,
    pub(super) offset: u64,
    /// What is left to transfer.
    pub(super) segments: Option<Segments>,
    pub(super) end: End,
    done: usize,
    attempts: u32,
    /// Asks for a context that may block: the kernel answered EAGAIN, or another thread is to do
    /// the copy.
    pub(super) may_block: bool,
    /// It counts as a long copy while it is there.
    pub(super) copy: Option<LongCopy>,
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
            copy: None,
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
            // ECANCELED: the kernel could make no thread that may block. It has tried nothing.
            let again = match self.kind {
                Kind::Call(_) | Kind::Poll => false,
                Kind::Counter => matches!(errno, libc::EINTR | libc::EAGAIN),
                _ => matches!(errno, libc::EINTR | libc::EAGAIN | libc::ECANCELED),
            };
            if !again || self.attempts >= MAX_ATTEMPTS {
                return Some(Err(io::Error::from_raw_os_error(errno)));
            }
            self.may_block = errno == libc::EAGAIN || self.may_block && errno != libc::ECANCELED;
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
