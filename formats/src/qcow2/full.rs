//! Images that are fully allocated: `sparse = false`.

use std::io;
use std::ops::Range;

use super::Qcow2;
use super::entry::Mapping;
use super::map::Place;
use crate::{Buffer, Segments};

impl Qcow2 {
    /// Gives every cluster of a range its own place, and has the host allocate all there is.
    /// `progress` is told how much is done, and of how much: of the range, then of the file.
    pub(super) async fn allocate_range(
        &self,
        range: Range<u64>,
        progress: impl Fn(u64, u64),
    ) -> io::Result<()> {
        let bits = self.geometry.cluster_bits;
        let end = range.end.div_ceil(1 << bits);
        let first = range.start >> bits;
        let mut at = first;
        while at < end {
            self.file.ring().check_wanted()?;
            at += self
                .allocate_clusters(at..end.min(self.slice_end(at)))
                .await?;
            progress((at - first) << bits, (end - first) << bits);
        }
        let file = self.data_file();
        let size = file.size();
        file.allocate(size, |done| progress(done, size)).await
    }

    /// Gives the first of some clusters, of one L2 slice, their own places; returns how many.
    async fn allocate_clusters(&self, clusters: Range<u64>) -> io::Result<u64> {
        let first = clusters.start;
        let _held = self.clusters.lock(clusters.clone()).await;
        if self.is_own(first).await? {
            return Ok(1);
        }
        let cluster_size = self.geometry.cluster_size();
        let mut count = 0;
        while first + count < clusters.end
            && self
                .is_zero((first + count) * cluster_size, cluster_size)
                .await?
        {
            count += 1;
        }
        match count {
            0 => self.copy_cluster(first).await.map(|()| 1),
            _ => self.allocate_zeroes(first..first + count).await,
        }
    }

    async fn is_own(&self, cluster: u64) -> io::Result<bool> {
        let mapping = self.mapping_of(cluster).await?;
        Ok(matches!(mapping, Mapping::Data { copied: true, .. }))
    }

    /// Gives a cluster whose data is elsewhere, in part or as a whole, its own place.
    async fn copy_cluster(&self, cluster: u64) -> io::Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let start = cluster * cluster_size;
        let memory = Segments::from_buffer(Buffer::zeroed(cluster_size as usize, 4096)?);
        self.read_extents(start, memory.clone()).await?;
        let mut done = 0;
        while done < cluster_size {
            let extent = self.extent_of(start + done, cluster_size - done).await?;
            done += match extent.place {
                Place::Data { ours: true, .. } => extent.len,
                _ => {
                    let part = memory.slice(done as usize, extent.len as usize);
                    self.write_locked(start + done, &part, cluster..cluster + 1)
                        .await?
                }
            };
        }
        Ok(())
    }

    /// Gives the first of some clusters that read as zeroes their own places; returns how many.
    async fn allocate_zeroes(&self, clusters: Range<u64>) -> io::Result<u64> {
        let bits = self.geometry.cluster_bits;
        let start = clusters.start << bits;
        self.own_l2_table(clusters.start).await?;
        let len = (clusters.end - clusters.start) << bits;
        let Some(target) = self.target(start, len, clusters).await? else {
            return Ok(1);
        };
        let len = target.count << bits;
        let zeroed = match target.zero {
            true => Ok(()),
            false => self.data_file().write_zeroes(target.host, len, false).await,
        };
        let result = match zeroed {
            Ok(()) => self.refer_to(&target, start..start + len).await,
            failed => failed,
        };
        if result.is_err()
            && let Some(new) = target.new
        {
            self.give_back(new);
        }
        result.map(|()| target.count)
    }
}
