//! Whether a server has completed writes in its memory, told in memory that the front end keeps:
//! behind the requests in flight, where the back end may put what it likes.
//!
//! | offset | |
//! |---|---|
//! | 0 | "unflush" and a version, 1: u64, little-endian |
//! | 8 | the server that has such writes, 0 if none has: u64 |
//! | 16 | the field `writeback` as a driver has written it, and 1; 0 if none has: u64 |
//!
//! A server has a number that no other has. One that finds another's here comes after one that was
//! killed: a server that ends as it should flushes, and leaves 0.
//!
//! A driver that has its writes written through does not flush. A front end need not tell the next
//! server of that, and QEMU does not.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, VolatileMemory};

use super::faults::Mapped;
use crate::devices::virtio::blk::Unflushed;

/// Bytes of it.
pub(super) const LEN: usize = 64;

const MAGIC: u64 = u64::from_le_bytes(*b"unflush\x01");
const AT_HOLDER: usize = 8;
const AT_WRITEBACK: usize = 16;

/// The number of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holder(u64);

impl Holder {
    /// A number that nobody else has.
    pub(super) fn new() -> io::Result<Holder> {
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        Ok(Holder(u64::from_ne_bytes(bytes).max(1)))
    }
}

/// Marks new memory as such a record: nobody has anything.
pub(super) fn mark(file: &File, offset: usize) -> io::Result<()> {
    file.write_all_at(&MAGIC.to_le_bytes(), offset as u64)
}

/// The record, as one server sees it.
pub(super) struct Held {
    region: Arc<Mapped>,
    base: usize,
    ours: u64,
}

impl Held {
    /// `None` where there is no such record: the memory is another program's.
    pub(super) fn find(region: &Arc<Mapped>, base: usize, ours: Holder) -> Option<Held> {
        let magic: u64 = region
            .as_volatile_slice()
            .load(base, Ordering::Acquire)
            .ok()?;
        (u64::from_le(magic) == MAGIC && base + LEN <= region.len()).then(|| Held {
            region: Arc::clone(region),
            base,
            ours: ours.0,
        })
    }

    fn load(&self, at: usize) -> u64 {
        let memory = self.region.as_volatile_slice();
        let loaded = memory.load(self.base + at, Ordering::Acquire);
        u64::from_le(loaded.unwrap_or_default())
    }

    fn store(&self, at: usize, value: u64) {
        let memory = self.region.as_volatile_slice();
        // It is inside: `find` has looked.
        let _ = memory.store(value.to_le(), self.base + at, Ordering::Release);
    }

    fn holder(&self) -> u64 {
        self.load(AT_HOLDER)
    }

    /// The field `writeback`, 0 or 1, if a driver has written it.
    pub(super) fn writeback(&self) -> Option<u8> {
        match self.load(AT_WRITEBACK) {
            1 => Some(0),
            2 => Some(1),
            _ => None,
        }
    }

    /// A driver has written the field `writeback`.
    pub(super) fn keep_writeback(&self, writeback: u8) {
        self.store(AT_WRITEBACK, 1 + u64::from(writeback));
    }

    /// Whether it is this server that has such writes.
    pub(super) fn is_ours(&self) -> bool {
        self.holder() == self.ours
    }
}

impl Unflushed for Held {
    fn is_lost(&self) -> bool {
        let holder = self.holder();
        holder != 0 && holder != self.ours
    }

    fn is_held(&self) -> bool {
        self.is_ours()
    }

    fn hold(&self) {
        self.store(AT_HOLDER, self.ours);
    }

    fn release(&self) {
        self.store(AT_HOLDER, 0);
    }
}
