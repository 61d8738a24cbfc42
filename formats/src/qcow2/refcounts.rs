//! Refcounts: how many times each host cluster is referred to.

use std::io;
use std::ops::Range;
use std::rc::Rc;

use super::Qcow2;
use super::entry::OFFSET_MASK;
use super::join::Join;
use super::refcount;
use super::slices::to_write;
use crate::Buffer;

impl Qcow2 {
    /// log2 of how many refcounts a slice holds.
    fn refcount_slice_bits(&self) -> u32 {
        self.slice_bits + 3 - self.geometry.refcount_order
    }

    fn refcount_slice(&self, cluster: u64) -> u64 {
        cluster >> self.refcount_slice_bits()
    }

    /// Where a slice of refcounts lies in the file; `None` if there is no block for it, and all
    /// are 0.
    fn refcount_slice_offset(&self, slice: u64) -> Option<u64> {
        let within = self.geometry.cluster_bits - self.slice_bits;
        let block = self.refcount_table.borrow().at(slice >> within) & OFFSET_MASK;
        let offset = (slice & ((1 << within) - 1)) << self.slice_bits;
        (block != 0).then_some(block + offset)
    }

    /// Reads a slice of refcounts into memory; false if there is none.
    async fn load_refcounts(&self, slice: u64) -> io::Result<bool> {
        if self.refcounts.borrow().contains(slice) {
            return Ok(true);
        }
        let _held = self.loading_refcounts.lock(slice..slice + 1).await;
        if self.refcounts.borrow().contains(slice) {
            return Ok(true);
        }
        let Some(offset) = self.refcount_slice_offset(slice) else {
            return Ok(false);
        };
        if !self.refcounts.borrow_mut().make_room() {
            self.write_refcounts().await?;
            self.refcounts.borrow_mut().make_room();
        }
        let bytes = self.read_metadata(offset).await?;
        self.refcounts.borrow_mut().insert(slice, bytes);
        Ok(true)
    }

    /// Writes the refcounts that have changed. They may always be written as they are: an
    /// increase long before what it is for, a decrease only after its cluster was durably
    /// unlinked.
    pub(super) async fn write_refcounts(&self) -> io::Result<()> {
        let _held = self.writing_refcounts.only().await;
        let dirty = self.refcounts.borrow_mut().take_dirty();
        let placed = dirty.iter().filter_map(|dirty| {
            let offset = self.refcount_slice_offset(dirty.number)?;
            Some((offset, dirty.bytes.clone()))
        });
        let result = self.write_metadata(placed.collect()).await;
        let numbers = dirty.iter().map(|dirty| dirty.number);
        self.refcounts.borrow_mut().settle(numbers, result.is_ok());
        result
    }

    /// The refcount of a cluster.
    pub(super) async fn refcount(&self, cluster: u64) -> io::Result<u64> {
        let slice = self.refcount_slice(cluster);
        loop {
            if let Some(bytes) = self.refcounts.borrow().bytes(slice) {
                return Ok(self.refcount_in(bytes, cluster));
            }
            if !self.load_refcounts(slice).await? {
                return Ok(0);
            }
        }
    }

    fn refcount_in(&self, bytes: &[u8], cluster: u64) -> u64 {
        let index = (cluster & ((1 << self.refcount_slice_bits()) - 1)) as usize;
        refcount::load(bytes, self.geometry.refcount_order, index)
    }

    /// Counts a new refcount block, all zeroes, that lies in a cluster that it counts itself: its
    /// slice is in memory from now on, with the refcount 1 for that cluster.
    pub(super) fn add_self_counting_block(&self, cluster: u64) -> io::Result<()> {
        let slice = self.refcount_slice(cluster);
        let index = (cluster & ((1 << self.refcount_slice_bits()) - 1)) as usize;
        let len = 1 << self.slice_bits;
        let zeroes = Buffer::zeroed(len, len)?;
        let mut refcounts = self.refcounts.borrow_mut();
        refcounts.make_room();
        refcounts.insert(slice, zeroes);
        if let Some(bytes) = refcounts.bytes_mut(slice)? {
            refcount::store(bytes, self.geometry.refcount_order, index, 1);
        }
        Ok(())
    }

    /// Sets the refcount of a cluster whose block is there.
    pub(super) async fn set_refcount(&self, cluster: u64, refcount: u64) -> io::Result<()> {
        let slice = self.refcount_slice(cluster);
        let index = (cluster & ((1 << self.refcount_slice_bits()) - 1)) as usize;
        loop {
            if let Some(bytes) = self.refcounts.borrow_mut().bytes_mut(slice)? {
                refcount::store(bytes, self.geometry.refcount_order, index, refcount);
                return Ok(());
            }
            if !self.load_refcounts(slice).await? {
                return Err(io::Error::other("a cluster has no refcount block"));
            }
        }
    }

    /// Among `clusters`, the first ones that nothing refers to: of one slice, at most `most`.
    /// `Err` says where to look on.
    pub(super) async fn find_free(
        &self,
        clusters: Range<u64>,
        most: u64,
    ) -> io::Result<Result<Range<u64>, u64>> {
        let slice = self.refcount_slice(clusters.start);
        let end = ((slice + 1) << self.refcount_slice_bits()).min(clusters.end);
        loop {
            if let Some(bytes) = self.refcounts.borrow().bytes(slice) {
                let free = |cluster: &u64| self.refcount_in(bytes, *cluster) == 0;
                let Some(first) = (clusters.start..end).find(free) else {
                    return Ok(Err(end));
                };
                let last = end.min(first + most);
                let count = (first..last).take_while(free).count() as u64;
                return Ok(Ok(first..first + count));
            }
            if !self.load_refcounts(slice).await? {
                return Ok(Ok(clusters.start..end.min(clusters.start + most)));
            }
        }
    }

    /// Writes pieces of metadata, those that are neighbours at once.
    pub(super) async fn write_metadata(
        &self,
        mut pieces: Vec<(u64, Rc<Buffer>)>,
    ) -> io::Result<()> {
        /// Pieces of one write: as many as a system call takes, at most.
        const MOST: usize = 256;
        pieces.sort_unstable_by_key(|(offset, _)| *offset);
        let mut writes = Join::default();
        let mut pieces = pieces.into_iter().peekable();
        while let Some((offset, first)) = pieces.next() {
            let mut end = offset + first.len() as u64;
            let mut buffers = vec![first];
            while buffers.len() < MOST
                && let Some((_, next)) = pieces.next_if(|(offset, _)| *offset == end)
            {
                end += next.len() as u64;
                buffers.push(next);
            }
            writes.add(Box::pin(self.file.write(offset, to_write(buffers))));
        }
        writes.await
    }
}
