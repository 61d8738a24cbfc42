//! Which host clusters are free, and handing them out.
//!
//! Clusters are reserved in batches: their refcounts are raised at once, so that handing one out
//! touches nothing. What is reserved and never used is given back when the image is closed; after
//! a crash it is leaked, which does no harm.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;

use rustix::io::Errno;

use super::entry::OFFSET_MASK;
use super::{Damage, Qcow2};

/// Bytes that are reserved at once.
const BATCH: u64 = 1 << 20;
/// The file grows by this many bytes at once, as a hole.
const GROWTH: u64 = 16 << 20;
/// Slices of refcounts that are looked through for free clusters before the file is grown.
const LOOKS: u32 = 16;
/// With so many bytes unlinked and not durably so, a commit makes them available.
const UNLINKED: u64 = 64 << 20;

/// Consecutive host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) count: u64,
    /// The host's bytes are known to be zeroes.
    pub(super) zero: bool,
}

impl Run {
    fn split_to(&mut self, count: u64) -> Run {
        let front = Run { count, ..*self };
        self.start += count;
        self.count -= count;
        front
    }
}

/// The free clusters, and those on their way to being free.
pub(super) struct Alloc {
    /// Reserved: the refcounts are 1, nothing refers to them.
    reserved: VecDeque<Run>,
    /// Nothing refers to them: the number of clusters, and whether they are zeroes.
    free: BTreeMap<u64, (u64, bool)>,
    /// Durably unlinked: free but for their refcounts, and for requests in flight, of that epoch
    /// and before, that may still use them.
    resting: VecDeque<(u64, Run)>,
    /// No longer referred to in memory; on the host they still are.
    unlinked: Vec<Run>,
    unlinked_count: u64,
    /// Clusters from here on have not been looked at in search of free ones.
    looked: u64,
    /// Clusters from here on are past everything that has ever been handed out.
    end: u64,
    /// Clusters from here on are zeroes for as long as they have not been handed out.
    fresh: u64,
    /// Clusters from here on cannot be.
    limit: u64,
}

impl Alloc {
    /// For a file of `end` clusters of `1 << bits` bytes; one that does not grow if it is a block
    /// device.
    pub(super) fn new(end: u64, bits: u32, device: bool) -> Self {
        Alloc {
            reserved: VecDeque::new(),
            free: BTreeMap::new(),
            resting: VecDeque::new(),
            unlinked: Vec::new(),
            unlinked_count: 0,
            looked: 0,
            end,
            fresh: end,
            limit: if device {
                end
            } else {
                (OFFSET_MASK >> bits) + 1
            },
        }
    }

    /// No cluster in use is past this one.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    pub(super) fn has_unlinked(&self) -> bool {
        !self.unlinked.is_empty()
    }

    /// Takes all that was unlinked so far.
    pub(super) fn take_unlinked(&mut self) -> Vec<Run> {
        self.unlinked_count = 0;
        std::mem::take(&mut self.unlinked)
    }

    /// It is not durably unlinked after all.
    pub(super) fn restore_unlinked(&mut self, runs: Vec<Run>) {
        self.unlinked_count += runs.iter().map(|run| run.count).sum::<u64>();
        self.unlinked.extend(runs);
    }

    /// Clusters that are referred to once less than their refcounts say, but maybe used by
    /// requests of `epoch` and before.
    pub(super) fn rest(&mut self, epoch: u64, runs: Vec<Run>) {
        self.resting
            .extend(runs.into_iter().map(|run| (epoch, run)));
    }

    fn take_reserved(&mut self, most: u64) -> Option<Run> {
        let run = self.reserved.front_mut()?;
        let taken = run.split_to(most.min(run.count));
        if run.count == 0 {
            self.reserved.pop_front();
        }
        Some(taken)
    }

    fn take_free(&mut self, most: u64) -> Option<Run> {
        let (start, (count, zero)) = self.free.pop_first()?;
        let mut run = Run { start, count, zero };
        let taken = run.split_to(most.min(count));
        if run.count > 0 {
            self.free.insert(run.start, (run.count, zero));
        }
        Some(taken)
    }

    /// Adds clusters whose refcounts have become 0.
    fn add_freed(&mut self, run: Run) {
        let clusters = run.start..run.start + run.count;
        // Those that are yet to be looked at are found then.
        let seen = clusters.start..clusters.end.min(self.looked);
        let past = clusters.start.max(self.fresh.max(self.looked))..clusters.end;
        for part in [seen, past] {
            if !part.is_empty() {
                self.add_free(Run {
                    start: part.start,
                    count: part.end - part.start,
                    zero: run.zero,
                });
            }
        }
    }

    fn add_free(&mut self, mut run: Run) {
        if let Some((start, (count, zero))) = self.free.range(..run.start).next_back()
            && start + count == run.start
            && *zero == run.zero
        {
            run.start = *start;
            run.count += count;
        }
        let after = run.start + run.count;
        if let Some((count, zero)) = self.free.get(&after).copied()
            && zero == run.zero
        {
            self.free.remove(&after);
            run.count += count;
        }
        self.free.insert(run.start, (run.count, run.zero));
    }

    /// Gives up free clusters at the end; returns how many clusters are left.
    pub(super) fn trim(&mut self) -> u64 {
        while let Some((start, (count, _))) = self.free.last_key_value().map(|(k, v)| (*k, *v))
            && start + count == self.end
        {
            self.free.pop_last();
            self.end = start;
        }
        self.end
    }
}

impl Qcow2 {
    /// Hands out up to `most` consecutive clusters, at least one, whose refcounts are 1.
    pub(super) async fn allocate(&self, most: u64) -> io::Result<Run> {
        loop {
            if let Some(run) = self.alloc.borrow_mut().take_reserved(most) {
                return Ok(run);
            }
            let _held = self.allocating.only().await;
            if self.alloc.borrow().reserved.is_empty() {
                let batch = (BATCH >> self.geometry.cluster_bits).max(1);
                self.reserve(most.max(batch)).await?;
            }
        }
    }

    /// Hands out `count` consecutive clusters for a table. Whoever calls this holds
    /// `allocating`.
    pub(super) async fn allocate_table(&self, count: u64) -> io::Result<Run> {
        let run = self.grow_or_find(count).await?;
        self.raise_or_return(run).await?;
        Ok(run)
    }

    /// `count` free clusters that lie together.
    async fn grow_or_find(&self, count: u64) -> io::Result<Run> {
        match self.grow(count, true).await {
            // A block device does not grow.
            Err(error) if is_full(&error) => self.find_run(count).await,
            result => result,
        }
    }

    /// Takes back clusters that were handed out and have not come to be used.
    pub(super) fn give_back(&self, run: Run) {
        let run = Run { zero: false, ..run };
        self.alloc.borrow_mut().reserved.push_front(run);
    }

    /// Nothing in memory refers to these clusters once more than it does.
    pub(super) fn unlink(&self, start: u64, count: u64) {
        let mut alloc = self.alloc.borrow_mut();
        alloc.unlinked_count += count;
        match alloc.unlinked.last_mut() {
            Some(last) if last.start + last.count == start => last.count += count,
            _ => alloc.unlinked.push(Run {
                start,
                count,
                zero: false,
            }),
        }
    }

    /// Makes unlinked clusters available if there are many of them.
    pub(super) async fn commit_if_many_unlinked(&self) -> io::Result<()> {
        let count = self.alloc.borrow().unlinked_count;
        match count << self.geometry.cluster_bits >= UNLINKED {
            true => self.commit().await,
            false => Ok(()),
        }
    }

    /// Adds up to `most` clusters to those that are reserved.
    async fn reserve(&self, most: u64) -> io::Result<()> {
        self.retire().await?;
        let found = match self.find(most).await? {
            Some(run) => run,
            None => match self.grow(most, false).await {
                Err(error) if is_full(&error) => self.find_last(most).await?,
                result => result?,
            },
        };
        self.raise_or_return(found).await?;
        self.alloc.borrow_mut().reserved.push_back(found);
        Ok(())
    }

    /// Finds free clusters among those that have been in use, or might have been.
    async fn find(&self, most: u64) -> io::Result<Option<Run>> {
        for _ in 0..LOOKS {
            if let Some(run) = self.alloc.borrow_mut().take_free(most) {
                return Ok(Some(run));
            }
            if !self.look().await? {
                break;
            }
        }
        Ok(self.alloc.borrow_mut().take_free(most))
    }

    /// Looks on for free clusters; false if everything has been looked at.
    async fn look(&self) -> io::Result<bool> {
        let (start, end) = {
            let alloc = self.alloc.borrow();
            // What lies further was handed out by us.
            (alloc.looked, alloc.fresh)
        };
        if start >= end {
            return Ok(false);
        }
        match self.find_free(start..end, u64::MAX >> 1).await? {
            Ok(clusters) => {
                self.check_free(&clusters).await?;
                let mut alloc = self.alloc.borrow_mut();
                alloc.looked = clusters.end;
                alloc.add_free(Run {
                    start: clusters.start,
                    count: clusters.end - clusters.start,
                    zero: false,
                });
            }
            Err(on) => self.alloc.borrow_mut().looked = on,
        }
        Ok(true)
    }

    /// Finds free clusters where the file cannot grow, whatever it takes.
    async fn find_last(&self, most: u64) -> io::Result<Run> {
        loop {
            if let Some(run) = self.alloc.borrow_mut().take_free(most) {
                return Ok(run);
            }
            if self.look().await? {
                continue;
            }
            if !self.alloc.borrow().has_unlinked() {
                return Err(Errno::NOSPC.into());
            }
            self.commit().await?;
        }
    }

    /// Finds `count` free clusters that lie together.
    async fn find_run(&self, count: u64) -> io::Result<Run> {
        while self.look().await? {}
        let mut alloc = self.alloc.borrow_mut();
        let found = alloc.free.iter().find(|(_, (has, _))| *has >= count);
        let Some((start, (has, zero))) = found.map(|(start, run)| (*start, *run)) else {
            return Err(Errno::NOSPC.into());
        };
        alloc.free.remove(&start);
        let mut run = Run {
            start,
            count: has,
            zero,
        };
        let taken = run.split_to(count);
        if run.count > 0 {
            alloc.free.insert(run.start, (run.count, zero));
        }
        Ok(taken)
    }

    /// Clusters at the end of the file: up to `count`, or exactly.
    async fn grow(&self, count: u64, exactly: bool) -> io::Result<Run> {
        loop {
            let (start, limit) = {
                let alloc = self.alloc.borrow();
                (alloc.end, alloc.limit)
            };
            if limit.saturating_sub(start) < if exactly { count } else { 1 } {
                return Err(Errno::NOSPC.into());
            }
            let most = count.min(limit - start);
            // Past the file's end too, clusters may have been leaked.
            let clusters = match self.find_free(start..start + most, most).await? {
                Err(on) => {
                    self.alloc.borrow_mut().end = on;
                    continue;
                }
                Ok(clusters) if clusters.start > start => {
                    self.alloc.borrow_mut().end = clusters.start;
                    continue;
                }
                Ok(clusters) => clusters,
            };
            let clusters = match exactly {
                true => match self.first_used(start..start + count).await? {
                    None => start..start + count,
                    Some(used) => {
                        self.alloc.borrow_mut().end = used + 1;
                        continue;
                    }
                },
                false => clusters,
            };
            self.check_free(&clusters).await?;
            self.extend_file(clusters.end).await?;
            let mut alloc = self.alloc.borrow_mut();
            alloc.end = clusters.end;
            return Ok(Run {
                start: clusters.start,
                count: clusters.end - clusters.start,
                zero: clusters.start >= alloc.fresh && !self.file.is_device(),
            });
        }
    }

    /// The first cluster that something refers to.
    async fn first_used(&self, clusters: Range<u64>) -> io::Result<Option<u64>> {
        let mut at = clusters.start;
        while at < clusters.end {
            match self.find_free(at..clusters.end, u64::MAX >> 1).await? {
                Ok(free) if free.start == at => at = free.end,
                _ => return Ok(Some(at)),
            }
        }
        Ok(None)
    }

    /// Makes the file at least so many clusters long.
    async fn extend_file(&self, clusters: u64) -> io::Result<()> {
        let len = clusters << self.geometry.cluster_bits;
        if len <= self.file.size() || self.file.is_device() {
            return Ok(());
        }
        let roomy = len.next_multiple_of(GROWTH.max(self.geometry.cluster_size()));
        match self.file.resize(roomy).await {
            // It may be as large as it can be.
            Err(_) if roomy > len => self.file.resize(len).await,
            result => result,
        }
    }

    /// What the refcounts say is free must not hold tables.
    async fn check_free(&self, clusters: &Range<u64>) -> io::Result<()> {
        if !self.places.borrow().overlap(clusters) {
            return Ok(());
        }
        let bits = self.geometry.cluster_bits;
        let damage = Damage(format!(
            "a cluster between {:#x} and {:#x} holds a table, but its refcount is 0",
            clusters.start << bits,
            clusters.end << bits
        ));
        Err(self.condemn(damage).await)
    }

    /// Sets the refcounts of free clusters to 1. After an error they are reserved, as far as that
    /// was done, or free.
    async fn raise_or_return(&self, run: Run) -> io::Result<()> {
        let mut left = run;
        let result = self.raise(&mut left, 0).await;
        if result.is_err() {
            let done = Run {
                count: run.count - left.count,
                ..run
            };
            if done.count > 0 {
                self.give_back(done);
            }
            self.alloc.borrow_mut().add_freed(Run {
                zero: false,
                ..left
            });
        }
        result
    }

    /// Sets the refcounts of free clusters to 1, and makes the blocks that hold them; those that
    /// are done leave the run. `ahead`: as for [`Qcow2::make_refcount_block`].
    async fn raise(&self, left: &mut Run, ahead: u64) -> io::Result<()> {
        while left.count > 0 {
            self.make_refcount_block(left.start, ahead).await?;
            self.set_refcount(left.start, 1).await?;
            left.split_to(1);
        }
        Ok(())
    }

    /// Makes the refcount block for a cluster, if there is none. That of its own cluster may be
    /// missing too. The refcount table is taken to have `ahead` entries, if it has fewer: it is
    /// about to move to where it has.
    ///
    /// A commit may begin whenever this waits, and after an error nothing is undone: so nothing
    /// refers to a block before the block is counted.
    async fn make_refcount_block(&self, cluster: u64, ahead: u64) -> io::Result<()> {
        let index = cluster >> self.geometry.refcount_block_bits();
        if index >= self.refcount_table.borrow().len().max(ahead) {
            Box::pin(self.grow_refcount_table(index + 1)).await?;
        }
        if self.refcount_table.borrow().at(index) & OFFSET_MASK != 0 {
            return Ok(());
        }
        let block = self.grow_or_find(1).await?;
        let used = self.use_refcount_block(index, block, ahead).await;
        if !matches!(used, Ok(true)) {
            let block = Run {
                zero: false,
                ..block
            };
            self.alloc.borrow_mut().add_freed(block);
        }
        used.map(drop)
    }

    /// Has the refcount table refer to a new block; false if there is one by then.
    async fn use_refcount_block(&self, index: u64, block: Run, ahead: u64) -> io::Result<bool> {
        let host = block.start << self.geometry.cluster_bits;
        if !block.zero {
            let len = self.geometry.cluster_size();
            self.file.write_zeroes(host, len, false).await?;
        }
        if block.start >> self.geometry.refcount_block_bits() == index {
            self.add_self_counting_block(block.start)?;
        } else {
            Box::pin(self.make_refcount_block(block.start, ahead)).await?;
            if self.refcount_table.borrow().at(index) & OFFSET_MASK != 0 {
                return Ok(false);
            }
            self.set_refcount(block.start, 1).await?;
        }
        self.places.borrow_mut().add(block.start..block.start + 1);
        self.refcount_table.borrow_mut().set(index, host);
        Ok(true)
    }

    /// Moves the refcount table to where it has room for `least` entries and then some. As a
    /// block, the table is counted before anything refers to it.
    async fn grow_refcount_table(&self, least: u64) -> io::Result<()> {
        let old = self.refcount_table.borrow().place();
        let cluster_size = self.geometry.cluster_size();
        let bytes = (least * 8).max(old.1 + old.1 / 2);
        // It may lie, and its blocks may, past all that it is to count.
        let past = self.alloc.borrow().end() + 2 * bytes.div_ceil(cluster_size) + 16;
        let bytes = bytes.max(((past >> self.geometry.refcount_block_bits()) + 1) * 8);
        let bytes = bytes.max(self.refcount_table.borrow_mut().extend_ahead(0) * 8);
        let clusters = bytes.div_ceil(cluster_size) + 1;
        if clusters * cluster_size > super::header::MAX_REFCOUNT_TABLE_BYTES {
            return Err(Errno::FBIG.into());
        }
        let new = self.grow_or_find(clusters).await?;
        let entries = clusters * cluster_size / 8;
        let ahead = self.refcount_table.borrow_mut().extend_ahead(entries);
        let mut left = new;
        self.raise(&mut left, ahead).await?;
        if self.refcount_table.borrow().place() != old {
            // It had to grow further on the way, and has moved.
            self.give_back(new);
            return Ok(());
        }
        self.places
            .borrow_mut()
            .add(new.start..new.start + clusters);
        let offset = new.start << self.geometry.cluster_bits;
        self.refcount_table.borrow_mut().relocate(offset, entries);
        self.unlink_table(old.0, old.1);
        Ok(())
    }

    /// A table of the first level has moved away from here.
    pub(super) fn unlink_table(&self, offset: u64, len: u64) {
        let start = offset >> self.geometry.cluster_bits;
        let count = len.div_ceil(self.geometry.cluster_size());
        self.places.borrow_mut().remove(&(start..start + count));
        self.unlink(start, count);
    }

    /// Takes durably unlinked clusters' references away, as soon as no request in flight can use
    /// them any more, and has the host free those that are left without any.
    pub(super) async fn retire(&self) -> io::Result<()> {
        if self.alloc.borrow().resting.is_empty() {
            return Ok(());
        }
        let _held = self.retiring.only().await;
        loop {
            let next = {
                let mut alloc = self.alloc.borrow_mut();
                match alloc.resting.front() {
                    Some((epoch, _)) if self.epochs.is_over(*epoch) => alloc.resting.pop_front(),
                    _ => None,
                }
            };
            let Some((epoch, mut run)) = next else {
                return Ok(());
            };
            // What was decompressed from there is not to be found there again.
            self.decoded.borrow_mut().clear();
            if let Err(error) = self.release(&mut run).await {
                if run.count > 0 {
                    self.alloc.borrow_mut().resting.push_front((epoch, run));
                }
                return Err(error);
            }
        }
    }

    /// Takes one reference to each cluster away; those that are done leave the run.
    async fn release(&self, run: &mut Run) -> io::Result<()> {
        while run.count > 0 {
            let (at, end) = (run.start, run.start + run.count);
            let refcount = self.refcount(at).await?;
            if refcount == 0 {
                run.split_to(1);
                let offset = at << self.geometry.cluster_bits;
                let damage = Damage(format!(
                    "the cluster at {offset:#x} was in use, but its refcount is 0"
                ));
                return Err(self.condemn(damage).await);
            }
            let mut next = at + 1;
            while next < end && self.refcount(next).await? == refcount {
                next += 1;
            }
            // As long as the refcount says so nobody takes it, and what is punched is nobody's.
            let zero = refcount == 1 && self.punch(at..next).await;
            while run.start < next {
                self.set_refcount(run.start, refcount - 1).await?;
                // At once, or else whoever looks for free clusters meanwhile finds it as well.
                let freed = run.split_to(1);
                if refcount == 1 {
                    self.alloc.borrow_mut().add_freed(Run { zero, ..freed });
                }
            }
        }
        Ok(())
    }

    /// Has the host free clusters; whether they are zeroes then.
    async fn punch(&self, clusters: Range<u64>) -> bool {
        let bits = self.geometry.cluster_bits;
        let (offset, len) = (
            clusters.start << bits,
            (clusters.end - clusters.start) << bits,
        );
        let punched = self.sparse && self.file.discard(offset, len).await.is_ok();
        punched && !self.file.is_device()
    }

    /// Gives back what is reserved, before the image is closed.
    pub(super) async fn release_reserved(&self) -> io::Result<()> {
        loop {
            let Some(run) = self.alloc.borrow_mut().reserved.pop_front() else {
                return Ok(());
            };
            for cluster in run.start..run.start + run.count {
                self.set_refcount(cluster, 0).await?;
            }
            self.alloc.borrow_mut().add_freed(run);
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOSPC)
}
