//! What the image no longer refers to, on its way to being free: unlinked in memory, durably so
//! by a commit, resting until no request in flight can use it, and then no longer counted.

use std::io;
use std::ops::Range;

use super::super::{Damage, Qcow2};
use super::Run;

/// With so many bytes unlinked and not durably so, a commit makes them available.
const UNLINKED: u64 = 64 << 20;

impl Qcow2 {
    /// Nothing in memory refers to these clusters once more than it does.
    pub(in crate::qcow2) fn unlink(&self, start: u64, count: u64) {
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

    /// A table of the first level has moved away from here.
    pub(in crate::qcow2) fn unlink_table(&self, offset: u64, len: u64) {
        let start = offset >> self.geometry.cluster_bits;
        let count = len.div_ceil(self.geometry.cluster_size());
        self.places.borrow_mut().remove(&(start..start + count));
        self.unlink(start, count);
    }

    /// Makes unlinked clusters available if there are many of them.
    pub(in crate::qcow2) async fn commit_if_many_unlinked(&self) -> io::Result<()> {
        let count = self.alloc.borrow().unlinked_count;
        match count << self.geometry.cluster_bits >= UNLINKED {
            true => self.commit().await,
            false => Ok(()),
        }
    }

    /// Takes durably unlinked clusters' references away, as soon as no request in flight can use
    /// them any more, and has the host free those that are left without any.
    ///
    /// Nobody's data hangs on this. What fails is logged, once until it succeeds, and tried again
    /// the next time; what never succeeds is leaked.
    pub(in crate::qcow2) async fn retire(&self) {
        if self.alloc.borrow().resting.is_empty() {
            return;
        }
        let result = self.try_retire().await;
        let failed = result.is_err();
        if let Err(error) = result
            && !self.retire_failed.get()
        {
            let path = self.file.path().display();
            tracing::warn!("clusters of `{path}` that are not in use could not be freed: {error}");
        }
        self.retire_failed.set(failed);
    }

    /// As [`Qcow2::retire`], with the first error; what is left then goes on resting.
    pub(in crate::qcow2) async fn try_retire(&self) -> io::Result<()> {
        let _held = self.retiring.only().await;
        while !self.condemned.get() {
            let next = {
                let mut alloc = self.alloc.borrow_mut();
                match alloc.resting.front() {
                    Some((epoch, _)) if self.epochs.is_over(*epoch) => alloc.resting.pop_front(),
                    _ => None,
                }
            };
            let Some((epoch, mut run)) = next else { break };
            // What was decompressed from there is not to be found there again.
            self.decoded.borrow_mut().clear();
            if let Err(error) = self.release(&mut run).await {
                if run.count > 0 {
                    self.alloc.borrow_mut().resting.push_front((epoch, run));
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes one reference to each cluster away; those that are done leave the run.
    async fn release(&self, run: &mut Run) -> io::Result<()> {
        while run.count > 0 {
            let (at, end) = (run.start, run.start + run.count);
            // A table has left its place before that is released.
            if self.places.borrow().overlap(&(at..end)) {
                run.split_to(run.count);
                let bits = self.geometry.cluster_bits;
                let damage = Damage(format!(
                    "a cluster between {:#x} and {:#x} was in use for data, but holds a table",
                    at << bits,
                    end << bits
                ));
                return Err(self.condemn(damage).await);
            }
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
        let frees = self.sparse || self.giving_back.get();
        let punched = frees && self.file.discard(offset, len).await.is_ok();
        punched && !self.file.is_device()
    }

    /// Gives back what is reserved, before the image is closed.
    pub(in crate::qcow2) async fn release_reserved(&self) -> io::Result<()> {
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
