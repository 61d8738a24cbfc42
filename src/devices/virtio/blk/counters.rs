//! What a disk has done so far.

use std::sync::atomic::{AtomicU64, Ordering};

use super::histogram::Histogram;

/// Counters of one disk since it was opened.
///
/// Written by the disk's thread alone, read by any; each is right by itself, no two are of the
/// same instant.
#[derive(Debug, Default)]
pub struct Counters {
    /// Read requests that succeeded.
    pub reads: Counter,
    /// Bytes that they read.
    pub read_bytes: Counter,
    /// Write requests that succeeded.
    pub writes: Counter,
    /// Bytes that they wrote.
    pub written_bytes: Counter,
    /// Flush requests that succeeded.
    pub flushes: Counter,
    /// Discard requests that succeeded.
    pub discards: Counter,
    /// Write-zeroes requests that succeeded.
    pub write_zeroes: Counter,
    /// Requests that failed on the host: the guest got VIRTIO_BLK_S_IOERR.
    pub host_errors: Counter,
    /// Requests that the device refused, and chains that it could not read.
    pub refused: Counter,
    /// Interrupts sent for used buffers.
    pub interrupts: Counter,
    /// How long the reads took, from the queue until the driver was told.
    pub read_latency: Histogram,
    /// How long the writes took.
    pub write_latency: Histogram,
    /// How long the flushes took.
    pub flush_latency: Histogram,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The value now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds `amount`. There is one writer, so a load and a store do, without a locked
    /// instruction.
    pub(super) fn add(&self, amount: u64) {
        let value = self.0.load(Ordering::Relaxed).wrapping_add(amount);
        self.0.store(value, Ordering::Relaxed);
    }
}
