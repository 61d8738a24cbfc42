//! Counting who uses which cluster: from the L1 tables down.

use std::fs::File;

use super::super::Header;
use super::super::entry::{COMPRESSED, COPIED, Geometry, OFFSET_MASK, ZERO};
use super::super::header::be64;
use super::refcounts::Refcounts;
use super::report::{ProblemKind, Report};
use super::stored::Stored;
use super::{CheckError, io, too_many};

/// Bits of L1 and of standard L2 entries that must be 0.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// How much of an L1 table is read at once.
const CHUNK: usize = 1 << 20;
/// How many references to L2 tables are kept until the tables are read.
const BATCH: usize = 4 << 20;
/// Bit of a kept reference, which is an offset of a table: it is one of the active L1 table.
const ACTIVE: u64 = 1;

/// How often L1 tables point to an L2 table.
#[derive(Clone, Copy)]
struct Uses {
    active: u64,
    all: u64,
}

/// The uses of clusters, being counted.
pub(in super::super) struct Walk<'a> {
    pub(in super::super) file: &'a File,
    pub(in super::super) geometry: Geometry,
    pub(in super::super) file_len: u64,
    /// Clusters of the file, the last one cut short maybe, and one more if something reaches
    /// over its end.
    pub(in super::super) clusters: u64,
    pub(in super::super) counted: Refcounts,
    pub(in super::super) stored: &'a Stored,
    pub(in super::super) report: Report,
    /// The refcount blocks cannot be mended where they are.
    pub(in super::super) rebuild: bool,
    /// Offsets of L2 tables, one for each time that an L1 table points to one; with [`ACTIVE`].
    tables: Vec<u64>,
    tables_done: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        file: &'a File,
        file_len: u64,
        header: &Header,
        stored: &'a Stored,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Walk<'a> {
        Walk {
            file,
            geometry: Geometry::of(header),
            file_len,
            clusters: file_len.div_ceil(header.cluster_size()),
            counted: Refcounts::default(),
            stored,
            report: Report {
                total_clusters: header.size.div_ceil(header.cluster_size()),
                ..Report::default()
            },
            rebuild: false,
            tables: Vec::new(),
            tables_done: 0,
            progress,
        }
    }

    /// Counts `times` uses of every cluster that some bytes lie in. `what` they are is said if
    /// they are not in the file: the last cluster alone may be cut short.
    pub(super) fn count(
        &mut self,
        offset: u64,
        len: u64,
        times: u64,
        what: impl Fn() -> String,
    ) -> Result<(), CheckError> {
        if len == 0 {
            return Ok(());
        }
        let end = offset.saturating_add(len);
        if end >= self.file_len.saturating_add(self.geometry.cluster_size()) {
            let file_len = self.file_len;
            self.report.add(ProblemKind::Corruption, times, || {
                format!(
                    "{} is at {offset:#x} to {end:#x}, the file ends at {file_len:#x}",
                    what()
                )
            });
            return Ok(());
        }
        let bits = self.geometry.cluster_bits;
        let most = self.geometry.max_refcount();
        for cluster in offset >> bits..=(end - 1) >> bits {
            let sum = self.counted.load(cluster).saturating_add(times);
            if sum > most {
                self.report.add(ProblemKind::Corruption, sum - most, || {
                    format!(
                        "cluster {cluster} has more users than a refcount can count, {most}: {}",
                        what()
                    )
                });
            }
            let stored = self.counted.store(cluster, sum.min(most));
            stored.map_err(|_| too_many())?;
            self.clusters = self.clusters.max(cluster + 1);
        }
        Ok(())
    }

    /// Counts an L1 table and the L2 tables of it; what these point to is counted at last, by
    /// [`Walk::count_l2`].
    pub(super) fn count_l1(
        &mut self,
        name: &str,
        offset: u64,
        entries: u32,
        active: bool,
    ) -> Result<(), CheckError> {
        let len = u64::from(entries) * 8;
        self.count(offset, len, 1, || format!("the L1 table{name}"))?;
        let mut chunk = vec![0; CHUNK.min(len as usize)];
        let mut done = 0;
        while done < len {
            let now = (len - done).min(CHUNK as u64) as usize;
            let part = &mut chunk[..now];
            match io::read_table(self.file, offset + done, part) {
                Ok(true) => {}
                Ok(false) => {
                    done += now as u64;
                    continue;
                }
                Err(error) => {
                    self.unreadable(&format!("the L1 table{name}"), offset + done, &error);
                    done += now as u64;
                    continue;
                }
            }
            for (index, entry) in part.chunks(8).map(|entry| be64(entry, 0)).enumerate() {
                if entry != 0 {
                    let index = done / 8 + index as u64;
                    self.l1_entry(name, index, entry, active)?;
                }
            }
            done += now as u64;
        }
        Ok(())
    }

    fn l1_entry(
        &mut self,
        name: &str,
        index: u64,
        entry: u64,
        active: bool,
    ) -> Result<(), CheckError> {
        let at = || format!("entry {index} of the L1 table{name}, {entry:#x},");
        if entry & L1_RESERVED != 0 {
            self.report
                .corruption(|| format!("{} has reserved bits set", at()));
        }
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            // The L2 table is unallocated, whatever is said about it.
            return Ok(());
        }
        let cluster_size = self.geometry.cluster_size();
        self.count(offset, cluster_size, 1, || {
            format!("the L2 table of {}", at())
        })?;
        if self.geometry.in_cluster(offset) != 0 {
            self.report
                .corruption(|| format!("{} is no cluster's start", at()));
        }
        if active {
            self.check_copied(offset, entry, 1, at);
        }
        if self.tables.len() == BATCH {
            self.count_l2()?;
        }
        self.tables.push(offset | if active { ACTIVE } else { 0 });
        Ok(())
    }

    /// Checks the flag that says whether a refcount is 1.
    fn check_copied(&mut self, offset: u64, entry: u64, times: u64, at: impl Fn() -> String) {
        let stored = match self.stored.load(offset >> self.geometry.cluster_bits) {
            Some(refcount) => refcount,
            None => return,
        };
        self.check_flag(stored, entry, times, at);
    }

    fn check_flag(&mut self, refcount: u64, entry: u64, times: u64, at: impl Fn() -> String) {
        let copied = entry & COPIED != 0;
        if (refcount == 1) != copied {
            self.report.add(ProblemKind::Corruption, times, || {
                let flag = if copied { "has" } else { "lacks" };
                format!(
                    "{} {flag} the flag COPIED, but its refcount is {refcount}",
                    at()
                )
            });
        }
    }

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

    fn unreadable(&mut self, what: &str, offset: u64, error: &std::io::Error) {
        self.report.add(ProblemKind::CheckError, 1, || {
            format!("{what} at {offset:#x} cannot be read: {error}")
        });
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
            self.corruption(uses, || {
                format!("{} is compressed and has the flag COPIED", at())
            });
        }
        if self.geometry.external {
            self.corruption(uses, || {
                format!("{} is compressed, but there is a data file", at())
            });
            return Ok(());
        }
        if bitmap != 0 {
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
