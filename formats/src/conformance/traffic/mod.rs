//! Random operations on a disk, many in flight, each compared with the model.

mod closed;
mod flights;
mod operations;

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;

use super::content::{Content, SECTOR, Value};
use super::model::Model;
use crate::random::Random;
use crate::{Disk, Format, Image, Recorder, Ring};
use flights::{Flight, Shared, overlap};
use operations::Way;

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
}
