//! Counting what is handed out: refcount blocks that are made, and the refcount table that grows.

use std::io;

use rustix::io::Errno;

use super::super::Qcow2;
use super::super::entry::OFFSET_MASK;
use super::super::header::MAX_REFCOUNT_TABLE_BYTES;
use super::Run;

impl Qcow2 {
    /// Sets the refcounts of free clusters to 1. After an error they are reserved, as far as that
    /// was done, or free.
    pub(super) async fn raise_or_return(&self, run: Run) -> io::Result<()> {
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

    /// Frees a run whose refcounts were raised but for those of `left`. It is not reserved: the
    /// blocks that count it may be ahead of the table's place, where they count for nobody else.
    async fn lower(&self, run: Run, left: Run) {
        for start in run.start..left.start {
            if self.set_refcount(start, 0).await.is_err() {
                // What cannot be freed is leaked.
                continue;
            }
            let (count, zero) = (1, false);
            self.alloc
                .borrow_mut()
                .add_freed(Run { start, count, zero });
        }
        if left.count > 0 {
            let left = Run {
                zero: false,
                ..left
            };
            self.alloc.borrow_mut().add_freed(left);
        }
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
        if clusters * cluster_size > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Errno::FBIG.into());
        }
        let new = self.grow_or_find(clusters).await?;
        let entries = clusters * cluster_size / 8;
        let ahead = self.refcount_table.borrow_mut().extend_ahead(entries);
        let mut left = new;
        if let Err(error) = self.raise(&mut left, ahead).await {
            self.lower(new, left).await;
            return Err(error);
        }
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
}
