//! The refcounts of an image that is being filled: blocks of them are written when they are
//! complete, their table comes last.

use std::io;
use std::os::unix::fs::FileExt;

use super::Packer;
use crate::qcow2::refcount;

impl Packer {
    /// Writes the refcount blocks that are complete: nothing comes before `end` any more.
    pub(super) fn write_complete_counts(&mut self) -> io::Result<()> {
        let block_bits = self.geometry.refcount_block_bits();
        while self.end >> self.geometry.cluster_bits >= (self.counted + 1) << block_bits {
            while self.blocks.len() as u64 <= self.counted {
                let block = self.append(1)?;
                self.blocks.push(block);
            }
            let rest = self.counts.split_off(1 << block_bits);
            let complete = std::mem::replace(&mut self.counts, rest);
            self.write_counts(self.counted, &complete)?;
            self.counted += 1;
        }
        Ok(())
    }

    /// Writes all that is not written yet. Returns the table's offset and number of clusters.
    pub(super) fn write_refcounts(&mut self) -> io::Result<(u64, u64)> {
        self.place_refcounts()?;
        let a_block = 1 << self.geometry.refcount_block_bits();
        self.write_counts(0, &self.first_counts)?;
        for (number, counts) in (self.counted..).zip(self.counts.chunks(a_block)) {
            self.write_counts(number, counts)?;
        }
        self.write_numbers(self.refcount_table.0, &self.blocks)?;
        Ok(self.refcount_table)
    }

    /// Finds places for the refcount blocks that are missing, and for a longer table of them if
    /// there must be one. All of these are counted themselves.
    fn place_refcounts(&mut self) -> io::Result<()> {
        let bits = self.geometry.cluster_bits;
        loop {
            let needed = (self.end >> bits).div_ceil(1 << self.geometry.refcount_block_bits());
            if (self.blocks.len() as u64) < needed {
                let block = self.append(1)?;
                self.blocks.push(block);
                continue;
            }
            let clusters = (self.blocks.len() as u64 * 8).div_ceil(self.cluster_size());
            if clusters <= self.refcount_table.1 {
                break;
            }
            // With room for what it takes to count the table itself.
            let clusters = clusters + 1;
            let old = self.refcount_table;
            self.refcount_table = (self.append(clusters)?, clusters);
            self.count(old.0 >> bits, old.1, 0)?;
        }
        // All that there are clusters for must be there, to be written.
        let block_bits = self.geometry.refcount_block_bits();
        let rest = (self.blocks.len() as u64).saturating_sub(self.counted) << block_bits;
        self.counts.resize(rest as usize, 0);
        Ok(())
    }

    /// Raises the refcounts of clusters by one; with `by` 0, sets them to 0.
    pub(super) fn count(&mut self, first: u64, clusters: u64, by: u16) -> io::Result<()> {
        let block_bits = self.geometry.refcount_block_bits();
        for cluster in first..first + clusters {
            let counts = match cluster >> block_bits {
                0 => &mut self.first_counts,
                _ => &mut self.counts,
            };
            let at = match cluster >> block_bits {
                0 => Some(cluster),
                _ => cluster.checked_sub(self.counted << block_bits),
            };
            let at = at.ok_or(io::ErrorKind::InvalidInput)? as usize;
            if at >= counts.len() {
                counts.resize((at + 1).next_multiple_of(1 << block_bits), 0);
            }
            counts[at] = if by == 0 { 0 } else { counts[at] + by };
        }
        Ok(())
    }

    pub(super) fn count_of(&self, cluster: u64) -> u16 {
        let block_bits = self.geometry.refcount_block_bits();
        let found = match cluster >> block_bits {
            0 => self.first_counts.get(cluster as usize),
            _ => cluster
                .checked_sub(self.counted << block_bits)
                .and_then(|at| self.counts.get(at as usize)),
        };
        found.copied().unwrap_or(0)
    }

    /// Writes one refcount block.
    fn write_counts(&self, number: u64, counts: &[u16]) -> io::Result<()> {
        let Some(offset) = self.blocks.get(number as usize) else {
            return Ok(());
        };
        let mut bytes = vec![0; self.cluster_size() as usize];
        for (index, count) in counts.iter().enumerate() {
            let order = self.geometry.refcount_order;
            refcount::store(&mut bytes, order, index, (*count).into());
        }
        self.file.write_all_at(&bytes, *offset)
    }
}
