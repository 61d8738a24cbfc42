//! A part of a disk, as its readers see it: bytes at any offset.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::devices::virtio::blk::BlkHandle;

/// So much is read at once, and kept: a multiple of every block size. Readers of file systems ask
/// for a few bytes, and then for those behind them.
const CHUNK: u64 = 128 << 10;

/// So much of a disk is read before it is taken to lead in circles: four times what kernel and
/// initrd may have.
const MOST: u64 = 5 << 30;

/// What another thread can see of the reading.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Bytes read.
    done: AtomicU64,
    /// The disk is being waited for.
    reading: AtomicBool,
}

impl Watch {
    /// How much has been read, if the disk is not being waited for.
    pub(super) fn idle_at(&self) -> Option<u64> {
        let reading = self.reading.load(Ordering::SeqCst);
        (!reading).then(|| self.done.load(Ordering::SeqCst))
    }
}

/// A part of a disk.
#[derive(Clone)]
pub(super) struct Window {
    disk: Rc<Disk>,
    start: u64,
    len: u64,
}

struct Disk {
    handle: BlkHandle,
    watch: Arc<Watch>,
    /// The chunk that was read last, and its offset.
    chunk: RefCell<(u64, Vec<u8>)>,
}

impl Window {
    /// All of a disk.
    pub(super) fn of(handle: BlkHandle, watch: Arc<Watch>) -> Window {
        let len = handle.size();
        let chunk = RefCell::default();
        let disk = Disk {
            handle,
            watch,
            chunk,
        };
        Window {
            disk: Rc::new(disk),
            start: 0,
            len,
        }
    }

    /// Size in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// A part of this part; `None` if it does not lie in it.
    pub(super) fn part(&self, start: u64, len: u64) -> Option<Window> {
        let end = start.checked_add(len)?;
        (end <= self.len).then(|| Window {
            disk: Rc::clone(&self.disk),
            start: self.start + start,
            len,
        })
    }

    /// The `N` bytes at `offset`; zeroes behind the end.
    pub(super) fn bytes<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        let there = self.len.saturating_sub(offset).min(N as u64) as usize;
        if there > 0 {
            self.read(offset, &mut bytes[..there])?;
        }
        Ok(bytes)
    }

    /// Fills `to` with the bytes at `offset`, which all lie in this part.
    pub(super) fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let past_end = || {
            let message = format!("there is nothing at offset {offset}, behind the end");
            io::Error::new(io::ErrorKind::UnexpectedEof, message)
        };
        let end = offset.checked_add(to.len() as u64).ok_or_else(past_end)?;
        if end > self.len {
            return Err(past_end());
        }
        let mut at = self.start + offset;
        let mut to = to;
        while !to.is_empty() {
            let len = self.disk.copy(at, to)?;
            at += len as u64;
            to = &mut to[len..];
        }
        Ok(())
    }
}

impl Disk {
    /// Copies what one chunk has at `at`; returns how much that is.
    fn copy(&self, at: u64, to: &mut [u8]) -> io::Result<usize> {
        let mut chunk = self.chunk.borrow_mut();
        let start = at / CHUNK * CHUNK;
        if chunk.0 != start || chunk.1.is_empty() {
            chunk.1.clear();
            *chunk = (start, self.load(start)?);
        }
        let skip = (at - start) as usize;
        let there = chunk.1.get(skip..).filter(|there| !there.is_empty());
        // The disk has shrunk meanwhile.
        let there = there.ok_or(io::ErrorKind::UnexpectedEof)?;
        let len = there.len().min(to.len());
        to[..len].copy_from_slice(&there[..len]);
        Ok(len)
    }

    fn load(&self, start: u64) -> io::Result<Vec<u8>> {
        let len = self.handle.size().saturating_sub(start).min(CHUNK);
        if self.watch.done.load(Ordering::SeqCst) >= MOST {
            let message = format!("there is no end to it after {} GiB", MOST >> 30);
            return Err(io::Error::other(message));
        }
        self.watch.reading.store(true, Ordering::SeqCst);
        let read = self.handle.read(start, len as usize);
        self.watch.done.fetch_add(len, Ordering::SeqCst);
        self.watch.reading.store(false, Ordering::SeqCst);
        read
    }
}
