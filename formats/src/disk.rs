//! The trait that every open disk image implements.

use std::future::Future;
use std::io;
use std::pin::Pin;

use crate::Segments;

/// A disk operation under way. It owns or borrows all it needs; dropping it early leaks nothing
/// and frees no memory that the kernel still writes to.
pub type Pending<'a, T = ()> = Pin<Box<dyn Future<Output = io::Result<T>> + 'a>>;

/// Consecutive bytes of a disk that are all data, or all known to be zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Whether there is data that must be read to be known; else every byte is 0.
    pub data: bool,
    /// How many bytes.
    pub len: u64,
}

/// What an open image can do and how it wants to be asked. All values are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `offset` and `len` of every operation are multiples of this (at least 1).
    pub alignment: u32,
    /// The address in memory of every segment is best a multiple of this; others are bounced.
    pub memory_alignment: u32,
    /// The size of I/O that the image handles best (a cluster, a host block).
    pub optimal_io: u32,
    /// Smallest aligned unit that [`Disk::discard`] frees on the host; 0 if it has no discard.
    pub discard_granularity: u32,
    /// Whether [`Disk::write_zeroes`] is cheaper than a write of zeroes.
    pub write_zeroes: bool,
    /// Whether [`Disk::resize`] works.
    pub resize: bool,
}

/// An open image, used by one thread.
///
/// The caller has checked range, alignment and read-only; an operation is whole or an error,
/// never short. Operations may be in flight together; the order of overlapping ones is undefined,
/// as on any disk.
pub trait Disk {
    /// Size that the guest sees, in bytes.
    fn size(&self) -> u64;

    /// What the image can do.
    fn limits(&self) -> Limits;

    /// Fills `to` with the bytes at `offset`.
    fn read(&self, offset: u64, to: Segments) -> Pending<'_>;

    /// Stores the bytes of `from` at `offset`.
    fn write(&self, offset: u64, from: Segments) -> Pending<'_>;

    /// Tells, without reading data, what lies at `offset`, and how much of the `len` bytes from
    /// there on is like it: at least one byte, at most `len`. What is called data may be zeroes.
    ///
    /// For those who go through a whole image: it may wait for metadata of the host.
    fn extent(&self, _offset: u64, len: u64) -> Pending<'_, Extent> {
        Box::pin(std::future::ready(Ok(Extent { data: true, len })))
    }

    /// Makes every write that completed before this call durable.
    fn flush(&self) -> Pending<'_>;

    /// Whether a write that has completed may live in this process only, and be lost with it if
    /// it is killed now: tables in memory, until a flush writes them. What the host's page cache
    /// has is not lost.
    ///
    /// Asked after every write where somebody has to know: it is cheap. A format that says nothing
    /// is taken to lose them.
    fn volatile(&self) -> bool {
        true
    }

    /// Tells that the bytes are no longer needed. They read as zeroes or as before.
    fn discard(&self, offset: u64, len: u64) -> Pending<'_>;

    /// Makes the bytes read as zeroes; with `unmap`, host space may be freed.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Pending<'_>;

    /// Changes the size of the image. All or nothing; new space reads as zeroes.
    fn resize(&self, size: u64) -> Pending<'_>;

    /// Flushes and closes the image.
    fn close(self: Box<Self>) -> Pending<'static>;
}
