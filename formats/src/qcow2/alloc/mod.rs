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

/// Runs of free clusters that are kept in mind; few enough in tests that they come to it.
const MOST_FREE: usize = if cfg!(test) { 32 } else { 1 << 16 };

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
    /// The first of the free clusters that there was no room for in `free`.
    forgotten: Option<u64>,
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
            forgotten: None,
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
        if self.free.len() > MOST_FREE
            && let Some((start, _)) = self.free.pop_last()
        {
            let first = self.forgotten.unwrap_or(start);
            self.forgotten = Some(first.min(start));
        }
    }

    /// Has what was forgotten looked for again; false if nothing was. All clusters that have been
    /// found and not yet counted must be in `free`: they would be found again.
    fn recall(&mut self) -> bool {
        let Some(forgotten) = self.forgotten.take() else {
            return false;
        };
        // What lies further is forgotten as a whole, so that nothing is found twice.
        let start = match self.looked < self.fresh {
            true => forgotten.min(self.looked),
            false => forgotten,
        };
        self.free.split_off(&start);
        self.looked = start;
        self.fresh = self.fresh.max(self.end);
        true
    }

    /// `count` free clusters that lie together.
    fn take_exactly(&mut self, count: u64) -> Option<Run> {
        let found = self.free.iter().find(|(_, (has, _))| *has >= count);
        let (start, (has, zero)) = found.map(|(start, run)| (*start, *run))?;
        self.free.remove(&start);
        let mut run = Run {
            start,
            count: has,
            zero,
        };
        let taken = run.split_to(count);
        if run.count > 0 {
            self.free.insert(run.start, (run.count, zero));
        }
        Some(taken)
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

#[cfg(test)]
mod tests {
    use super::*;

    const END: u64 = 1000;

    /// All clusters are known to be in use, but for those of `free`.
    fn alloc(free: impl IntoIterator<Item = u64>) -> Alloc {
        let mut alloc = Alloc::new(END, 16, false);
        alloc.looked = END;
        for start in free {
            let (count, zero) = (1, false);
            alloc.add_freed(Run { start, count, zero });
        }
        alloc
    }

    fn free(alloc: &Alloc) -> Vec<(u64, u64)> {
        let run = |(start, (count, _)): (&u64, &(u64, bool))| (*start, *count);
        alloc.free.iter().map(run).collect()
    }

    #[test]
    fn neighbours_that_become_free_are_one_run() {
        let alloc = alloc([4, 6, 5, 9]);
        assert_eq!(free(&alloc), [(4, 3), (9, 1)]);
    }

    #[test]
    fn runs_that_there_is_no_room_for_are_looked_for_again() {
        let every_other = (0..END).step_by(2);
        let mut alloc = alloc(every_other.clone());
        assert_eq!(alloc.free.len(), MOST_FREE);
        let kept = 2 * MOST_FREE as u64;
        assert!(alloc.free.keys().copied().eq((0..kept).step_by(2)));
        assert!(alloc.recall());
        assert_eq!((alloc.looked, alloc.fresh), (kept, END));
        // What becomes free there meanwhile is found then.
        let (start, count, zero) = (kept + 1, 1, false);
        alloc.add_freed(Run { start, count, zero });
        assert_eq!(alloc.free.len(), MOST_FREE);
        assert!(!alloc.recall());
    }

    #[test]
    fn what_is_looked_for_again_is_known_no_more() {
        let mut alloc = alloc([]);
        // Half of the old clusters are known, and some that have been handed out since.
        alloc.looked = END / 2;
        alloc.end = END + 500;
        let old = (0..20).step_by(2);
        for start in old.chain((END..END + 500).step_by(2)) {
            let (count, zero) = (1, true);
            alloc.add_freed(Run { start, count, zero });
        }
        assert_eq!(alloc.free.len(), MOST_FREE);
        assert!(alloc.recall());
        assert_eq!((alloc.looked, alloc.fresh), (END / 2, END + 500));
        assert!(alloc.free.keys().copied().eq((0..20).step_by(2)));
    }
}
