//! What is counted, against what is stored.

use super::CheckError;
use super::refcounts::PAGE;
use super::report::ProblemKind;
use super::walk::Walk;

impl Walk<'_> {
    /// Counts the refcount blocks, each of which is to be used once, and by the table.
    pub(super) fn count_blocks(&mut self) -> Result<(), CheckError> {
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
            self.count(offset, self.geometry.cluster_size(), 1, at)?;
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
                self.rebuild |= stored == 0;
                let offset = cluster << self.geometry.cluster_bits;
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
