//! Going through all data of a disk with several threads, each with the disk opened for itself.
//!
//! The threads share a cursor: whoever is ready takes the next span of data, reads it and works
//! on it. The caller's thread gets the spans in the disk's order. Memory is bounded by the slots
//! that go round between them: a thread has one before it takes a span.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::{io, mem, thread};

use crate::host_file::text;
use crate::{Buffer, Disk, Engine, Extent, Format, Image, OpenError, Ring, Segments};

/// Bytes in a span, unless units are larger: all slots together stay in the processors' caches,
/// from where a span is copied, looked at and copied on.
const SPAN: u64 = 256 << 10;
/// Fewer threads would leave a disk that must be waited for with too little to do.
const MIN_THREADS: usize = 4;
/// More than this many would only need memory.
const MAX_THREADS: usize = 8;
/// Slots for each thread: one that it works on, and others on their way.
const SLOTS: usize = 3;

/// A disk to read, and how to open it.
#[derive(Clone, Copy)]
pub(super) struct Opener<'a> {
    pub(super) format: &'static Format,
    pub(super) image: &'a Image,
}

/// What is gone through.
pub(super) struct Scan<'a> {
    /// Spans are where any of these has data. Later ones are read along with the first.
    pub(super) disks: &'a [Opener<'a>],
    pub(super) engine: Engine,
    /// Bytes to go through. Past the end of a disk are zeroes.
    pub(super) size: u64,
    /// Spans begin and end at multiples of this, a power of two.
    pub(super) unit: u64,
    /// Set from outside to end it early.
    pub(super) stop: &'a AtomicBool,
}

/// A span of data on its way through the threads.
pub(super) struct Slot {
    /// Its place among all spans.
    sequence: u64,
    /// Where it begins.
    pub(super) offset: u64,
    /// Bytes of the disk in it; what follows up to a whole unit is zeroes.
    pub(super) len: usize,
    /// What each disk holds there.
    pub(super) memory: Vec<Buffer>,
    /// What the work finds out about its units.
    pub(super) units: Vec<Unit>,
    /// What the work makes of them.
    pub(super) packed: Vec<u8>,
    /// How many bytes the work has written to the target.
    pub(super) written: u64,
}

/// What a unit of a span is for the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// It is there already.
    Same,
    /// It reads as zeroes, and the target does not yet.
    Zero,
    /// It is to be written.
    Data,
    /// So many more bytes of `packed` hold it compressed.
    Packed(u32),
}

/// The part of the disk that nobody has taken yet.
struct Cursor {
    at: u64,
    sequence: u64,
    /// From `at` up to here it is known to be data.
    known: u64,
}

type Sent = Result<Slot, OpenError>;

impl Scan<'_> {
    fn span(&self) -> u64 {
        SPAN.max(self.unit)
    }

    /// Goes through all of it. `worker` makes for each thread what works on a span; `sink` gets
    /// each span afterwards, in order. The first error ends it.
    pub(super) fn run<W: FnMut(&mut Slot) -> Result<(), OpenError>>(
        &self,
        worker: impl Fn() -> io::Result<W> + Sync,
        mut sink: impl FnMut(&mut Slot) -> Result<(), OpenError>,
    ) -> Result<(), OpenError> {
        let threads = thread::available_parallelism().map_or(MIN_THREADS, usize::from);
        let threads = threads.clamp(MIN_THREADS, MAX_THREADS);
        let (free, slots) = mpsc::channel();
        for _ in 0..threads * SLOTS {
            let slot = self.slot().map_err(no_memory)?;
            let _ = free.send(slot);
        }
        let mut free = Some(free);
        let slots = Mutex::new(slots);
        let cursor = Mutex::new(Cursor {
            at: 0,
            sequence: 0,
            known: 0,
        });
        let (done, results) = mpsc::channel::<Sent>();
        let mut failed = None;
        thread::scope(|scope| {
            for _ in 0..threads {
                let done = done.clone();
                let (cursor, slots, worker) = (&cursor, &slots, &worker);
                let work = move || {
                    if let Err(error) = self.work(cursor, slots, worker, &done) {
                        let _ = done.send(Err(error));
                    }
                };
                let thread = thread::Builder::new().name("convert".into());
                if let Err(error) = thread.spawn_scoped(scope, work) {
                    failed.get_or_insert(no_memory(error));
                }
            }
            drop(done);
            let mut early = BTreeMap::new();
            let mut next = 0;
            // It ends when the last thread does.
            while let Ok(result) = results.recv() {
                match result {
                    Ok(slot) => drop(early.insert(slot.sequence, slot)),
                    Err(error) => drop(failed.get_or_insert(error)),
                }
                while failed.is_none()
                    && let Some(mut slot) = early.remove(&next)
                {
                    next += 1;
                    match sink(&mut slot) {
                        Ok(()) => drop(free.as_ref().map(|free| free.send(slot))),
                        Err(error) => failed = Some(error),
                    }
                }
                if failed.is_some() && free.is_some() {
                    // Whoever waits for a slot is to end, and so is whoever has one.
                    free = None;
                    lock(&cursor).at = self.size;
                }
            }
        });
        match failed {
            Some(error) => Err(error),
            None if self.stop.load(Ordering::Relaxed) => Err(interrupted()),
            None => Ok(()),
        }
    }

    fn slot(&self) -> io::Result<Slot> {
        let buffer = || Buffer::zeroed(self.span() as usize, 4096);
        Ok(Slot {
            sequence: 0,
            offset: 0,
            len: 0,
            memory: self
                .disks
                .iter()
                .map(|_| buffer())
                .collect::<Result<_, _>>()?,
            units: Vec::new(),
            packed: Vec::new(),
            written: 0,
        })
    }

    /// What one thread does.
    fn work<W: FnMut(&mut Slot) -> Result<(), OpenError>>(
        &self,
        cursor: &Mutex<Cursor>,
        slots: &Mutex<Receiver<Slot>>,
        worker: &impl Fn() -> io::Result<W>,
        done: &Sender<Sent>,
    ) -> Result<(), OpenError> {
        let mut worker = worker().map_err(no_memory)?;
        let ring = Ring::new(self.engine).map_err(no_memory)?;
        let mut disks = Vec::new();
        for opener in self.disks {
            let open = (opener.format.open)(&ring, opener.image);
            disks.push(ring.block_on(open, || {})?);
        }
        let path = &self.disks[0].image.path;
        let unreadable = |error| failure("read", path, &error);
        while !self.stop.load(Ordering::Relaxed) {
            let slot = lock(slots).recv();
            let Ok(mut slot) = slot else {
                break;
            };
            let taken = ring.block_on(self.take(&mut lock(cursor), &disks), || {});
            let Some((sequence, offset, len)) = taken.map_err(unreadable)? else {
                break;
            };
            (slot.sequence, slot.offset, slot.len) = (sequence, offset, len as usize);
            for (disk, memory) in disks.iter().zip(&mut slot.memory) {
                let read = read(&**disk, offset, memory, len, self.unit);
                ring.block_on(read, || {}).map_err(unreadable)?;
            }
            worker(&mut slot)?;
            if done.send(Ok(slot)).is_err() {
                break;
            }
        }
        for disk in disks {
            // It was only read.
            let _ = ring.block_on(disk.close(), || {});
        }
        Ok(())
    }

    /// Takes the next span: its place among all, its offset and length.
    async fn take(
        &self,
        cursor: &mut Cursor,
        disks: &[Box<dyn Disk>],
    ) -> io::Result<Option<(u64, u64, u64)>> {
        loop {
            let at = cursor.at;
            if at >= self.size || self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            if cursor.known <= at {
                let found = self.extent(disks, at).await?;
                if !found.data {
                    cursor.at = at + found.len;
                    continue;
                }
                cursor.known = at + found.len;
            }
            // The unit that it begins in is not taken: spans end with whole units.
            let start = at / self.unit * self.unit;
            let most = (start + self.span()).min(self.size);
            let whole = |end: u64| end.next_multiple_of(self.unit).min(most);
            let mut end = whole(cursor.known);
            while end < most {
                let more = self.extent(disks, end).await?;
                if !more.data {
                    break;
                }
                cursor.known = end + more.len;
                end = whole(cursor.known);
            }
            let sequence = cursor.sequence;
            (cursor.at, cursor.sequence) = (end, sequence + 1);
            return Ok(Some((sequence, start, end - start)));
        }
    }

    /// What lies at an offset: data if any of the disks has some.
    async fn extent(&self, disks: &[Box<dyn Disk>], at: u64) -> io::Result<Extent> {
        let left = self.size - at;
        let (mut data, mut zeroes) = (0, left);
        for disk in disks {
            let there = disk.size().saturating_sub(at).min(left);
            if there == 0 {
                continue;
            }
            let found = disk.extent(at, there).await?;
            match found.data {
                true => data = found.len.max(data),
                false if found.len < there => zeroes = found.len.min(zeroes),
                // To the end of the disk, and past it.
                false => {}
            }
        }
        Ok(match data {
            0 => Extent {
                data: false,
                len: zeroes,
            },
            len => Extent { data: true, len },
        })
    }
}

/// Reads a span; past the end of the disk, and up to a whole unit, are zeroes.
async fn read(
    disk: &dyn Disk,
    offset: u64,
    memory: &mut Buffer,
    len: u64,
    unit: u64,
) -> io::Result<()> {
    let buffer = mem::replace(memory, Buffer::zeroed(0, 1)?);
    let segments = Segments::from_buffer(buffer);
    let whole = len.next_multiple_of(unit) as usize;
    let there = disk.size().saturating_sub(offset).min(len) as usize;
    let result = match there {
        0 => Ok(()),
        _ => disk.read(offset, segments.slice(0, there)).await,
    };
    segments.slice(there, whole - there).fill(0);
    *memory = reclaim(segments)?;
    result
}

/// The buffer of operations that are over.
pub(super) fn reclaim(segments: Segments) -> io::Result<Buffer> {
    let buffer = segments.into_buffer();
    buffer.ok_or_else(|| io::Error::other("the memory of an operation that is over is in use"))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A thread that panicked ends everything anyway.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The error for an image that cannot be read or written.
pub(super) fn failure(what: &str, path: &std::path::Path, error: &io::Error) -> OpenError {
    OpenError {
        message: format!("cannot {what} `{}`: {}", path.display(), text(error)),
        help: match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Some("free some space".into()),
            _ => None,
        },
        key: OpenError::HOST,
    }
}

pub(super) fn no_memory(error: io::Error) -> OpenError {
    OpenError {
        message: format!("cannot begin to convert: {}", text(&error)),
        help: None,
        key: OpenError::HOST,
    }
}

pub(super) fn interrupted() -> OpenError {
    OpenError {
        message: "interrupted: nothing was made".into(),
        help: None,
        key: OpenError::HOST,
    }
}
