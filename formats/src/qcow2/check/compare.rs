//! What is counted, against what is stored.

use super::super::Header;
use super::CheckError;
use super::refcounts::PAGE;
use super::report::ProblemKind;
use super::stored::BlockPlace;
use super::walk::Walk;

impl Walk<'_> {
    /// Counts the refcount table, and its blocks, each of which is to be used but once.
    pub(super) fn count_refcounts(&mut self, header: &Header) -> Result<(), CheckError> {
        let lost = self.lost;
        let (offset, bits) = (header.refcount_table_offset, header.cluster_bits);
        let clusters = u64::from(header.refcount_table_clusters);
        self.count_table(offset, clusters << bits, || "the refcount table".into())?;
        let first = offset >> bits;
        self.rebuild |= (first..first + clusters).any(|cluster| self.counted.load(cluster) != 1);
        // It can be made anew.
        self.lost = lost;
        self.count_blocks()
    }

    fn count_blocks(&mut self) -> Result<(), CheckError> {
        let clusters = self.clusters;
        for index in 0..self.stored.table.len() {
            let entry = self.stored.table[index];
            if entry == 0 {
                continue;
            }
            let offset = entry & !0x1ff;
            let at = || format!("entry {index} of the refcount table, {entry:#x},");
            let wrong = if entry & 0x1ff != 0 {
                Some("has reserved bits set")
            } else if self.geometry.in_cluster(offset) != 0 {
                Some("is no cluster's start")
            } else if offset >> self.geometry.cluster_bits >= clusters {
                Some("is not in the file")
            } else {
                None
            };
            if let Some(wrong) = wrong {
                self.report.corruption(|| format!("{} {wrong}", at()));
                self.rebuild = true;
                continue;
            }
            self.count_table(offset, self.geometry.cluster_size(), at)?;
            let users = self.counted.load(offset >> self.geometry.cluster_bits);
            if users != 1 {
                self.report
                    .corruption(|| format!("{} has {users} users, expected 1", at()));
                self.rebuild = true;
            }
        }
        Ok(())
    }

    /// Compares what is counted with what is stored.
    pub(super) fn compare(&mut self) {
        let mut pages: Vec<u64> = self.counted.pages().chain(self.stored.pages()).collect();
        pages.sort_unstable();
        pages.dedup();
        let mut last = 0;
        for page in pages {
            let first = page * PAGE;
            let end = (first + PAGE).min(self.clusters);
            for cluster in first..end {
                let counted = self.counted.load(cluster);
                let offset = cluster << self.geometry.cluster_bits;
                if counted > 1 && self.overlaps(cluster) {
                    self.report.add(ProblemKind::Overlap, 1, || {
                        format!(
                            "cluster {cluster} at {offset:#x} is a table, and used otherwise too"
                        )
                    });
                }
                let Some(stored) = self.stored.load(cluster) else {
                    continue;
                };
                if counted > 0 || stored > 0 {
                    last = cluster;
                }
                if counted == stored {
                    continue;
                }
                let kind = match stored < counted {
                    true => ProblemKind::Corruption,
                    false => ProblemKind::Leak,
                };
                let block = (cluster >> self.geometry.refcount_block_bits()) as usize;
                self.rebuild |=
                    stored < counted && self.stored.place(self.geometry, block) == BlockPlace::None;
                self.report.add(kind, 1, || {
                    format!("cluster {cluster} at {offset:#x} has refcount {stored}, but {counted} users")
                });
            }
        }
        for index in &self.stored.unreadable {
            let range = self.stored.counted_by(*index);
            let count = range.end.min(self.clusters).saturating_sub(range.start);
            self.rebuild = true;
            if count > 0 {
                self.report.add(ProblemKind::CheckError, count, || {
                    format!(
                        "the refcounts of {count} clusters from {} on cannot be read",
                        range.start
                    )
                });
            }
        }
        self.report.image_end_offset = (last + 1) << self.geometry.cluster_bits;
    }
}
