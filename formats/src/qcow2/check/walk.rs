//! Counting who uses which cluster: from the L1 tables down.

use std::fs::File;

use super::super::Header;
use super::super::entry::{COPIED, Geometry, OFFSET_MASK};
use super::super::header::be64;
use super::refcounts::Refcounts;
use super::report::{ProblemKind, Report};
use super::stored::Stored;
use super::{CheckError, io, too_many};

/// Bits of L1 entries that must be 0.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// How much of an L1 table is read at once.
const CHUNK: usize = 1 << 20;
/// How many references to L2 tables are kept until the tables are read.
const BATCH: usize = 4 << 20;
/// Bit of a kept reference, which is an offset of a table: it is one of the active L1 table.
pub(super) const ACTIVE: u64 = 1;

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
    /// How often L1 tables point to the clusters of L2 tables.
    pub(in super::super) table_uses: Refcounts,
    /// How many other tables lie in a cluster.
    metadata: Refcounts,
    /// The refcounts cannot be mended where they are.
    pub(in super::super) rebuild: bool,
    /// Something leads nowhere: what seems to be leaked may be what it meant.
    pub(in super::super) lost: bool,
    /// Entries can be mended without a look at refcounts.
    pub(in super::super) entries: bool,
    /// Offsets of L2 tables, one for each time that an L1 table points to one; with [`ACTIVE`].
    pub(super) tables: Vec<u64>,
    pub(super) tables_done: u64,
    pub(super) progress: &'a mut dyn FnMut(u64, u64),
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
            table_uses: Refcounts::default(),
            metadata: Refcounts::default(),
            rebuild: false,
            lost: false,
            entries: false,
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
            self.astray(times, || {
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

    /// Counts a use by a table that is written where it is, of which there is one.
    pub(super) fn count_table(
        &mut self,
        offset: u64,
        len: u64,
        what: impl Fn() -> String,
    ) -> Result<(), CheckError> {
        self.count(offset, len, 1, what)?;
        let bits = self.geometry.cluster_bits;
        for cluster in offset >> bits..offset.saturating_add(len).div_ceil(1 << bits) {
            if cluster >= self.clusters {
                break;
            }
            let stored = self
                .metadata
                .store(cluster, self.metadata.load(cluster) + 1);
            stored.map_err(|_| too_many())?;
        }
        Ok(())
    }

    /// Whether something is in the way of a table that lies in this cluster.
    pub(super) fn overlaps(&self, cluster: u64) -> bool {
        let tables = self.metadata.load(cluster);
        let uses = self.table_uses.load(cluster);
        let claims = tables + u64::from(uses > 0);
        claims > 1 || claims == 1 && self.counted.load(cluster) > tables + uses
    }

    /// Something leads nowhere.
    pub(super) fn astray(&mut self, times: u64, what: impl FnOnce() -> String) {
        self.lost = true;
        self.report.add(ProblemKind::Corruption, times, what);
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
        self.count_table(offset, len, || format!("the L1 table{name}"))?;
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
            self.astray(1, || format!("{} is no cluster's start", at()));
        } else {
            let cluster = offset >> self.geometry.cluster_bits;
            let uses = self.table_uses.load(cluster) + 1;
            let stored = self.table_uses.store(cluster, uses);
            stored.map_err(|_| too_many())?;
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
    pub(super) fn check_copied(
        &mut self,
        offset: u64,
        entry: u64,
        times: u64,
        at: impl Fn() -> String,
    ) {
        let stored = match self.stored.load(offset >> self.geometry.cluster_bits) {
            Some(refcount) => refcount,
            None => return,
        };
        self.check_flag(stored, entry, times, at);
    }

    pub(super) fn check_flag(
        &mut self,
        refcount: u64,
        entry: u64,
        times: u64,
        at: impl Fn() -> String,
    ) {
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

    pub(super) fn unreadable(&mut self, what: &str, offset: u64, error: &std::io::Error) {
        self.lost = true;
        self.report.add(ProblemKind::CheckError, 1, || {
            format!("{what} at {offset:#x} cannot be read: {error}")
        });
    }
}
