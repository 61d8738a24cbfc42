//! Faults of the host, made up for tests: what stands below the ring returns them.

use std::os::fd::AsRawFd;

use super::op::{Kind, Request};

/// What the ring is about to ask the kernel for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The kind of operation.
    pub what: What,
    /// First byte in the file; 0 for operations on the whole file.
    pub offset: u64,
    /// Number of bytes; 0 for operations on the whole file.
    pub len: u64,
}

/// Kinds of operations that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A read.
    Read,
    /// A write.
    Write,
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Fallocate,
    /// A blocking call of a format's own.
    Call,
}

/// How an operation is to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The kernel returns this errno and does nothing.
    Errno(i32),
    /// The kernel transfers at most that many bytes of a read or a write.
    Short(usize),
}

/// Decides about each attempt.
pub(super) type Faults = Box<dyn FnMut(&Attempt) -> Option<Fault>>;

/// What the kernel is said to have returned, if not the truth.
pub(super) fn result(faults: &mut Faults, request: &Request) -> Option<i32> {
    let (what, len) = match request.kind {
        Kind::Read => (What::Read, request.left() as u64),
        Kind::Write => (What::Write, request.left() as u64),
        Kind::Sync => (What::Sync, 0),
        Kind::Fallocate { len, .. } => (What::Fallocate, len),
        Kind::Call(_) => (What::Call, 0),
        Kind::Poll | Kind::Counter => return None,
    };
    let offset = request.offset;
    match faults(&Attempt { what, offset, len })? {
        Fault::Errno(errno) => Some(-errno),
        Fault::Short(len) => {
            let part = request.segments.as_ref()?.slice(0, len);
            let (fd, offset) = (request.file.as_raw_fd(), request.offset as i64);
            let iov = part.iovecs();
            let (pointer, count) = (iov.as_ptr(), iov.len().min(1024) as i32);
            // SAFETY: `part` keeps its pieces mapped, and lives until the call is over.
            let result = unsafe {
                match what {
                    What::Read => libc::preadv(fd, pointer, count, offset),
                    _ => libc::pwritev(fd, pointer, count, offset),
                }
            };
            Some(super::pool::negated(result))
        }
    }
}
