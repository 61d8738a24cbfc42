//! The refcounts that an image has stored (qcow2 specification, "Host cluster management").

use std::collections::BTreeSet;
use std::fs::File;

use super::super::entry::Geometry;
use super::super::refcount;
use super::super::{Header, header::be64};
use super::refcounts::Refcounts;
use super::{CheckError, io, too_many};

/// Bits of an entry of the refcount table that are the offset of a block.
const OFFSET_MASK: u64 = !0x1ff;

pub(in super::super) struct Stored {
    /// The refcount table as it is.
    pub(in super::super) table: Vec<u64>,
    refcounts: Refcounts,
    /// Blocks that cannot be read, by their index in the table.
    pub(in super::super) unreadable: BTreeSet<u64>,
    block_bits: u32,
}

/// What an entry of the refcount table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum BlockPlace {
    None,
    At(u64),
    Unaligned(u64),
}

impl Stored {
    /// Nothing at all.
    pub(in super::super) fn none(header: &Header) -> Stored {
        Stored {
            table: Vec::new(),
            refcounts: Refcounts::default(),
            unreadable: BTreeSet::new(),
            block_bits: Geometry::of(header).refcount_block_bits(),
        }
    }

    /// Reads the refcount table and all of its blocks.
    pub(in super::super) fn read(file: &File, header: &Header) -> Result<Stored, CheckError> {
        let geometry = Geometry::of(header);
        let table_len = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let mut table = vec![0; table_len as usize];
        io::read_padded(file, header.refcount_table_offset, &mut table)?;
        let mut stored = Stored::none(header);
        stored.table = table.chunks(8).map(|entry| be64(entry, 0)).collect();
        let mut block = vec![0; header.cluster_size() as usize];
        for index in 0..stored.table.len() {
            match stored.place(geometry, index) {
                BlockPlace::None => continue,
                BlockPlace::Unaligned(_) => {
                    stored.unreadable.insert(index as u64);
                }
                // No file is that long.
                BlockPlace::At(offset) if offset > i64::MAX as u64 => {
                    stored.unreadable.insert(index as u64);
                }
                BlockPlace::At(offset) => match io::read_table(file, offset, &mut block) {
                    Ok(false) => continue,
                    Ok(true) => stored.take(geometry, index as u64, &block)?,
                    Err(_) => {
                        stored.unreadable.insert(index as u64);
                    }
                },
            }
        }
        Ok(stored)
    }

    /// Where the block of an entry of the table is said to be.
    pub(in super::super) fn place(&self, geometry: Geometry, index: usize) -> BlockPlace {
        match self.table.get(index).map_or(0, |entry| entry & OFFSET_MASK) {
            0 => BlockPlace::None,
            offset if geometry.in_cluster(offset) != 0 => BlockPlace::Unaligned(offset),
            offset => BlockPlace::At(offset),
        }
    }

    fn take(&mut self, geometry: Geometry, index: u64, block: &[u8]) -> Result<(), CheckError> {
        let order = geometry.refcount_order;
        // Most of a block is often empty.
        for (at, part) in block.chunks(512).enumerate() {
            if part.iter().all(|byte| *byte == 0) {
                continue;
            }
            let refcounts = 512usize << 3 >> order;
            let first = (index << self.block_bits) + (at * refcounts) as u64;
            for index in 0..refcounts {
                let value = refcount::load(part, order, index);
                let stored = self.refcounts.store(first + index as u64, value);
                stored.map_err(|_| too_many())?;
            }
        }
        Ok(())
    }

    /// The refcount of a cluster; `None` if its block cannot be read.
    pub(in super::super) fn load(&self, cluster: u64) -> Option<u64> {
        match !self.unreadable.is_empty() && self.unreadable.contains(&(cluster >> self.block_bits))
        {
            true => None,
            false => Some(self.refcounts.load(cluster)),
        }
    }

    /// All refcounts, for an image whose blocks can all be read.
    pub(in super::super) fn refcounts(&self) -> &Refcounts {
        &self.refcounts
    }

    pub(in super::super) fn pages(&self) -> impl Iterator<Item = u64> {
        self.refcounts.pages()
    }

    /// The clusters that a block of the table counts.
    pub(in super::super) fn counted_by(&self, index: u64) -> std::ops::Range<u64> {
        index << self.block_bits..(index + 1) << self.block_bits
    }
}
