//! Handing clusters out: where they are found.

use std::io;
use std::ops::Range;

use rustix::io::Errno;

use super::super::{Damage, Qcow2};
use super::Run;

/// Bytes that are reserved at once.
const BATCH: u64 = 1 << 20;
/// The file grows by this many bytes at once, as a hole.
const GROWTH: u64 = 16 << 20;
/// Slices of refcounts that are looked through for free clusters before the file is grown.
const LOOKS: u32 = 16;

impl Qcow2 {
    /// Hands out up to `most` consecutive clusters, at least one, whose refcounts are 1.
    pub(in crate::qcow2) async fn allocate(&self, most: u64) -> io::Result<Run> {
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
    pub(in crate::qcow2) async fn allocate_table(&self, count: u64) -> io::Result<Run> {
        self.alloc.borrow_mut().recall();
        let run = self.grow_or_find(count).await?;
        self.raise_or_return(run).await?;
        Ok(run)
    }

    /// `count` free clusters that lie together.
    pub(super) async fn grow_or_find(&self, count: u64) -> io::Result<Run> {
        match self.grow(count, true).await {
            // A block device does not grow.
            Err(error) if is_full(&error) => self.find_run(count).await,
            result => result,
        }
    }

    /// Takes back clusters that were handed out and have not come to be used.
    pub(in crate::qcow2) fn give_back(&self, run: Run) {
        let run = Run { zero: false, ..run };
        self.alloc.borrow_mut().reserved.push_front(run);
    }

    /// Adds up to `most` clusters to those that are reserved.
    async fn reserve(&self, most: u64) -> io::Result<()> {
        self.retire().await;
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
            if !self.look().await? && !self.alloc.borrow_mut().recall() {
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
        let mut committed = false;
        loop {
            if let Some(run) = self.alloc.borrow_mut().take_free(most) {
                return Ok(run);
            }
            if self.look().await? || self.alloc.borrow_mut().recall() {
                continue;
            }
            if !self.reclaim(&mut committed).await? {
                return Err(Errno::NOSPC.into());
            }
        }
    }

    /// Waits for clusters that are on their way to being free; false if there are none.
    /// `committed`: a commit that had begun before was waited for.
    ///
    /// Whoever calls this holds locks, and waits for requests in flight: these never wait for the
    /// locks of somebody who allocates, and who allocates is not one of them (see `epochs`).
    async fn reclaim(&self, committed: &mut bool) -> io::Result<bool> {
        let resting = self.alloc.borrow().resting.front().map(|(at, _)| *at);
        if let Some(epoch) = resting
            && !self.condemned.get()
        {
            self.epochs.over(epoch).await;
            self.try_retire().await?;
            return Ok(true);
        }
        if self.retiring.is_held() {
            drop(self.retiring.only().await);
            return Ok(true);
        }
        // A commit under way has what was unlinked, and hands it on when it is done.
        let under_way = self.committing.is_held() && !std::mem::replace(committed, true);
        if self.alloc.borrow().has_unlinked() || under_way {
            self.commit().await?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Finds `count` free clusters that lie together.
    async fn find_run(&self, count: u64) -> io::Result<Run> {
        let mut committed = false;
        loop {
            while self.look().await? {}
            if let Some(run) = self.alloc.borrow_mut().take_exactly(count) {
                return Ok(run);
            }
            if !self.reclaim(&mut committed).await? {
                return Err(Errno::NOSPC.into());
            }
        }
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
    pub(super) async fn check_free(&self, clusters: &Range<u64>) -> io::Result<()> {
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
}

fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOSPC)
}
