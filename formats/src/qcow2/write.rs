//! Writing: in place where a cluster is the disk's alone, else to a new one.

use std::io;
use std::ops::Range;

use smallvec::SmallVec;

use super::alloc::Run;
use super::entry::{Entry, Mapping};
use super::map::Place;
use super::{Damage, Qcow2};
use crate::{Buffer, Pending, Segments};

/// Up to so many zeroes are written together with the data beside them; more are left to the
/// host.
const MAX_ZEROES: u64 = 64 << 10;

/// Where a write goes that needs other L2 entries afterwards.
pub(super) struct Target {
    /// First cluster of the disk, and how many.
    pub(super) first: u64,
    pub(super) count: u64,
    /// Offset of the first one in the file.
    pub(super) host: u64,
    /// The host's bytes are known to be zeroes.
    pub(super) zero: bool,
    /// It has been the cluster's own before: some of its subclusters may be in use.
    reused: bool,
    /// Handed out for this.
    pub(super) new: Option<Run>,
}

impl Qcow2 {
    /// Stores `from`: at once if all goes to one place of the file.
    pub(super) fn write_at(&self, offset: u64, from: Segments) -> Pending<'_> {
        if let Err(error) = self.writable() {
            return Box::pin(std::future::ready(Err(error)));
        }
        if let Ok(Some(extent)) = self.extent(offset, from.len() as u64)
            && extent.len == from.len() as u64
            && let Place::Data { host, ours: true } = extent.place
            && self.is_in_file(host, extent.len)
        {
            let in_flight = self.epochs.enter();
            let write = self.data_file().write(host, from);
            return Box::pin(async move {
                let _in_flight = in_flight;
                write.await
            });
        }
        Box::pin(self.write_extents(offset, from))
    }

    /// Whether data may be written at an offset: never far past the end of the file.
    fn is_in_file(&self, host: u64, len: u64) -> bool {
        let end = match &self.data {
            Some(_) => return true,
            None => self.alloc.borrow().end() << self.geometry.cluster_bits,
        };
        host + len <= end
    }

    pub(super) async fn check_in_file(&self, host: u64, len: u64) -> io::Result<()> {
        if self.is_in_file(host, len) {
            return Ok(());
        }
        let damage = Damage(format!("data at {host:#x} is past the end of the file"));
        Err(self.condemn(damage).await)
    }

    /// Stores `from`, one place after the other.
    pub(super) async fn write_extents(
        &self,
        mut offset: u64,
        mut from: Segments,
    ) -> io::Result<()> {
        while !from.is_empty() {
            let in_flight = self.epochs.enter();
            let extent = self.extent_of(offset, from.len() as u64).await?;
            let done = match extent.place {
                Place::Data { host, ours: true } => {
                    self.check_in_file(host, extent.len).await?;
                    let part = from.slice(0, extent.len as usize);
                    self.data_file().write(host, part).await?;
                    extent.len
                }
                _ => {
                    drop(in_flight);
                    self.write_new(offset, &from).await?
                }
            };
            from.advance(done as usize);
            offset += done;
        }
        Ok(())
    }

    /// Stores the first bytes of `from` where nothing of ours is yet; returns how many: none, if
    /// somebody else has made room for them meanwhile.
    async fn write_new(&self, offset: u64, from: &Segments) -> io::Result<u64> {
        let bits = self.geometry.cluster_bits;
        let first = offset >> bits;
        let end = (offset + from.len() as u64).div_ceil(1 << bits);
        let end = end.min(self.slice_end(first));
        let _held = self.clusters.lock(first..end).await;
        self.write_locked(offset, from, first..end).await
    }

    /// As [`Qcow2::write_new`], for clusters that the caller has locked.
    pub(super) async fn write_locked(
        &self,
        offset: u64,
        from: &Segments,
        clusters: Range<u64>,
    ) -> io::Result<u64> {
        self.own_l2_table(clusters.start).await?;
        let len = from.len() as u64;
        let Some(target) = self.target(offset, len, clusters).await? else {
            return Ok(0);
        };
        let new = target.new;
        match self.fill_target(offset, from, target).await {
            Ok(done) => Ok(done),
            Err(error) => {
                if let Some(new) = new {
                    self.give_back(new);
                }
                Err(error)
            }
        }
    }

    /// Finds out where data at `offset` goes; `None` if it can be written in place.
    pub(super) async fn target(
        &self,
        offset: u64,
        len: u64,
        clusters: Range<u64>,
    ) -> io::Result<Option<Target>> {
        if let Place::Data { ours: true, .. } = self.extent_of(offset, len).await?.place {
            return Ok(None);
        }
        let first = clusters.start;
        if let Some(host) = ours(self.mapping_of(first).await?) {
            self.check_in_file(host, self.geometry.cluster_size())
                .await?;
            return Ok(Some(Target {
                first,
                count: 1,
                host,
                zero: false,
                reused: true,
                new: None,
            }));
        }
        let mut count = 1;
        while first + count < clusters.end && ours(self.mapping_of(first + count).await?).is_none()
        {
            count += 1;
        }
        if self.geometry.external {
            return Ok(Some(Target {
                first,
                count,
                host: first << self.geometry.cluster_bits,
                zero: false,
                reused: false,
                new: None,
            }));
        }
        let run = self.allocate(count).await?;
        Ok(Some(Target {
            first,
            count: run.count,
            host: run.start << self.geometry.cluster_bits,
            zero: run.zero,
            reused: false,
            new: Some(run),
        }))
    }

    /// Writes data and what belongs around it to the target, and then refers to it.
    async fn fill_target(&self, offset: u64, from: &Segments, target: Target) -> io::Result<u64> {
        let bits = self.geometry.cluster_bits;
        let start = target.first << bits;
        let last = target.first + target.count - 1;
        let mut end = (offset + from.len() as u64).min((last + 1) << bits);
        if target.reused {
            // Further subclusters of it may be in place already.
            end = end.min(offset + self.extent_of(offset, end - offset).await?.len);
        }
        // What is written as a whole: subclusters, unless there is data of the cluster elsewhere.
        let head_unit = self.unit(target.first).await?;
        let tail_unit = self.unit(last).await?;
        let (whole_start, whole_end) = (
            offset / head_unit * head_unit,
            end.next_multiple_of(tail_unit),
        );
        let head = self
            .around(whole_start, offset - whole_start, &target)
            .await?;
        let tail = self.around(end, whole_end - end, &target).await?;
        let data = from.slice(0, (end - offset) as usize);
        let skipped = if head.is_none() {
            offset - whole_start
        } else {
            0
        };
        let all = Segments::chain([head, Some(data), tail].into_iter().flatten());
        let at = target.host + (whole_start - start) + skipped;
        self.data_file().write(at, all).await?;

        self.refer_to(&target, whole_start..whole_end).await?;
        Ok(end - offset)
    }

    /// Has the L2 entries of the target's clusters refer to it, where `written` of the disk was
    /// stored.
    pub(super) async fn refer_to(&self, target: &Target, written: Range<u64>) -> io::Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut old = SmallVec::<[Mapping; 16]>::new();
        let mut entries = SmallVec::<[Entry; 16]>::new();
        for at in 0..target.count {
            let cluster = target.first + at;
            let mapping = self.mapping_of(cluster).await?;
            let host = target.host + (at << bits);
            entries.push(self.entry_after(mapping, host, cluster, written.clone()));
            old.push(mapping);
        }
        self.set_entries(target.first, &entries).await?;
        if target.new.is_some() {
            old.into_iter().for_each(|old| self.unlink_mapping(old));
        }
        Ok(())
    }

    /// The unit in which data of a cluster moves to another place, or comes to be.
    async fn unit(&self, cluster: u64) -> io::Result<u64> {
        Ok(match self.mapping_of(cluster).await? {
            Mapping::Subclusters {
                host: Some(_),
                copied: false,
                ..
            }
            | Mapping::Data { .. }
            | Mapping::Compressed { .. } => self.geometry.cluster_size(),
            _ => 1 << self.geometry.subcluster_bits(),
        })
    }

    /// What a range beside written data holds; `None` if the host has the right bytes there.
    async fn around(&self, offset: u64, len: u64, target: &Target) -> io::Result<Option<Segments>> {
        if len == 0 {
            return Ok(None);
        }
        if !self.is_zero(offset, len).await? {
            let memory = Segments::from_buffer(Buffer::zeroed(len as usize, 4096)?);
            self.read_extents(offset, memory.clone()).await?;
            return Ok(Some(memory));
        }
        if target.zero {
            return Ok(None);
        }
        if len <= MAX_ZEROES {
            return Ok(Some(self.file.zeroes()?.slice(0, len as usize)));
        }
        let host = target.host + (offset - (target.first << self.geometry.cluster_bits));
        self.data_file()
            .write_zeroes(host, len, self.sparse)
            .await?;
        Ok(None)
    }

    /// The L2 entry of a cluster after `written` of the disk was stored for it at `host`.
    fn entry_after(&self, old: Mapping, host: u64, cluster: u64, written: Range<u64>) -> Entry {
        if !self.geometry.extended {
            return Entry::data(self.geometry, host);
        }
        let start = cluster << self.geometry.cluster_bits;
        let bits = self.geometry.subcluster_bits();
        let first = written.start.saturating_sub(start) >> bits;
        let end = (written.end - start).min(self.geometry.cluster_size()) >> bits;
        let stored = (u64::MAX << first & !(u64::MAX << end)) as u32;
        let (allocated, zero) = match old {
            Mapping::Subclusters {
                allocated, zero, ..
            } => (allocated, zero),
            Mapping::Zero { .. } => (0, u32::MAX),
            _ => (0, 0),
        };
        Entry::subclusters(Some(host), allocated | stored, zero & !stored)
    }

    /// Nothing in memory refers to what a cluster was mapped to any more.
    pub(super) fn unlink_mapping(&self, old: Mapping) {
        let bits = self.geometry.cluster_bits;
        match old {
            _ if self.geometry.external => {}
            Mapping::Data { host, .. }
            | Mapping::Zero {
                host: Some(host), ..
            }
            | Mapping::Subclusters {
                host: Some(host), ..
            } => self.unlink(host >> bits, 1),
            Mapping::Compressed { offset, len } => {
                let first = offset >> bits;
                self.unlink(first, (offset + len).div_ceil(1 << bits) - first);
            }
            _ => {}
        }
    }
}

/// The host cluster that is a cluster's own already, though not all of it is in use.
fn ours(mapping: Mapping) -> Option<u64> {
    match mapping {
        Mapping::Data { host, copied: true }
        | Mapping::Zero {
            host: Some(host),
            copied: true,
        }
        | Mapping::Subclusters {
            host: Some(host),
            copied: true,
            ..
        } => Some(host),
        _ => None,
    }
}
