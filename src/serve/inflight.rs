//! The requests in flight, in memory that the front end keeps: whoever serves the disk after this
//! process was killed finds there what has to be done again (vhost-user: "Inflight I/O tracking").
//!
//! For each virtqueue a header and a descriptor state for each of its heads, little-endian:
//!
//! | offset | header | | offset | state |
//! |---|---|---|---|---|
//! | 0 | features, u64 | | 0 | in flight, u8 |
//! | 8 | version, u16: 1 | | 6 | next, u16 |
//! | 10 | descriptors, u16 | | 8 | counter, u64 |
//! | 12 | head of the last batch, u16 | | | |
//! | 14 | used index, u16 | | | |
//!
//! Behind them, on a cache line of its own, is what [`unflushed`] keeps.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::faults::Mapped;
use super::memory::{PAGE, page_of};
use super::unflushed::{self, Held, Holder};
use super::wrong;
use crate::devices::virtio::Record;

const HEADER: usize = 16;
const STATE: usize = 16;
/// Each virtqueue's part begins on a cache line.
const ALIGN: usize = 64;
const VERSION: u16 = 1;

const AT_VERSION: usize = 8;
const AT_DESCRIPTORS: usize = 10;
const AT_LAST: usize = 12;
const AT_USED: usize = 14;
const AT_IN_FLIGHT: usize = 0;
const AT_NEXT: usize = 6;
const AT_COUNTER: usize = 8;

/// The memory of all virtqueues.
#[derive(Clone)]
pub(super) struct InFlight {
    region: Arc<Mapped>,
    queues: u16,
    queue_size: u16,
}

/// Bytes of one virtqueue.
fn part(queue_size: u16) -> usize {
    (HEADER + STATE * usize::from(queue_size)).next_multiple_of(ALIGN)
}

/// Bytes of so many virtqueues.
fn parts(queues: u16, queue_size: u16) -> usize {
    usize::from(queues) * part(queue_size)
}

/// Bytes of the memory for so many virtqueues.
pub(super) fn len(queues: u16, queue_size: u16) -> usize {
    parts(queues, queue_size) + unflushed::LEN
}

/// New memory for so many virtqueues: nothing is in flight, and nothing unflushed.
pub(super) fn create(queues: u16, queue_size: u16) -> io::Result<File> {
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(file);
    ftruncate(&file, len(queues, queue_size) as u64)?;
    unflushed::mark(&file, parts(queues, queue_size))?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

impl InFlight {
    /// Maps memory that a backend has made, this one or an earlier one.
    pub(super) fn open(
        file: File,
        offset: u64,
        queues: u16,
        queue_size: u16,
    ) -> io::Result<InFlight> {
        // Of a file that cannot become shorter there is a page, but for a host without memory.
        let seals = fcntl_get_seals(file.as_fd()).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::SHRINK) {
            return Err(wrong("the memory of requests in flight is not sealed"));
        }
        // Of huge pages a host may have none, however long the file is.
        if page_of(&file)? != PAGE {
            return Err(wrong("the memory of requests in flight is of huge pages"));
        }
        let has = file.metadata()?.len();
        let fits = |size: &usize| {
            let end = offset.checked_add(*size as u64);
            end.is_some_and(|end| end <= has)
        };
        // Of another program's server it may end where the virtqueues' parts do.
        let sizes = [len(queues, queue_size), parts(queues, queue_size)];
        let size = sizes
            .into_iter()
            .find(fits)
            .ok_or_else(|| wrong("the memory of requests in flight is too short"))?;
        let region = MmapRegion::from_file(FileOffset::new(file, offset), size)
            .map_err(|error| wrong(format!("no memory of requests in flight: {error}")))?;
        Ok(InFlight {
            region: Arc::new(Mapped::new(region)?),
            queues,
            queue_size,
        })
    }

    /// The record of unflushed writes; `None` if the memory is another program's.
    pub(super) fn unflushed(&self, ours: Holder) -> Option<Held> {
        Held::find(&self.region, parts(self.queues, self.queue_size), ours)
    }

    /// The record of one virtqueue, whose used ring has this index.
    pub(super) fn record(&self, index: u16, size: u16, used: u16) -> io::Result<Log> {
        if index >= self.queues || size > self.queue_size {
            return Err(wrong("a virtqueue has no memory of its requests in flight"));
        }
        let mut log = Log {
            region: Arc::clone(&self.region),
            base: usize::from(index) * part(self.queue_size),
            size,
            counter: 0,
            resume: Vec::new(),
        };
        log.recover(used)?;
        Ok(log)
    }
}

/// The record of one virtqueue.
pub(super) struct Log {
    region: Arc<Mapped>,
    base: usize,
    size: u16,
    /// Of the next head that is taken.
    counter: u64,
    resume: Vec<u16>,
}

impl Log {
    fn load<T: AtomicAccess>(&self, at: usize) -> io::Result<T> {
        let memory = self.region.as_volatile_slice();
        let loaded = memory.load(self.base + at, Ordering::Acquire);
        loaded.map_err(|error| wrong(format!("requests in flight: {error}")))
    }

    /// What is stored later is seen later. A place outside, which none here is, stays as it is.
    fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        let memory = self.region.as_volatile_slice();
        let _ = memory.store(value, self.base + at, Ordering::Release);
    }

    fn state(head: u16) -> usize {
        HEADER + STATE * usize::from(head)
    }

    /// Finds what is in flight, in the order in which it was taken.
    fn recover(&mut self, used: u16) -> io::Result<()> {
        let version: u16 = self.load(AT_VERSION)?;
        if version == 0 {
            self.store(AT_DESCRIPTORS, self.size.to_le());
            self.store(AT_USED, used.to_le());
            self.store(AT_VERSION, VERSION.to_le());
            return Ok(());
        }
        let descriptors = u16::from_le(self.load(AT_DESCRIPTORS)?);
        if u16::from_le(version) != VERSION || descriptors != self.size {
            return Err(wrong("requests in flight of another kind of virtqueue"));
        }
        // The last batch is in the used ring already, and the record does not say so yet.
        let told = u16::from_le(self.load(AT_USED)?);
        let mut head = u16::from_le(self.load(AT_LAST)?);
        for _ in 0..used.wrapping_sub(told).min(self.size) {
            if head >= self.size {
                break;
            }
            self.store(Self::state(head) + AT_IN_FLIGHT, 0u8);
            head = u16::from_le(self.load(Self::state(head) + AT_NEXT)?);
        }
        self.store(AT_USED, used.to_le());
        let mut found = Vec::new();
        for head in 0..self.size {
            if self.load::<u8>(Self::state(head) + AT_IN_FLIGHT)? != 0 {
                let counter: u64 = self.load(Self::state(head) + AT_COUNTER)?;
                found.push((u64::from_le(counter), head));
            }
        }
        found.sort_unstable();
        self.counter = found.last().map_or(0, |(last, _)| last.wrapping_add(1));
        self.resume = found.into_iter().map(|(_, head)| head).collect();
        Ok(())
    }

    /// Number of heads in flight.
    pub(super) fn in_flight(&self) -> u16 {
        self.resume.len() as u16
    }
}

impl Record for Log {
    fn resume(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.resume)
    }

    fn taken(&mut self, head: u16) {
        let state = Self::state(head);
        self.store(state + AT_COUNTER, self.counter.to_le());
        self.counter = self.counter.wrapping_add(1);
        self.store(state + AT_IN_FLIGHT, 1u8);
    }

    fn returning(&mut self, head: u16) {
        let last: u16 = self.load(AT_LAST).unwrap_or_default();
        self.store(Self::state(head) + AT_NEXT, last);
        self.store(AT_LAST, head.to_le());
    }

    fn returned(&mut self, head: u16, used: u16) {
        self.store(Self::state(head) + AT_IN_FLIGHT, 0u8);
        self.store(AT_USED, used.to_le());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::blk::Unflushed as _;

    fn shared() -> InFlight {
        InFlight::open(create(2, 8).unwrap(), 0, 2, 8).unwrap()
    }

    #[test]
    fn what_was_taken_and_not_given_back_is_resumed_in_that_order() {
        let shared = shared();
        let mut log = shared.record(1, 8, 100).unwrap();
        assert!(log.resume().is_empty());
        for head in [5, 2, 7, 0] {
            log.taken(head);
        }
        log.returning(7);
        log.returned(7, 101);
        let mut next = shared.record(1, 8, 101).unwrap();
        assert_eq!(next.in_flight(), 3);
        assert_eq!(next.resume(), [5, 2, 0]);
        next.taken(7);
        assert_eq!(shared.record(1, 8, 101).unwrap().resume(), [5, 2, 0, 7]);
        assert!(shared.record(0, 8, 0).unwrap().resume().is_empty());
    }

    #[test]
    fn what_is_in_the_used_ring_already_is_not_done_again() {
        let shared = shared();
        let mut log = shared.record(0, 8, 0xffff).unwrap();
        log.taken(3);
        log.taken(4);
        log.returning(4);
        // Killed after the used ring was updated: or before.
        assert_eq!(shared.record(0, 8, 0xffff).unwrap().resume(), [3, 4]);
        assert_eq!(shared.record(0, 8, 0).unwrap().resume(), [3]);
    }

    #[test]
    fn a_record_of_nonsense_is_bounded() {
        let shared = shared();
        let log = shared.record(0, 8, 0).unwrap();
        for at in (0..part(8)).step_by(8) {
            log.store(at, u64::MAX);
        }
        assert!(shared.record(0, 8, 0).is_err());
        log.store(AT_VERSION, VERSION.to_le());
        log.store(AT_DESCRIPTORS, 8u16.to_le());
        assert_eq!(shared.record(0, 8, 0).unwrap().resume().len(), 8);
        assert!(shared.record(0, 4, 0).is_err());
        assert!(shared.record(2, 8, 0).is_err());
        assert!(shared.record(0, 16, 0).is_err());
    }

    #[test]
    fn memory_that_can_become_shorter_is_refused() {
        let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, 1 << 20).unwrap();
        assert!(InFlight::open(File::from(file), 0, 1, 8).is_err());
        let short = create(1, 8).unwrap();
        assert!(InFlight::open(short, 0, 2, 8).is_err());
    }

    #[test]
    fn what_one_server_has_unflushed_the_next_one_finds_lost() {
        let (one, two) = (Holder::new().unwrap(), Holder::new().unwrap());
        let shared = shared();
        let held = shared.unflushed(one).unwrap();
        assert!(!held.is_lost() && !held.is_ours());
        held.hold();
        assert!(!held.is_lost() && held.is_ours());
        let next = shared.unflushed(two).unwrap();
        assert!(next.is_lost() && !next.is_ours());
        next.release();
        assert!(!next.is_lost() && !held.is_ours());
        // The virtqueues' part of it is as it was.
        assert!(shared.record(1, 8, 0).unwrap().resume().is_empty());
    }

    #[test]
    fn memory_of_another_program_has_no_record_of_what_is_unflushed() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        for len in [parts(2, 8), len(2, 8), 1 << 20] {
            let file = memfd_create("test", flags).unwrap();
            ftruncate(&file, len as u64).unwrap();
            fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
            let other = InFlight::open(File::from(file), 0, 2, 8).unwrap();
            assert!(other.unflushed(Holder::new().unwrap()).is_none());
            assert!(other.record(1, 8, 0).is_ok());
        }
    }
}
