//! Counting what L2 tables point to.

use super::super::entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use super::super::header::be64;
use super::report::ProblemKind;
use super::walk::{ACTIVE, Walk};
use super::{CheckError, io};

/// Bits of standard L2 entries that must be 0.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// How often L1 tables point to an L2 table.
#[derive(Clone, Copy)]
struct Uses {
    active: u64,
    all: u64,
}

impl Walk<'_> {
    /// Counts what the L2 tables point to that were met since the last time, each table once
    /// however many L1 tables share it.
    pub(super) fn count_l2(&mut self) -> Result<(), CheckError> {
        let mut tables = std::mem::take(&mut self.tables);
        tables.sort_unstable();
        let total = self.tables_done + tables.len() as u64;
        let mut table = vec![0; self.geometry.cluster_size() as usize];
        for same in tables.chunk_by(|one, other| one & !ACTIVE == other & !ACTIVE) {
            (self.progress)(self.tables_done, total);
            self.tables_done += same.len() as u64;
            let Some(offset) = same.first().map(|first| first & !ACTIVE) else {
                continue;
            };
            let uses = Uses {
                active: same.iter().map(|it| it & ACTIVE).sum(),
                all: same.len() as u64,
            };
            match io::read_table(self.file, offset, &mut table) {
                Ok(false) => continue,
                Ok(true) => self.l2_table(offset, &table, uses)?,
                Err(error) => self.unreadable("an L2 table", offset, &error),
            }
        }
        (self.progress)(total, total);
        tables.clear();
        self.tables = tables;
        Ok(())
    }

    fn l2_table(&mut self, table_offset: u64, table: &[u8], uses: Uses) -> Result<(), CheckError> {
        let size = 1 << self.geometry.l2_entry_bits();
        let mut contiguous = None;
        for (index, entry) in table.chunks(size).enumerate() {
            let bitmap = match self.geometry.extended {
                true => be64(entry, 8),
                false => 0,
            };
            let entry = be64(entry, 0);
            if entry == 0 && bitmap == 0 {
                continue;
            }
            let at = || format!("entry {index} of the L2 table at {table_offset:#x}, {entry:#x},");
            if entry & COMPRESSED != 0 {
                self.compressed(entry, bitmap, uses, at)?;
            } else {
                self.standard(entry, bitmap, uses, &mut contiguous, at)?;
            }
        }
        Ok(())
    }

    fn corruption(&mut self, uses: Uses, what: impl FnOnce() -> String) {
        self.report.add(ProblemKind::Corruption, uses.all, what);
    }

    fn compressed(
        &mut self,
        entry: u64,
        bitmap: u64,
        uses: Uses,
        at: impl Fn() -> String,
    ) -> Result<(), CheckError> {
        if entry & COPIED != 0 {
            self.entries = true;
            self.corruption(uses, || {
                format!("{} is compressed and has the flag COPIED", at())
            });
        }
        if self.geometry.external {
            self.lost = true;
            self.corruption(uses, || {
                format!("{} is compressed, but there is a data file", at())
            });
            return Ok(());
        }
        if bitmap != 0 {
            self.lost = true;
            self.corruption(uses, || {
                format!("{} is compressed and has subclusters {bitmap:#x}", at())
            });
            return Ok(());
        }
        let offset_bits = 62 - (self.geometry.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> offset_bits) + 1;
        let len = sectors * 512 - offset % 512;
        self.report.allocated_clusters += uses.active;
        self.report.compressed_clusters += uses.active;
        // They lie anywhere by nature.
        self.report.fragmented_clusters += uses.active;
        self.count(offset, len, uses.all, at)
    }

    fn standard(
        &mut self,
        entry: u64,
        bitmap: u64,
        uses: Uses,
        contiguous: &mut Option<u64>,
        at: impl Fn() -> String,
    ) -> Result<(), CheckError> {
        let geometry = self.geometry;
        if entry & L2_RESERVED != 0 {
            self.corruption(uses, || format!("{} has reserved bits set", at()));
        }
        let offset = entry & OFFSET_MASK;
        let (allocated, zeroes) = (bitmap as u32, (bitmap >> 32) as u32);
        // Only in a data file offset 0 is a place for data.
        if offset == 0 && !(geometry.external && entry & COPIED != 0) {
            if allocated != 0 {
                self.lost = true;
                self.corruption(uses, || {
                    format!("{} has no place, but subclusters {bitmap:#x}", at())
                });
            }
            return Ok(());
        }
        if allocated & zeroes != 0 {
            self.corruption(uses, || {
                format!(
                    "{} has subclusters that are both data and zero, {bitmap:#x}",
                    at()
                )
            });
        }
        self.report.allocated_clusters += uses.active;
        if contiguous.is_some_and(|next| next != offset) {
            self.report.fragmented_clusters += uses.active;
        }
        *contiguous = Some(offset + geometry.cluster_size());
        if geometry.in_cluster(offset) != 0 {
            let data = match geometry.extended {
                true => allocated != 0,
                false => entry & ZERO == 0,
            };
            let kind = if data { "data" } else { "kept for zeroes" };
            self.corruption(uses, || format!("{} ({kind}) is no cluster's start", at()));
            match data || geometry.extended || geometry.version < 3 {
                true => self.lost = true,
                false => self.entries = true,
            }
        }
        if geometry.external {
            self.check_flag(1, entry, uses.active, at);
            return Ok(());
        }
        if uses.active > 0 {
            self.check_copied(offset, entry, uses.active, &at);
        }
        self.count(offset, geometry.cluster_size(), uses.all, at)
    }
}
