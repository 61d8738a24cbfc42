//! Making ranges read as zeroes, and giving up what the guest no longer needs.

use std::io;
use std::ops::Range;

use super::Qcow2;
use super::entry::{Entry, Mapping, OFFSET_MASK};
use super::map::Place;

/// How clusters become blank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blank {
    /// The guest no longer needs them: what can be freed is freed, and reads as zeroes.
    Discard,
    /// They read as zeroes; `unmap` frees their host clusters, else these are kept for them.
    Zero { unmap: bool },
    /// They were cut off: nothing is left of them.
    Drop,
}

impl Qcow2 {
    /// Discards the whole clusters of a range; the rest stays as it is.
    pub(super) async fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.writable()?;
        let (clusters, ..) = self.whole_clusters(offset, len);
        if self.geometry.external {
            return self.zero_clusters(clusters, true).await;
        }
        self.blank(clusters, Blank::Discard).await
    }

    /// Makes a range read as zeroes.
    pub(super) async fn zero_range(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.writable()?;
        let (clusters, head, tail) = self.whole_clusters(offset, len);
        self.zero_part(head).await?;
        self.zero_part(tail).await?;
        self.zero_clusters(clusters, unmap && self.sparse).await
    }

    /// The clusters that a range covers as far as the disk goes, and what it covers of others
    /// before and after them.
    fn whole_clusters(&self, offset: u64, len: u64) -> (Range<u64>, Range<u64>, Range<u64>) {
        let size = self.geometry.cluster_size();
        let end = offset + len;
        let first = offset.div_ceil(size);
        let last = match end == self.size.get() {
            true => end.div_ceil(size),
            false => end / size,
        };
        match first <= last {
            true => (
                first..last,
                offset..first * size,
                (last * size).min(end)..end,
            ),
            false => (first..first, offset..end, end..end),
        }
    }

    /// Makes clusters read as zeroes, by their L2 entries if that is possible.
    pub(super) async fn zero_clusters(&self, clusters: Range<u64>, unmap: bool) -> io::Result<()> {
        let bits = self.geometry.cluster_bits;
        let (start, mut end) = (clusters.start << bits, clusters.end << bits);
        // Version 2 has no flag for zeroes: a cluster without data shows the backing file.
        let by_entry = match self.geometry.version {
            2 => unmap && self.is_past_backing(start),
            _ => true,
        };
        if by_entry && !self.geometry.external {
            return self.blank(clusters, Blank::Zero { unmap }).await;
        }
        if start < self.size.get() {
            end = end.min(self.size.get());
        }
        self.zero_data(start..end, unmap).await
    }

    /// Makes a part of a cluster read as zeroes.
    async fn zero_part(&self, range: Range<u64>) -> io::Result<()> {
        self.zero_data(range, false).await
    }

    /// Makes a range read as zeroes by its data, where it has any.
    pub(super) async fn zero_data(&self, range: Range<u64>, unmap: bool) -> io::Result<()> {
        let mut offset = range.start;
        while offset < range.end {
            let in_flight = self.epochs.enter();
            let extent = self.extent_of(offset, range.end - offset).await?;
            let len = extent.len;
            match extent.place {
                Place::Data { host, ours: true } => {
                    self.check_in_file(host, len).await?;
                    self.data_file().write_zeroes(host, len, unmap).await?;
                }
                Place::Zero => {}
                Place::Backing if self.is_past_backing(offset) => {}
                _ => {
                    drop(in_flight);
                    self.write_zero_bytes(offset, len).await?;
                }
            }
            offset += len;
        }
        Ok(())
    }

    /// Stores zeroes as data.
    async fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeroes = self.file.zeroes()?;
        while len > 0 {
            let part = zeroes.slice(0, len.min(zeroes.len() as u64) as usize);
            let count = part.len() as u64;
            self.write_extents(offset, part).await?;
            offset += count;
            len -= count;
        }
        Ok(())
    }

    /// Makes whole clusters blank by their L2 entries.
    pub(super) async fn blank(&self, clusters: Range<u64>, how: Blank) -> io::Result<()> {
        let mut first = clusters.start;
        while first < clusters.end {
            let end = clusters.end.min(self.slice_end(first));
            let next = self.blank_slice(first..end, how).await?;
            first = next.max(end);
            // What is unlinked and not yet durably so takes memory.
            self.commit_if_many_unlinked().await?;
        }
        Ok(())
    }

    /// Makes clusters blank that one slice describes; returns up to where there is nothing more
    /// to be done.
    async fn blank_slice(&self, clusters: Range<u64>, how: Blank) -> io::Result<u64> {
        let _held = self.clusters.lock(clusters.clone()).await;
        let index = self.l1_index_of_slice(self.l2_slice(clusters.start));
        let absent = self.l1.borrow().at(index) & OFFSET_MASK == 0;
        let offset = clusters.start << self.geometry.cluster_bits;
        if absent && (!matches!(how, Blank::Zero { .. }) || self.is_past_backing(offset)) {
            return Ok((index + 1) << self.geometry.l2_bits());
        }
        let mut changes = Vec::new();
        for cluster in clusters.clone() {
            let old = self.mapping_of(cluster).await?;
            changes.push((old, self.blank_entry(cluster, old, how)));
        }
        if changes.iter().all(|(_, new)| new.is_none()) {
            return Ok(clusters.end);
        }
        self.own_l2_table(clusters.start).await?;
        for (cluster, (old, new)) in clusters.clone().zip(changes) {
            let Some((entry, freed)) = new else { continue };
            self.set_entries(cluster, &[entry]).await?;
            if freed {
                self.unlink_mapping(old);
            }
        }
        Ok(clusters.end)
    }

    /// The L2 entry that makes a cluster blank, and whether what it was mapped to is then no
    /// longer referred to; `None` if there is nothing to do.
    fn blank_entry(&self, cluster: u64, old: Mapping, how: Blank) -> Option<(Entry, bool)> {
        let offset = cluster << self.geometry.cluster_bits;
        let hidden = !self.is_past_backing(offset);
        let zero = Entry::zero(self.geometry, None);
        let gone = match hidden {
            true => zero,
            false => Entry::UNALLOCATED,
        };
        match (how, old) {
            (Blank::Drop, Mapping::Unallocated) => None,
            (Blank::Drop, _) => Some((Entry::UNALLOCATED, true)),
            (_, Mapping::Zero { host: None, .. }) => None,
            // As before, or zeroes: what the backing file has is as good.
            (Blank::Discard, Mapping::Unallocated) => None,
            // Version 2 cannot hide what the backing file has there.
            (Blank::Discard, _) if hidden && self.geometry.version < 3 => None,
            (Blank::Discard, _) => Some((gone, true)),
            (Blank::Zero { .. }, Mapping::Unallocated) if !hidden => None,
            (Blank::Zero { unmap: true }, _) => Some((gone, true)),
            (Blank::Zero { unmap: false }, Mapping::Zero { .. }) => None,
            (
                Blank::Zero { unmap: false },
                Mapping::Data { host, copied: true }
                | Mapping::Subclusters {
                    host: Some(host),
                    copied: true,
                    ..
                },
            ) => Some((Entry::zero(self.geometry, Some(host)), false)),
            (Blank::Zero { unmap: false }, _) => Some((zero, true)),
        }
    }
}
