//! Files as the ring sees them.

use std::any::Any;
use std::cell::{Cell, OnceCell, RefCell};
use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;

use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};

use super::shortcut::Shortcut;
use crate::{Buffer, Segments};

/// An open file, eventfd or device that operations of a [`crate::Ring`] refer to.
///
/// An operation holds the file until it completes, so that the number of a closed file can
/// never come to mean another one.
#[derive(Clone, Debug)]
pub struct File(Rc<Opened>);

#[derive(Debug)]
pub(super) struct Opened {
    fd: OwnedFd,
    /// O_NONBLOCK is set: io_uring reports EAGAIN rather than waiting.
    pub(super) nonblocking: bool,
    /// A regular file whose bytes go through the page cache.
    pub(super) cached: bool,
    /// Whether reads are first tried without the engine.
    pub(super) reads: Cell<Shortcut>,
    /// Whether writes are first tried without the engine.
    pub(super) writes: Cell<Shortcut>,
    /// Eight bytes that an eventfd's counter is read into.
    pub(super) counter: OnceCell<Segments>,
    /// Goes with the last reference.
    keep: RefCell<Vec<Box<dyn Any>>>,
}

impl File {
    /// Drops `guard` when nothing, no operation either, refers to the file any more.
    pub fn keep(&self, guard: impl Any) {
        self.0.keep.borrow_mut().push(Box::new(guard));
    }

    pub(super) fn opened(&self) -> &Opened {
        &self.0
    }

    /// Memory for an eventfd's counter.
    pub(super) fn counter(&self) -> io::Result<&Segments> {
        if self.0.counter.get().is_none() {
            let buffer = Buffer::zeroed(8, 8)?;
            let _ = self.0.counter.set(Segments::from_buffer(buffer));
        }
        self.0
            .counter
            .get()
            .ok_or(io::ErrorKind::OutOfMemory.into())
    }

    /// Takes an eventfd's counter unless it is zero, without waiting.
    pub(super) fn try_counter(&self) -> io::Result<Option<u64>> {
        let mut value = [0; 8];
        // An offset of -1 is the file's own; eventfds have none.
        let nowait = rustix::io::preadv2(
            self,
            &mut [IoSliceMut::new(&mut value)],
            u64::MAX,
            ReadWriteFlags::NOWAIT,
        );
        let result = match nowait {
            Err(Errno::OPNOTSUPP | Errno::SPIPE) => rustix::io::read(self, &mut value),
            other => other,
        };
        match result {
            Ok(8) => Ok(Some(u64::from_ne_bytes(value))),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl From<OwnedFd> for File {
    fn from(fd: OwnedFd) -> Self {
        let flags = rustix::fs::fcntl_getfl(&fd).unwrap_or(OFlags::empty());
        let shortcut = Shortcut::of(&fd, flags);
        File(Rc::new(Opened {
            fd,
            nonblocking: flags.contains(OFlags::NONBLOCK),
            cached: shortcut != Shortcut::Never,
            reads: Cell::new(shortcut),
            writes: Cell::new(shortcut),
            counter: OnceCell::new(),
            keep: RefCell::default(),
        }))
    }
}

impl From<fs::File> for File {
    fn from(file: fs::File) -> Self {
        OwnedFd::from(file).into()
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl AsRawFd for File {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}
