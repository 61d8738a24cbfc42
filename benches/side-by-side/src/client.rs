//! The front end: a driver in this process that sleeps as a guest does.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, ftruncate, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use crate::case::Case;
use crate::watchdog::Watchdog;
use crate::{Result, content};

/// Descriptors of the virtqueue: each request has three.
const QUEUE_SIZE: u16 = 256;

/// A connection, its one virtqueue, and the memory that requests are in.
pub struct Client {
    // Dropped first: it uses memory of the transport's.
    queue: VirtioBlkQueue<'static, usize>,
    transport: Box<VirtioBlkTransport>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    memory: MmapMut,
}

/// How long requests are made.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// For a time, after one that is not measured.
    Time {
        /// Not measured.
        warm_up: Duration,
        /// Measured.
        window: Duration,
    },
    /// The offsets end.
    Done,
}

/// What was measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Requests that ended in the time.
    pub requests: u64,
    /// The time.
    pub time: Duration,
    /// Processor time of the server meanwhile.
    pub processor: Duration,
    /// Requests that were made at all.
    pub made: u64,
    /// How long the flush afterwards took, where there was one.
    pub flush: Duration,
}

impl Client {
    /// Connects, with memory for `memory` bytes of requests in flight.
    pub fn connect(socket: &Path, memory: usize) -> io::Result<Client> {
        let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        let features = features.bits() | VirtioBlkFeatureFlags::FLUSH.bits();
        let path = socket.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(path, features)?);
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, QUEUE_SIZE)?;
        let mut queue = queues.pop().ok_or(io::ErrorKind::Unsupported)?;
        let file = memfd_create("requests", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, memory as u64)?;
        // SAFETY: nobody shortens the file. The server writes to it only while this process waits
        // for requests, and does not look at their memory.
        let mut memory = unsafe { MmapMut::map_mut(&file) }?;
        content::fill(&mut memory);
        let (at, len) = (memory.as_ptr() as usize, memory.len());
        transport.map_mem_region(at, len, file.as_raw_fd(), 0)?;
        queue.set_used_notif_enabled(true);
        let call = transport.get_completion_fd(0);
        // QEMU makes it one that does not wait, for this process too.
        let flags = fcntl_getfl(&*call)?;
        fcntl_setfl(&*call, flags - OFlags::NONBLOCK)?;
        Ok(Client {
            queue,
            kick: transport.get_submission_notifier(0),
            call,
            transport,
            memory,
        })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> io::Result<u64> {
        let sectors = u64::from(self.transport.get_config()?.capacity);
        Ok(sectors.saturating_mul(512))
    }

    /// Makes requests, as many at once as the case has in flight. What is written bears the number
    /// of the measurement. `processor` tells the server's processor time.
    pub fn drive(
        &mut self,
        case: &Case,
        mut offsets: impl Iterator<Item = u64>,
        measurement: u64,
        until: Until,
        processor: &dyn Fn() -> io::Result<Duration>,
    ) -> Result<Measured> {
        let limit = match until {
            Until::Time { warm_up, window } => warm_up + window + Duration::from_secs(30),
            Until::Done => Duration::from_secs(300),
        };
        let watchdog = Watchdog::new(Arc::clone(&self.call), limit);
        let mut slots: Vec<usize> = (0..case.depth).collect();
        let (mut in_flight, mut done, mut made) = (0, 0_u64, 0_u64);
        let mut clock = Clock::new(until, processor)?;
        loop {
            while let Some(slot) = slots.pop() {
                let Some(offset) = clock.goes_on().then(|| offsets.next()).flatten() else {
                    slots.clear();
                    break;
                };
                self.submit(case, slot, offset, measurement)?;
                made += 1;
                in_flight += 1;
            }
            if self.queue.avail_notif_needed() {
                self.kick.notify()?;
            }
            if in_flight == 0 {
                break;
            }
            self.call.read()?;
            watchdog.check()?;
            // As Linux's driver: no interrupts while it looks; then they are asked for, and it
            // looks again.
            loop {
                self.queue.set_used_notif_enabled(false);
                for completion in self.queue.completions() {
                    if completion.ret != 0 {
                        let error = io::Error::from_raw_os_error(-completion.ret);
                        return Err(format!("a request failed: {error}").into());
                    }
                    slots.push(completion.context);
                    in_flight -= 1;
                    done += 1;
                }
                self.queue.set_used_notif_enabled(true);
                if !self.queue.completions().has_next() {
                    break;
                }
            }
            clock.tick(done)?;
        }
        clock.end(done)?;
        Ok(Measured {
            made,
            ..clock.measured
        })
    }

    /// Reads a piece.
    pub fn read(&mut self, case: &Case, offset: u64) -> Result<&[u8]> {
        let one = Case {
            write: false,
            depth: 1,
            ..*case
        };
        let nothing = || Ok(Duration::ZERO);
        self.drive(&one, std::iter::once(offset), 0, Until::Done, &nothing)?;
        Ok(&self.memory[..case.len])
    }

    /// Has all that was written put on the disk; how long that took.
    pub fn flush(&mut self) -> Result<Duration> {
        let watchdog = Watchdog::new(Arc::clone(&self.call), Duration::from_secs(300));
        let begun = Instant::now();
        self.queue.flush(0)?;
        if self.queue.avail_notif_needed() {
            self.kick.notify()?;
        }
        loop {
            self.call.read()?;
            watchdog.check()?;
            let answer = self.queue.completions().next();
            match answer.map(|completion| completion.ret) {
                None => {}
                Some(0) => return Ok(begun.elapsed()),
                Some(errno) => {
                    let error = io::Error::from_raw_os_error(-errno);
                    return Err(format!("the flush failed: {error}").into());
                }
            }
        }
    }

    #[inline]
    fn submit(&mut self, case: &Case, slot: usize, offset: u64, measurement: u64) -> Result<()> {
        let buffer = &mut self.memory[slot * case.len..][..case.len];
        if case.write {
            content::stamp(buffer, offset, measurement);
        }
        let at = buffer.as_mut_ptr();
        // SAFETY: the memory lives as long as the queue, and nobody looks at a slot's while a
        // request has it.
        unsafe {
            match case.write {
                true => self.queue.write_raw(offset, at, case.len, slot)?,
                false => self.queue.read_raw(offset, at, case.len, slot)?,
            }
        }
        Ok(())
    }
}

/// Begins and ends what is measured.
struct Clock<'a> {
    until: Until,
    processor: &'a dyn Fn() -> io::Result<Duration>,
    begun: Instant,
    /// Of the beginning of what is measured, if it has begun: when, requests, processor time.
    first: Option<(Instant, u64, Duration)>,
    ended: bool,
    measured: Measured,
}

impl<'a> Clock<'a> {
    fn new(until: Until, processor: &'a dyn Fn() -> io::Result<Duration>) -> io::Result<Self> {
        let used = processor()?;
        let begun = Instant::now();
        Ok(Clock {
            until,
            processor,
            begun,
            first: matches!(until, Until::Done).then_some((begun, 0, used)),
            ended: false,
            measured: Measured::default(),
        })
    }

    fn goes_on(&self) -> bool {
        !self.ended
    }

    /// So many requests have ended.
    #[inline]
    fn tick(&mut self, done: u64) -> io::Result<()> {
        let Until::Time { warm_up, window } = self.until else {
            return Ok(());
        };
        let now = Instant::now();
        match self.first {
            None if now - self.begun >= warm_up => {
                self.first = Some((now, done, (self.processor)()?));
            }
            Some((from, ..)) if !self.ended && now - from >= window => self.end(done)?,
            _ => {}
        }
        Ok(())
    }

    fn end(&mut self, done: u64) -> io::Result<()> {
        if let (false, Some((from, requests, used))) = (self.ended, self.first) {
            self.measured.time = from.elapsed();
            self.measured.requests = done - requests;
            self.measured.processor = (self.processor)()?.saturating_sub(used);
        }
        self.ended = true;
        Ok(())
    }
}
