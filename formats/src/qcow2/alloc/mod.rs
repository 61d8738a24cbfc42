//! Which host clusters are free, and handing them out.
//!
//! Clusters are reserved in batches: their refcounts are raised at once, so that handing one out
//! touches nothing. What is reserved and never used is given back when the image is closed; after
//! a crash it is leaked, which does no harm.

mod blocks;
mod retire;
mod search;

use std::collections::{BTreeMap, VecDeque};

use super::entry::OFFSET_MASK;

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
