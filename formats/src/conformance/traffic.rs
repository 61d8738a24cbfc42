//! Random operations on a disk, many in flight, each compared with the model.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};

use super::content::{Content, SECTOR, Value};
use super::model::{self, Candidate, Model};
use crate::random::Random;
use crate::{Buffer, Disk, Format, Image, Recorder, Ring, Segments};

/// How a disk is opened, again and again.
pub struct Subject<'a> {
    /// The ring of this thread.
    pub ring: &'a Ring,
    /// The clock, and whether I/O is delayed or noted.
    pub recorder: &'a Recorder,
    /// The engine that is tested.
    pub format: &'a Format,
    /// What it opens.
    pub image: &'a Image,
}

/// What is done to a disk.
#[derive(Clone, Debug)]
pub struct Load {
    /// Number of operations.
    pub operations: u32,
    /// How many are in flight at most.
    pub in_flight: usize,
    /// Whether writes in flight may overlap.
    pub overlap: bool,
    /// Unit of offsets and lengths in bytes.
    pub block: u64,
    /// Ranges and alignments that matter to the format are made of this many bytes.
    pub cluster: u64,
    /// The largest transfer in bytes.
    pub most: u64,
    /// Where it happens, in bytes; what lies past the end of the disk is left out.
    pub areas: Vec<Range<u64>>,
    /// Of a hundred operations: how many change something.
    pub writes: u64,
    /// Of a thousand operations: how many flush.
    pub flushes: u64,
    /// Of a thousand operations: how many close and open again.
    pub reopens: u64,
    /// Of a thousand operations: how many change the size.
    pub resizes: u64,
    /// Whether it is ever made smaller.
    pub shrinks: bool,
    /// The size in bytes up to which it grows.
    pub largest: u64,
}

/// What was done, for who wants to know what may be there after a power cut. Times are those of
/// the recorder.
#[derive(Clone, Debug)]
pub struct Act {
    /// What it was.
    pub what: What,
    /// When it began.
    pub began: u64,
    /// When it was over; `u64::MAX`: never.
    pub ended: u64,
}

/// Kinds of acts.
#[derive(Clone, Debug)]
pub enum What {
    /// These sectors got this value; a discard, which does not decide, may have left them.
    Change {
        /// Which.
        sectors: Range<u64>,
        /// What they hold.
        value: Value,
        /// Whether they surely do.
        decides: bool,
    },
    /// Everything that was over when it began is durable.
    Flush,
    /// The size in bytes is another.
    Resize {
        /// Before.
        from: u64,
        /// After.
        to: u64,
    },
}

struct Flight {
    id: u64,
    sectors: Range<u64>,
    changes: bool,
    /// Of a read: changes that were in flight while it was.
    disturbed: Vec<(Range<u64>, Value)>,
}

/// What the operations in flight share.
struct Shared {
    model: RefCell<Model>,
    flying: RefCell<Vec<Flight>>,
    acts: RefCell<Vec<Act>>,
    failure: RefCell<Option<String>>,
    waiting: Cell<Option<Waker>>,
    recorder: Recorder,
}

impl Shared {
    fn fail(&self, message: String) {
        self.failure.borrow_mut().get_or_insert(message);
    }

    fn land(&self, id: u64) -> Option<Flight> {
        let mut flying = self.flying.borrow_mut();
        let at = flying.iter().position(|flight| flight.id == id);
        let flight = at.map(|at| flying.swap_remove(at));
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
        flight
    }

    /// A change of these sectors is about to be asked for.
    fn begin_change(&self, sectors: &Range<u64>, value: Value) {
        for flight in self.flying.borrow_mut().iter_mut() {
            if !flight.changes && overlap(&flight.sectors, sectors) {
                flight.disturbed.push((sectors.clone(), value));
            }
        }
        self.model.borrow_mut().begin(sectors.clone(), value);
    }

    fn act(&self, what: What) -> (usize, u64) {
        let began = self.recorder.now();
        let mut acts = self.acts.borrow_mut();
        acts.push(Act {
            what,
            began,
            ended: u64::MAX,
        });
        (acts.len() - 1, began)
    }

    fn acted(&self, act: usize) -> u64 {
        let now = self.recorder.now();
        self.acts.borrow_mut()[act].ended = now;
        now
    }

    /// The last acts that a sector has seen.
    fn acts_on(&self, sector: u64) -> Vec<Act> {
        let touches = |act: &&Act| match &act.what {
            What::Change { sectors, .. } => sectors.contains(&sector),
            What::Flush | What::Resize { .. } => true,
        };
        let acts = self.acts.borrow();
        let mut last: Vec<_> = acts.iter().rev().filter(touches).take(8).cloned().collect();
        last.reverse();
        last
    }

    /// Compares what was read with what may have been there.
    fn compare(&self, flight: &Flight, before: Option<&[model::Cell]>, found: &[u8]) {
        let mut model = self.model.borrow_mut();
        let mut want = [0; SECTOR as usize];
        for (i, bytes) in found.chunks(SECTOR as usize).enumerate() {
            let sector = flight.sectors.start + i as u64;
            let now = model.allowed(sector);
            let earlier = before.map_or(&[][..], |before| &before[i]);
            let meanwhile = flight.disturbed.iter().filter(|it| it.0.contains(&sector));
            let values = now
                .iter()
                .chain(earlier)
                .map(|candidate: &Candidate| candidate.value)
                .chain(meanwhile.map(|it| it.1));
            let mut torn = [false; SECTOR as usize];
            let mut value = None;
            for candidate in values {
                candidate.fill(sector, &mut want);
                if want == *bytes {
                    value = Some(candidate);
                    break;
                }
                if !flight.disturbed.is_empty() {
                    let equal = want.iter().zip(bytes).map(|(want, found)| want == found);
                    torn.iter_mut().zip(equal).for_each(|(to, it)| *to |= it);
                }
            }
            match value {
                Some(value) if flight.disturbed.is_empty() => model.settle(sector, value),
                Some(_) => {}
                // A page may be read while it is written to.
                None if torn.iter().all(|it| *it) => {}
                None => {
                    return self.fail(format!(
                        "read of {} sectors at {}: sector {sector} holds {}, expected {now:?} \
                         after {:?}",
                        found.len() as u64 / SECTOR,
                        flight.sectors.start,
                        Value::describe(bytes),
                        self.acts_on(sector),
                    ));
                }
            }
        }
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// A disk under load.
struct Traffic<'a> {
    subject: &'a Subject<'a>,
    load: &'a Load,
    random: Random,
    disk: Rc<Box<dyn Disk>>,
    shared: Rc<Shared>,
    next: u64,
    block: u64,
}

/// What is left of it when it is over.
pub struct Outcome {
    /// What the disk holds.
    pub content: Content,
    /// All that was done.
    pub acts: Vec<Act>,
    /// The number of the last value that was new.
    pub versions: u32,
}

/// Opens the disk that holds `content`, does to it what `load` says, reads all of it and closes
/// it.
pub fn run(
    subject: &Subject<'_>,
    load: &Load,
    seed: u64,
    content: &Content,
    versions: u32,
) -> Result<Outcome, String> {
    subject.ring.record(subject.recorder);
    let root = async {
        let disk = open(subject).await?;
        if disk.size() != content.size {
            return Err(format!(
                "the size is {}, expected {}",
                disk.size(),
                content.size
            ));
        }
        let block = load.block.max(disk.limits().alignment.into());
        let mut traffic = Traffic {
            subject,
            load,
            random: Random::new(seed),
            disk: Rc::new(disk),
            shared: Rc::new(Shared {
                model: RefCell::new(Model::new(content, versions)),
                flying: RefCell::default(),
                acts: RefCell::default(),
                failure: RefCell::default(),
                waiting: Cell::default(),
                recorder: subject.recorder.clone(),
            }),
            next: 0,
            block,
        };
        for _ in 0..load.operations {
            traffic.step().await?;
        }
        traffic.sweep().await?;
        let Traffic { disk, shared, .. } = traffic;
        let (act, _) = shared.act(What::Flush);
        close(disk).await?;
        shared.acted(act);
        let model = shared.model.borrow();
        Ok(Outcome {
            content: model.content()?,
            acts: shared.acts.take(),
            versions: model.versions(),
        })
    };
    subject.ring.block_on(root, || {})
}

async fn open(subject: &Subject<'_>) -> Result<Box<dyn Disk>, String> {
    let opening = (subject.format.open)(subject.ring, subject.image);
    opening
        .await
        .map_err(|error| format!("it does not open: {error}"))
}

async fn close(disk: Rc<Box<dyn Disk>>) -> Result<(), String> {
    let disk = Rc::try_unwrap(disk).map_err(|_| "the disk is still in use")?;
    disk.close()
        .await
        .map_err(|error| format!("it does not close: {error}"))
}

impl Traffic<'_> {
    /// Waits until fewer than `count` operations are in flight.
    async fn below(&self, count: usize) -> Result<(), String> {
        std::future::poll_fn(|cx| {
            if self.shared.flying.borrow().len() < count {
                return Poll::Ready(());
            }
            self.shared.waiting.set(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
        match self.shared.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    async fn step(&mut self) -> Result<(), String> {
        self.below(self.load.in_flight).await?;
        let limits = self.disk.limits();
        let mut kind = self.random.below(1000);
        for (share, what) in [
            (self.load.flushes, 0),
            (self.load.reopens, 1),
            (self.load.resizes, 2),
        ] {
            if kind < share {
                match what {
                    0 => self.flush(),
                    1 => self.reopen().await?,
                    _ if limits.resize => self.resize().await?,
                    _ => {}
                }
                return Ok(());
            }
            kind -= share;
        }
        let writes = self.random.chance(self.load.writes);
        let kind = self.random.below(100);
        let zeroes = writes && kind < 25 && limits.write_zeroes;
        let discard = writes && (25..40).contains(&kind) && limits.discard_granularity > 0;
        let Some(sectors) = self.claim(writes, zeroes || discard) else {
            return Ok(());
        };
        match (writes, zeroes, discard) {
            (false, ..) => self.read(sectors),
            (_, true, _) => {
                let unmap = self.random.chance(50);
                self.change(sectors, Value::ZERO, Way::Zeroes { unmap });
            }
            (_, _, true) => self.change(sectors, Value::ZERO, Way::Discard),
            _ => {
                let value = self.shared.model.borrow_mut().fresh();
                self.change(sectors, value, Way::Write);
            }
        }
        Ok(())
    }

    /// A range of sectors for an operation; one that nothing in flight changes if the operation
    /// changes it, unless the load is such that writes may overlap.
    fn claim(&mut self, changes: bool, wide: bool) -> Option<Range<u64>> {
        let size = self.shared.model.borrow().size();
        let (block, cluster) = (self.block, self.load.cluster);
        let area = self.random.below(self.load.areas.len() as u64) as usize;
        let area = self.load.areas.get(area)?;
        let area = area.start..area.end.min(size / block * block);
        if area.is_empty() {
            return None;
        }
        let blocks = (area.end - area.start) / block;
        let mut start = area.start + self.random.below(blocks.max(1)) * block;
        let longest = self
            .random
            .of(&[block, 4096, cluster / 2, cluster, 4 * cluster]);
        let longest = longest.clamp(block, self.load.most.max(block)) / block;
        let mut end = start + (1 + self.random.below(longest)) * block;
        // Whole clusters are treated in their own way, above all where they are freed.
        if self.random.chance(if wide { 60 } else { 20 }) && cluster.is_multiple_of(block) {
            start = start / cluster * cluster;
            end = end.next_multiple_of(cluster);
            end = end.min(start + self.load.most.max(cluster));
        }
        // The last cluster need not be whole.
        end = end.min(area.end);
        let sectors = start / SECTOR..end / SECTOR;
        if sectors.is_empty() {
            return None;
        }
        let flying = self.shared.flying.borrow();
        let taken = |flight: &Flight| flight.changes && overlap(&flight.sectors, &sectors);
        match changes && !self.load.overlap && flying.iter().any(taken) {
            true => None,
            false => Some(sectors),
        }
    }

    fn fly(&mut self, sectors: &Range<u64>, changes: bool) -> u64 {
        self.next += 1;
        let mut flying = self.shared.flying.borrow_mut();
        let mut disturbed = Vec::new();
        if !changes {
            let others = flying.iter().filter(|other| other.changes);
            let others = others.filter(|other| overlap(&other.sectors, sectors));
            // What these make of it is among what the model allows already.
            disturbed = others.map(|_| (0..0, Value::ZERO)).collect();
        }
        flying.push(Flight {
            id: self.next,
            sectors: sectors.clone(),
            changes,
            disturbed,
        });
        self.next
    }

    /// Memory in pieces of odd sizes at odd addresses, as a guest may choose to have it.
    fn memory(&mut self, len: usize) -> Result<Segments, String> {
        let skip = self.random.of(&[0, 0, 0, 1, 4, 512]);
        let buffer = Buffer::zeroed(len + skip, 4096).map_err(|error| error.to_string())?;
        let mut rest = Segments::from_buffer(buffer).slice(skip, len);
        let piece = self.random.of(&[7, 512, 4096, 1 << 20, 1 << 20]);
        if rest.len() / piece > 2000 {
            return Ok(rest);
        }
        let keep = rest.keep();
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let piece = rest.split_to(piece);
            pieces.push((piece.iovecs()[0].iov_base.cast(), piece.len()));
        }
        // SAFETY: the pieces are those of the buffer, which is kept.
        Ok(unsafe { Segments::new(pieces, keep) })
    }

    fn read(&mut self, sectors: Range<u64>) {
        let len = ((sectors.end - sectors.start) * SECTOR) as usize;
        let memory = match self.memory(len) {
            Ok(memory) => memory,
            Err(error) => return self.shared.fail(error),
        };
        memory.fill(0xee);
        let id = self.fly(&sectors, false);
        let before: Vec<_> = {
            let model = self.shared.model.borrow();
            sectors
                .clone()
                .map(|sector| model.allowed(sector))
                .collect()
        };
        let (disk, shared) = (Rc::clone(&self.disk), Rc::clone(&self.shared));
        self.subject.ring.spawn(async move {
            let result = disk.read(sectors.start * SECTOR, memory.clone()).await;
            drop(disk);
            let Some(flight) = shared.land(id) else {
                return;
            };
            match result {
                Err(error) => shared.fail(format!("read of sectors {sectors:?}: {error}")),
                Ok(()) => {
                    let mut found = vec![0; len];
                    memory.copy_to(&mut found);
                    shared.compare(&flight, Some(&before), &found);
                }
            }
        });
    }

    fn change(&mut self, sectors: Range<u64>, value: Value, way: Way) {
        let (offset, len) = (
            sectors.start * SECTOR,
            (sectors.end - sectors.start) * SECTOR,
        );
        let memory = match way {
            Way::Write => match self.memory(len as usize) {
                Ok(memory) => Some(memory),
                Err(error) => return self.shared.fail(error),
            },
            _ => None,
        };
        if let Some(memory) = &memory {
            let mut bytes = vec![0; len as usize];
            for (sector, to) in sectors.clone().zip(bytes.chunks_mut(SECTOR as usize)) {
                value.fill(sector, to);
            }
            memory.copy_from(&bytes);
        }
        let decides = !matches!(way, Way::Discard);
        let (act, began) = self.shared.act(What::Change {
            sectors: sectors.clone(),
            value,
            decides,
        });
        self.shared.begin_change(&sectors, value);
        let id = self.fly(&sectors, true);
        let (disk, shared) = (Rc::clone(&self.disk), Rc::clone(&self.shared));
        self.subject.ring.spawn(async move {
            let result = match (way, memory) {
                (Way::Write, Some(memory)) => disk.write(offset, memory).await,
                (Way::Zeroes { unmap }, _) => disk.write_zeroes(offset, len, unmap).await,
                _ => disk.discard(offset, len).await,
            };
            drop(disk);
            match result {
                Err(error) => shared.fail(format!("{way:?} of sectors {sectors:?}: {error}")),
                Ok(()) => {
                    let now = shared.acted(act);
                    let mut model = shared.model.borrow_mut();
                    model.end(sectors, value, began, now, decides);
                }
            }
            shared.land(id);
        });
    }

    fn flush(&mut self) {
        let id = self.fly(&(0..0), false);
        let (act, _) = self.shared.act(What::Flush);
        let (disk, shared) = (Rc::clone(&self.disk), Rc::clone(&self.shared));
        self.subject.ring.spawn(async move {
            let result = disk.flush().await;
            drop(disk);
            match result {
                Err(error) => shared.fail(format!("flush: {error}")),
                Ok(()) => drop(shared.acted(act)),
            }
            shared.land(id);
        });
    }

    async fn resize(&mut self) -> Result<(), String> {
        let from = self.shared.model.borrow().size();
        let to = match self.random.below(3) {
            // Within the last cluster, a few clusters, anywhere.
            0 => from + self.block * (1 + self.random.below(8)),
            1 => from + self.load.cluster * self.random.below(9),
            _ => self.random.below(self.load.largest / self.block + 1) * self.block,
        };
        let to = to.clamp(self.block, self.load.largest.max(from));
        let to = match self.load.shrinks {
            true => to / self.block * self.block,
            false => (to / self.block * self.block).max(from),
        };
        if to < from {
            // A guest has nothing in flight where its disk ends.
            self.below(1).await?;
        }
        let (act, _) = self.shared.act(What::Resize { from, to });
        self.disk
            .resize(to)
            .await
            .map_err(|error| format!("resize from {from} to {to}: {error}"))?;
        self.shared.acted(act);
        if self.disk.size() != to {
            return Err(format!("resized to {to}, it has {}", self.disk.size()));
        }
        self.shared.model.borrow_mut().resize(to);
        Ok(())
    }

    async fn reopen(&mut self) -> Result<(), String> {
        self.below(1).await?;
        let size = self.disk.size();
        let (act, _) = self.shared.act(What::Flush);
        // Closed before it is opened again: it is locked.
        let nothing: Box<dyn Disk> = Box::new(Nothing);
        close(std::mem::replace(&mut self.disk, Rc::new(nothing))).await?;
        self.shared.acted(act);
        let again = open(self.subject).await?;
        if again.size() != size {
            return Err(format!("reopened, it has {} of {size}", again.size()));
        }
        self.disk = Rc::new(again);
        Ok(())
    }

    /// Reads everything that was ever touched.
    async fn sweep(&mut self) -> Result<(), String> {
        self.below(1).await?;
        let size = self.shared.model.borrow().size();
        for area in &self.load.areas {
            let mut start = area.start;
            while start < area.end.min(size) {
                let end = (start + (1 << 20)).min(area.end).min(size);
                self.read(start / SECTOR..end / SECTOR);
                self.below(4).await?;
                start = end;
            }
        }
        self.below(1).await
    }
}

/// How sectors are changed.
#[derive(Clone, Copy, Debug)]
enum Way {
    Write,
    Zeroes { unmap: bool },
    Discard,
}

/// A disk that is closed.
struct Nothing;

impl Disk for Nothing {
    fn size(&self) -> u64 {
        0
    }

    fn limits(&self) -> crate::Limits {
        crate::Limits {
            alignment: 1,
            memory_alignment: 1,
            optimal_io: 512,
            discard_granularity: 0,
            write_zeroes: false,
            resize: false,
        }
    }

    fn read(&self, _: u64, _: Segments) -> crate::Pending<'_> {
        closed()
    }

    fn write(&self, _: u64, _: Segments) -> crate::Pending<'_> {
        closed()
    }

    fn flush(&self) -> crate::Pending<'_> {
        closed()
    }

    fn discard(&self, _: u64, _: u64) -> crate::Pending<'_> {
        closed()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> crate::Pending<'_> {
        closed()
    }

    fn resize(&self, _: u64) -> crate::Pending<'_> {
        closed()
    }

    fn close(self: Box<Self>) -> crate::Pending<'static> {
        closed()
    }
}

fn closed() -> crate::Pending<'static> {
    Box::pin(std::future::ready(Err(
        std::io::ErrorKind::NotConnected.into()
    )))
}
