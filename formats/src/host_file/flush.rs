//! Making writes durable, and what becomes of a file for which the host has failed to.
//!
//! When the kernel cannot write pages of its cache it reports that once, and takes them for clean
//! from then on: what they held is lost as soon as they are evicted, and the next fdatasync(2)
//! succeeds. So one that has failed is the last word about a file: no later flush may tell the
//! guest that its data is safe.
//!
//! With O_DIRECT a flush may be tried again. What the guest writes does not lie in the cache: a
//! write that the device refuses fails by itself, and a file system that falls back to its cache
//! writes back before it answers. What is left for fdatasync(2) is the journal, which fails for
//! good if it fails, and the cache of the device, which the device keeps. Only where zeroes are to
//! be made of parts of blocks does the cache come into play there too.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::path::PathBuf;
use std::task::{Poll, Waker};

use super::{HostFile, Kind};

/// The flushes of a file: one at a time, for the error of one is not told to another that is under
/// way with it.
#[derive(Default)]
pub(super) struct Flushes {
    /// The number of the last one that has begun.
    begun: Cell<u64>,
    /// The number of the last one that succeeded.
    done: Cell<u64>,
    running: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
    /// Bytes that were changed may lie in the host's cache alone.
    cached: Cell<bool>,
    /// The errno of the flush after which nothing is known to be durable any more.
    lost: Cell<Option<i32>>,
}

impl Flushes {
    /// For a file that the host caches, or else one that it transfers directly.
    pub(super) fn new(cached: bool) -> Self {
        Flushes {
            cached: Cell::new(cached),
            ..Default::default()
        }
    }
}

/// The turn of the one flush that is under way.
struct Turn<'a> {
    flushes: &'a Flushes,
    over: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // Given up half way: an error may have been told to nobody.
        if !self.over && self.flushes.cached.get() {
            self.flushes.lost.set(Some(libc::ECANCELED));
        }
        self.flushes.running.set(false);
        self.flushes
            .waiting
            .take()
            .into_iter()
            .for_each(Waker::wake);
    }
}

/// Why no flush of a file succeeds.
#[derive(Debug)]
struct Lost {
    path: PathBuf,
    error: io::Error,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the host could not make durable what was written to `{}`: {}; what came after its \
             last good flush may be lost, and no flush of it succeeds any more: see to the host's \
             disk, and restart the VM",
            self.path.display(),
            super::text(&self.error)
        )
    }
}

impl std::error::Error for Lost {}

impl HostFile {
    /// Makes every completed write durable. Calls that come while one is under way share the next
    /// one. After an error of a file that the host caches, all further calls fail: some of what
    /// was written may be lost, and the kernel tells so only once.
    pub async fn flush(&self) -> io::Result<()> {
        let flushes = &self.flushes;
        let wanted = flushes.begun.get() + 1;
        let turn = poll_fn(|cx| {
            if flushes.lost.get().is_some() || flushes.done.get() >= wanted {
                return Poll::Ready(None);
            }
            if flushes.running.replace(true) {
                flushes.waiting.borrow_mut().push(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(Some(Turn {
                flushes,
                over: false,
            }))
        });
        if let Some(mut turn) = turn.await {
            let number = flushes.begun.get() + 1;
            flushes.begun.set(number);
            let result = self.ring.fdatasync(&self.file).await;
            turn.over = true;
            match result {
                Ok(()) => flushes.done.set(number),
                Err(error) if !flushes.cached.get() => return Err(error),
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(libc::EIO);
                    flushes.lost.set(Some(errno));
                    tracing::error!("{}", self.lost(errno));
                }
            }
        }
        match flushes.lost.get() {
            Some(errno) => Err(self.lost(errno)),
            None => Ok(()),
        }
    }

    /// A file system zeroes parts of blocks in its cache, also with O_DIRECT: those at the ends of
    /// a range that is made zeroes, or that comes to be.
    pub(super) fn note_zeroing(&self, start: u64, end: u64) {
        let block = u64::from(self.block.max(1));
        if self.kind == Kind::Regular && !(start.is_multiple_of(block) && end.is_multiple_of(block))
        {
            self.flushes.cached.set(true);
        }
    }

    fn lost(&self, errno: i32) -> io::Error {
        let error = io::Error::from_raw_os_error(errno);
        let path = self.path.clone();
        io::Error::new(error.kind(), Lost { path, error })
    }
}
