//! Requests to a disk, and what it ought to hold afterwards.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;

use super::input::Input;
use super::seed::stamp;
use super::view::{Audit, View};
use super::{Story, Tally};
use crate::{Buffer, Disk, Image, Pending, Segments};

const SECTOR: u64 = 512;
/// Longest read or write.
const MAX_LEN: u64 = 256 << 10;
/// Longest range of other requests: what a guest may ask for at once.
const MAX_RANGE: u64 = 1 << 30;
/// Most requests.
const MAX_REQUESTS: usize = 48;
/// Where tags of what is written begin: the seeds' are smaller.
const TAGS: u32 = 0x1000;

/// Memory that holds `bytes`.
pub(super) fn memory(bytes: &[u8]) -> Segments {
    let segments = Segments::from_buffer(Buffer::zeroed(bytes.len(), 4096).unwrap());
    segments.copy_from(bytes);
    segments
}

/// What memory holds.
pub(super) fn bytes(segments: &Segments) -> Vec<u8> {
    let mut bytes = vec![0; segments.len()];
    segments.copy_to(&mut bytes);
    bytes
}

/// What became of a range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Written(u32),
    Zero,
    /// Zeroes, or as before.
    Discarded,
    /// A request failed.
    Unknown,
}

/// A request and what it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Read,
    Write(u32),
    Zero { unmap: bool },
    Discard,
    Flush,
}

/// A disk in use.
pub(super) struct Session<'a> {
    disk: Option<Box<dyn Disk>>,
    before: &'a View<'a>,
    audit: Audit,
    image: &'a Image,
    tally: &'a mut Tally,
    story: &'a mut Story,
    log: Vec<(Range<u64>, Effect)>,
    /// Clusters of the disk where there is something to see.
    clusters: Vec<u64>,
    contents: RefCell<HashMap<u64, Option<Rc<Vec<u8>>>>>,
    size: u64,
    /// Bytes that requests may have needed in the file.
    needed: u64,
    /// Damage was met.
    pub(super) condemned: bool,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        disk: Box<dyn Disk>,
        before: &'a View<'a>,
        image: &'a Image,
        tally: &'a mut Tally,
        story: &'a mut Story,
    ) -> Self {
        let audit = before.audit(&BTreeSet::new());
        let mut clusters = before.described(40);
        let last = before.size.saturating_sub(1) >> before.bits;
        clusters.extend([0, 1, 2, last]);
        Session {
            size: disk.size(),
            disk: Some(disk),
            before,
            audit,
            image,
            tally,
            story,
            log: Vec::new(),
            clusters,
            contents: RefCell::default(),
            needed: 0,
            condemned: false,
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.before.bits
    }

    /// Makes requests, some of them together, until the input ends.
    pub(super) async fn play(&mut self, input: &mut Input<'_>) {
        // What is there is looked at first, or else what a write does about it would not be.
        let mut left = MAX_REQUESTS;
        while !input.is_over() && left > 0 {
            let kind = input.below(16);
            if kind == 15 {
                self.resize(input).await;
                left -= 1;
                continue;
            }
            let mut batch = Vec::new();
            for _ in 0..input.of(&[1, 1, 2, 4]) {
                let (request, range) = self.request(input);
                let apart = |(_, other): &(Request, Range<u64>)| {
                    range.end <= other.start || other.end <= range.start
                };
                if batch.iter().all(apart) {
                    batch.push((request, range));
                }
            }
            left = left.saturating_sub(batch.len());
            self.carry_out(batch).await;
        }
    }

    fn request(&self, input: &mut Input<'_>) -> (Request, Range<u64>) {
        let tag = TAGS + self.log.len() as u32 * 8 + input.below(8) as u32;
        let request = match input.below(16) {
            0..4 => Request::Read,
            4..9 => Request::Write(tag),
            9..11 => Request::Zero { unmap: true },
            11 => Request::Zero { unmap: false },
            12..14 => Request::Discard,
            14 => Request::Flush,
            _ => Request::Read,
        };
        let request = match request {
            _ if self.image.ro => Request::Read,
            Request::Discard if !self.image.sparse => Request::Write(tag),
            request => request,
        };
        let start = self.clusters[input.below(self.clusters.len() as u64) as usize];
        let start = (start << self.before.bits).min(self.size);
        let cluster = self.cluster();
        let (skip, len) = match input.below(8) {
            0 | 1 => (0, cluster),
            2 => (0, 3 * cluster),
            3 => (0, SECTOR),
            4 => (cluster - SECTOR, 2 * SECTOR),
            5 => (SECTOR * input.below(8), SECTOR * (1 + input.below(16))),
            6 => (0, input.below(64) * cluster),
            _ => (0, 1 << (9 + input.below(22))),
        };
        let most = match request {
            Request::Read | Request::Write(_) => MAX_LEN,
            _ => MAX_RANGE,
        };
        // The engine may ask for more at once than it is good for, if clusters are large.
        let offset = (start + skip).min(self.size);
        let len = len.min(most).min(self.size - offset);
        match request {
            Request::Flush => (request, 0..0),
            _ => (request, offset..offset + len),
        }
    }

    async fn carry_out(&mut self, batch: Vec<(Request, Range<u64>)>) {
        let batch: Vec<_> = batch
            .into_iter()
            .filter(|(request, range)| !range.is_empty() || *request == Request::Flush)
            .map(|(request, range)| {
                let memory = match request {
                    Request::Write(tag) => {
                        let sectors = range.start / SECTOR..range.end / SECTOR;
                        let stamps: Vec<_> = sectors.map(|at| stamp(tag, at)).collect();
                        memory(&stamps.concat())
                    }
                    Request::Read => memory(&vec![0xee; (range.end - range.start) as usize]),
                    _ => memory(&[]),
                };
                (request, range, memory)
            })
            .collect();
        for (request, range, _) in &batch {
            self.story.0.push(format!("{request:?} {range:#x?}"));
            if !matches!(request, Request::Read | Request::Flush) {
                let clusters = (range.end - range.start) / self.cluster() + 2;
                self.needed += (clusters + 4) * self.cluster();
            }
        }
        let Some(disk) = &self.disk else { return };
        let start = |(request, range, memory): &(Request, Range<u64>, Segments)| {
            let (offset, len) = (range.start, range.end - range.start);
            match *request {
                Request::Read => disk.read(offset, memory.clone()),
                Request::Write(_) => disk.write(offset, memory.clone()),
                Request::Zero { unmap } => disk.write_zeroes(offset, len, unmap),
                Request::Discard => disk.discard(offset, len),
                Request::Flush => disk.flush(),
            }
        };
        let results = all(batch.iter().map(start).collect()).await;
        for ((request, range, memory), result) in batch.into_iter().zip(results) {
            self.tally.requests += 1;
            self.tally.failed += u64::from(result.is_err());
            if let Err(error) = &result {
                self.condemned |= error.kind() == io::ErrorKind::InvalidData;
                self.story
                    .0
                    .push(format!("{request:?} {range:#x?}: {error}"));
            }
            let refused = |error: &io::Error| error.raw_os_error() == Some(libc::EROFS);
            let effect = match (request, result) {
                (Request::Read, Ok(())) => {
                    self.compare(range, &bytes(&memory));
                    continue;
                }
                (Request::Read | Request::Flush, _) => continue,
                (_, Err(error)) if refused(&error) => continue,
                (_, Err(_)) => Effect::Unknown,
                (Request::Write(tag), Ok(())) => Effect::Written(tag),
                (Request::Zero { .. }, Ok(())) => Effect::Zero,
                (Request::Discard, Ok(())) => Effect::Discarded,
            };
            self.log.push((range, effect));
        }
    }

    async fn resize(&mut self, input: &mut Input<'_>) {
        let near = SECTOR * input.below(1 << 12);
        let size = match input.below(8) {
            0 => self.size.saturating_add(near),
            1 => self.size.saturating_sub(near),
            2 => near,
            3 => self.size.saturating_mul(2).max(1 << 20),
            4 => 1 << (20 + input.of(&[1, 4, 8, 12, 43]).min(input.below(43))),
            5 => (self.size / 2) & !511,
            6 if input.byte() & 7 == 0 => !511,
            _ => self.before.size.min(1 << 60) & !511,
        };
        // New space in front of data of a backing file, and data files, are truly made.
        let few = self.size.saturating_add(4 << 20);
        let size = match self.image.backing.is_empty() && self.image.sparse && size < 1 << 63 {
            true => size,
            false => size.min(few),
        };
        let Some(disk) = &self.disk else { return };
        self.story.0.push(format!("resize to {size:#x}"));
        let old = self.size;
        let result = disk.resize(size).await;
        self.size = disk.size();
        self.tally.requests += 1;
        self.needed += 33 << 20;
        match result {
            Ok(()) => {
                assert_eq!(self.size, size);
                self.log.push((size.min(old)..u64::MAX, Effect::Zero));
            }
            Err(error) => {
                self.story.0.push(format!("the resize fails: {error}"));
                self.condemned |= error.kind() == io::ErrorKind::InvalidData;
                // What was asked for may be too much for any image.
                self.tally.failed += u64::from(error.raw_os_error() != Some(libc::EFBIG));
                assert_eq!(self.size, old, "{error}");
            }
        }
    }

    /// Compares what was read with what was expected.
    fn compare(&mut self, range: Range<u64>, found: &[u8]) {
        let sound = self.audit.suspect.is_empty();
        let bits = self.before.bits;
        for (sector, found) in (range.start / SECTOR..).zip(found.chunks(SECTOR as usize)) {
            let cluster = (sector * SECTOR) >> bits;
            let is_of = |range: &Range<u64>| {
                range.start >> bits <= cluster && cluster < range.end.div_ceil(1 << bits)
            };
            // It may have moved to where another one is.
            let touched = || self.log.iter().any(|(range, _)| is_of(range));
            // Without holes everything has got a place at the start already.
            if !sound && (touched() || !self.image.sparse) {
                self.tally.unjudged += 1;
                continue;
            }
            self.assert_expected(sector, found);
        }
    }

    /// Asserts that a sector holds what it should.
    fn assert_expected(&mut self, sector: u64, found: &[u8]) {
        let Some(allowed) = self.expected(sector) else {
            self.tally.unjudged += 1;
            return;
        };
        self.tally.judged += 1;
        let right = allowed.iter().any(|content| match content {
            Some(content) => content[..found.len()] == *found,
            None => found.iter().all(|byte| *byte == 0),
        });
        assert!(
            right,
            "at {:#x}: {:02x?}, expected {:02x?}",
            sector * SECTOR,
            &found[..8.min(found.len())],
            allowed
                .iter()
                .map(|content| content.as_deref().map(|content| &content[..8]))
                .collect::<Vec<_>>(),
        );
    }

    /// What a sector may hold, `None` being zeroes. Nothing if that is not known.
    fn expected(&self, sector: u64) -> Option<Vec<Option<Vec<u8>>>> {
        let mut allowed = Vec::new();
        for (range, effect) in self.log.iter().rev() {
            if !is_in(sector, range) {
                continue;
            }
            match effect {
                Effect::Written(tag) => allowed.push(Some(stamp(*tag, sector))),
                Effect::Zero => allowed.push(None),
                Effect::Discarded => {
                    allowed.push(None);
                    continue;
                }
                Effect::Unknown => return None,
            }
            return Some(allowed);
        }
        let cluster = (sector * SECTOR) >> self.before.bits;
        if self.before.is_in_doubt(cluster, &self.audit) {
            return None;
        }
        let mut contents = self.contents.borrow_mut();
        let content = contents
            .entry(cluster)
            .or_insert_with(|| self.before.content(cluster).map(Rc::new))
            .as_ref()?;
        let at = (sector * SECTOR - (cluster << self.before.bits)) as usize;
        allowed.push(Some(content[at..at + SECTOR as usize].to_vec()));
        Some(allowed)
    }

    pub(super) async fn close(&mut self) -> io::Result<()> {
        match self.disk.take() {
            Some(disk) => disk.close().await,
            None => Ok(()),
        }
    }

    /// Compares the file with what should have become of it.
    pub(super) fn judge(&mut self, after: &View<'_>, closed: bool) {
        let harmed = self.audit.suspect.clone();
        let now = after.audit(&harmed);
        let fresh: Vec<_> = now.suspect.difference(&harmed).collect();
        if now.doubtful.is_empty() {
            assert!(fresh.is_empty(), "clusters {fresh:#x?} are suspect now");
        }
        for cluster in &self.audit.kept {
            let start = cluster << self.before.bits;
            let len = self.cluster() as usize;
            let [old, new] =
                [self.before, after].map(|view| super::view::bytes_at(view.bytes, start, len));
            assert!(
                old == new,
                "cluster {cluster:#x} is not the disk's, and was changed"
            );
        }
        let mut clusters = after.described(64);
        clusters.extend(&self.clusters);
        clusters.sort_unstable();
        clusters.dedup();
        for cluster in clusters {
            if cluster << self.before.bits >= self.size {
                continue;
            }
            self.judge_cluster(cluster, after, &now, closed);
        }
    }

    fn judge_cluster(&mut self, cluster: u64, after: &View<'_>, now: &Audit, closed: bool) {
        let sectors = self.cluster() / SECTOR;
        let content = match after.is_in_doubt(cluster, now) {
            true => None,
            false => after.content(cluster),
        };
        let Some(content) = content else {
            self.tally.unjudged += sectors;
            return;
        };
        let first = cluster * sectors;
        let sound = self.audit.suspect.is_empty();
        for (sector, found) in (first..).zip(content.chunks(SECTOR as usize)) {
            if sector * SECTOR >= self.size {
                break;
            }
            let touched = || self.log.iter().any(|(range, _)| is_in(sector, range));
            // What was not made durable need not be there; the rest need.
            if !closed && touched() || !sound && touched() && self.is_shared(cluster) {
                self.tally.unjudged += 1;
                continue;
            }
            self.assert_expected(sector, found);
        }
    }

    /// Whether writes to other clusters may have gone where this one is.
    fn is_shared(&self, cluster: u64) -> bool {
        self.before.is_in_doubt(cluster, &self.audit)
    }

    /// How long the file may be now.
    pub(super) fn most_bytes(&self, old: u64, closed: bool) -> u64 {
        let used = old.div_ceil(self.cluster()).max(self.audit.end) << self.before.bits;
        let disk = match self.image.sparse {
            true => 0,
            false => self.size + (self.size >> 4),
        };
        // Clusters are reserved in batches, and the file grows in steps.
        let reserved = 64 * self.cluster() + (2 << 20) + if closed { 0 } else { 32 << 20 };
        used + 2 * (self.needed + disk) + reserved
    }
}

fn is_in(sector: u64, range: &Range<u64>) -> bool {
    range.contains(&(sector * SECTOR))
}

/// Carries out all at once.
async fn all(mut operations: Vec<Pending<'_>>) -> Vec<io::Result<()>> {
    let mut results: Vec<Option<io::Result<()>>> = operations.iter().map(|_| None).collect();
    poll_fn(|cx| {
        for (operation, result) in operations.iter_mut().zip(&mut results) {
            if result.is_none()
                && let Poll::Ready(done) = operation.as_mut().poll(cx)
            {
                *result = Some(done);
            }
        }
        match results.iter().all(Option::is_some) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    results.into_iter().flatten().collect()
}
