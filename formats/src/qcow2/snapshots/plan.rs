//! What the refcounts will be, and where what is new is to lie: in clusters that nothing uses,
//! neither now nor when the change is done.

use std::collections::BTreeMap;
use std::fs::File;

use super::super::check::refcounts::{PAGE, Refcounts};
use super::super::check::stored::{BlockPlace, Stored};
use super::super::check::{CheckError, too_many};
use super::super::entry::{Geometry, OFFSET_MASK};
use super::super::header::MAX_REFCOUNT_TABLE_BYTES;
use super::super::{Header, Refusal, refcount};
use super::write::write;

/// Refcounts to come.
pub(super) struct Plan<'a> {
    pub(super) geometry: Geometry,
    stored: &'a Stored,
    refcounts: Refcounts,
    /// Clusters that there can be: those of a block device, or as many as offsets can tell.
    most: u64,
    /// No cluster before it is free.
    cursor: u64,
    /// The refcount blocks that change, by their index, each with the cluster where the new one
    /// is to lie.
    blocks: BTreeMap<u64, u64>,
    /// Indexes of those that change but have no place yet.
    unplaced: Vec<u64>,
    /// First cluster and number of clusters of the refcount table to come.
    table: (u64, u64),
}

impl<'a> Plan<'a> {
    /// Begins with the refcounts as they are, all of which could be read. `device_len` is the
    /// length of the block device that the image lies in, if it does.
    pub(super) fn new(header: &Header, stored: &'a Stored, device_len: Option<u64>) -> Plan<'a> {
        let most = device_len.unwrap_or(OFFSET_MASK);
        Plan {
            geometry: Geometry::of(header),
            stored,
            refcounts: stored.refcounts().clone(),
            most: most >> header.cluster_bits,
            cursor: 1,
            blocks: BTreeMap::new(),
            unplaced: Vec::new(),
            table: (
                header.refcount_table_offset >> header.cluster_bits,
                header.refcount_table_clusters.into(),
            ),
        }
    }

    /// The refcount to come of the cluster that begins at `offset`.
    pub(super) fn refcount_at(&self, offset: u64) -> u64 {
        self.refcounts.load(offset >> self.geometry.cluster_bits)
    }

    /// Adds uses of clusters.
    pub(super) fn add(&mut self, uses: &Refcounts) -> Result<(), CheckError> {
        let most = self.geometry.max_refcount();
        each(uses, |cluster, count| {
            let users = self.refcounts.load(cluster);
            match users.checked_add(count).filter(|sum| *sum <= most) {
                Some(sum) => self.set(cluster, sum),
                None => Err(Refusal::new(format!(
                    "its refcounts of {} bits count {most} users of a cluster at most, and \
                     cluster {cluster} would have more",
                    1 << self.geometry.refcount_order
                ))
                .help("delete a snapshot, or convert it to an image with wider refcounts")
                .into()),
            }
        })
    }

    /// Takes uses of clusters away.
    pub(super) fn remove(&mut self, uses: &Refcounts) -> Result<(), CheckError> {
        each(uses, |cluster, count| self.release(cluster, count))
    }

    /// Takes one use of every cluster of a table away.
    pub(super) fn remove_table(&mut self, offset: u64, len: u64) -> Result<(), CheckError> {
        let bits = self.geometry.cluster_bits;
        for cluster in offset >> bits..(offset + len).div_ceil(1 << bits) {
            self.release(cluster, 1)?;
        }
        Ok(())
    }

    /// Takes `count` uses of a cluster away.
    pub(super) fn release(&mut self, cluster: u64, count: u64) -> Result<(), CheckError> {
        // An image that was found sound has no fewer.
        let left = self.refcounts.load(cluster).saturating_sub(count);
        self.set(cluster, left)
    }

    fn set(&mut self, cluster: u64, refcount: u64) -> Result<(), CheckError> {
        let block = cluster >> self.geometry.refcount_block_bits();
        if let std::collections::btree_map::Entry::Vacant(entry) = self.blocks.entry(block) {
            entry.insert(0);
            self.unplaced.push(block);
        }
        let stored = self.refcounts.store(cluster, refcount);
        stored.map_err(|_| too_many())
    }

    /// Finds a place for a table of `len` bytes, which will be used `uses` times. Returns its
    /// offset; 0 for a table of no length.
    pub(super) fn place(&mut self, len: u64, uses: u64) -> Result<u64, CheckError> {
        let count = len.div_ceil(self.geometry.cluster_size());
        if count == 0 {
            return Ok(0);
        }
        let first = self.find(count)?;
        for cluster in first..first + count {
            self.set(cluster, uses)?;
        }
        Ok(first << self.geometry.cluster_bits)
    }

    fn find(&mut self, count: u64) -> Result<u64, CheckError> {
        let free = |cluster| self.refcounts.load(cluster) == 0 && self.is_unused(cluster);
        let mut first = self.cursor;
        while !free(first) {
            first += 1;
        }
        let (start, mut end) = (first, first);
        while end - first < count {
            match free(end) {
                true => end += 1,
                false => {
                    end += 1;
                    first = end;
                }
            }
        }
        self.cursor = start;
        match end <= self.most {
            true => Ok(first),
            false => Err(std::io::Error::from(rustix::io::Errno::NOSPC).into()),
        }
    }

    /// Whether a cluster is free as the file is.
    fn is_unused(&self, cluster: u64) -> bool {
        self.stored.load(cluster) == Some(0)
    }

    /// Finds places for the refcounts themselves: a new table, and a new block for each that
    /// changes. The last step before anything is written.
    pub(super) fn settle(&mut self) -> Result<(), CheckError> {
        let bits = self.geometry.cluster_bits;
        let (old, old_len) = self.table;
        self.remove_table(old << bits, old_len << bits)?;
        let mut table = (0, 0);
        loop {
            while let Some(block) = self.unplaced.pop() {
                let place = self.place(1, 1)?;
                self.blocks.insert(block, place >> bits);
                let old = self.stored.place(self.geometry, block as usize);
                if let BlockPlace::At(old) = old {
                    self.release(old >> bits, 1)?;
                }
            }
            let entries = self.blocks.last_key_value().map_or(0, |last| last.0 + 1);
            let len = (entries * 8).div_ceil(1 << bits).max(old_len);
            if len << bits > MAX_REFCOUNT_TABLE_BYTES {
                return Err(Refusal::new(format!(
                    "its refcounts would need a table of {} bytes, expected at most \
                     {MAX_REFCOUNT_TABLE_BYTES}",
                    len << bits
                ))
                .help("convert it to an image with larger clusters")
                .into());
            }
            let (first, there) = table;
            if there >= len && self.unplaced.is_empty() {
                self.table = table;
                return Ok(());
            }
            if there < len {
                self.remove_table(first << bits, there << bits)?;
                table = (self.place(len << bits, 1)? >> bits, len);
            }
        }
    }

    /// Writes the new refcounts where nothing is.
    pub(super) fn write(&self, file: &File) -> Result<(), CheckError> {
        let geometry = self.geometry;
        let bits = geometry.cluster_bits;
        let (first, len) = self.table;
        let mut table = vec![0; (len << bits) as usize];
        for (to, entry) in table.chunks_exact_mut(8).zip(&self.stored.table) {
            to.copy_from_slice(&entry.to_be_bytes());
        }
        let mut block = vec![0; 1 << bits];
        for (index, place) in &self.blocks {
            let counted = index << geometry.refcount_block_bits();
            for at in 0..1usize << geometry.refcount_block_bits() {
                let value = self.refcounts.load(counted + at as u64);
                refcount::store(&mut block, geometry.refcount_order, at, value);
            }
            write(file, &block, place << bits)?;
            let at = *index as usize * 8;
            if let Some(to) = table.get_mut(at..at + 8) {
                to.copy_from_slice(&(place << bits).to_be_bytes());
            }
        }
        write(file, &table, first << bits)?;
        Ok(())
    }

    /// Tells the header where the refcount table is.
    pub(super) fn tell(&self, header: &mut Header) {
        header.refcount_table_offset = self.table.0 << self.geometry.cluster_bits;
        header.refcount_table_clusters = self.table.1 as u32;
    }

    /// Calls `freed` for the first and the number of neighbouring clusters that are used as the
    /// file is, but will not be.
    pub(super) fn each_freed(&self, mut freed: impl FnMut(u64, u64)) {
        let (mut first, mut count) = (0, 0);
        for page in self.refcounts.pages() {
            for cluster in page * PAGE..(page + 1) * PAGE {
                if self.refcounts.load(cluster) > 0 || self.is_unused(cluster) {
                    continue;
                }
                if cluster != first + count {
                    if count > 0 {
                        freed(first, count);
                    }
                    (first, count) = (cluster, 0);
                }
                count += 1;
            }
        }
        if count > 0 {
            freed(first, count);
        }
    }

    /// Where the last used cluster ends: as the file is, and when the change is done.
    pub(super) fn ends(&self) -> (u64, u64) {
        let (mut before, mut after) = (0, 0);
        for page in self.refcounts.pages() {
            for cluster in page * PAGE..(page + 1) * PAGE {
                if !self.is_unused(cluster) {
                    before = cluster + 1;
                }
                if self.refcounts.load(cluster) > 0 {
                    after = cluster + 1;
                }
            }
        }
        let bits = self.geometry.cluster_bits;
        (before << bits, after << bits)
    }
}

fn each(
    uses: &Refcounts,
    mut used: impl FnMut(u64, u64) -> Result<(), CheckError>,
) -> Result<(), CheckError> {
    for page in uses.pages() {
        for cluster in page * PAGE..(page + 1) * PAGE {
            match uses.load(cluster) {
                0 => {}
                count => used(cluster, count)?,
            }
        }
    }
    Ok(())
}
