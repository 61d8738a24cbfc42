//! From the disk's bytes to the host's: the L1 table and the L2 tables.

use std::io;

use super::entry::{COPIED, Entry, Mapping, OFFSET_MASK, SUBCLUSTERS};
use super::read::owned;
use super::{Damage, Qcow2};
use crate::{Buffer, Segments};

/// Where consecutive bytes of the disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At this offset of the file; to be written in place only if nothing else refers to it.
    Data { host: u64, ours: bool },
    /// Nowhere: they are zeroes.
    Zero,
    /// In the backing file; where there is none, nowhere.
    Backing,
    /// In compressed data.
    Compressed { offset: u64, len: u64 },
}

/// Consecutive bytes of the disk in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) place: Place,
    pub(super) len: u64,
}

impl Place {
    /// The place of what follows `len` bytes later in the same extent.
    fn after(self, len: u64) -> Option<Place> {
        match self {
            Place::Data { host, ours } => Some(Place::Data {
                host: host + len,
                ours,
            }),
            Place::Zero | Place::Backing => Some(self),
            Place::Compressed { .. } => None,
        }
    }
}

impl Qcow2 {
    /// log2 of how many L2 entries a slice holds.
    fn slice_entry_bits(&self) -> u32 {
        self.slice_bits - self.geometry.l2_entry_bits()
    }

    /// The number of the L2 slice that describes a cluster of the disk.
    pub(super) fn l2_slice(&self, cluster: u64) -> u64 {
        cluster >> self.slice_entry_bits()
    }

    /// The first cluster after those that are described by the same slice.
    pub(super) fn slice_end(&self, cluster: u64) -> u64 {
        (self.l2_slice(cluster) + 1) << self.slice_entry_bits()
    }

    /// The L1 entry for an L2 slice.
    pub(super) fn l1_index_of_slice(&self, slice: u64) -> u64 {
        slice >> (self.geometry.l2_bits() - self.slice_entry_bits())
    }

    /// Where an L2 slice lies in its table.
    pub(super) fn offset_in_l2_table(&self, slice: u64) -> u64 {
        let mask = (1 << (self.geometry.l2_bits() - self.slice_entry_bits())) - 1;
        (slice & mask) << self.slice_bits
    }

    /// The L2 entry of a cluster; `None` if its slice is not in memory.
    fn entry(&self, cluster: u64) -> Option<Entry> {
        let slice = self.l2_slice(cluster);
        let l2 = self.l2.borrow();
        let Some(bytes) = l2.bytes(slice) else {
            let table = self.l1.borrow().at(self.l1_index_of_slice(slice));
            return (table & OFFSET_MASK == 0).then_some(Entry::UNALLOCATED);
        };
        let at = self.place_in_slice(cluster);
        Some(Entry {
            descriptor: number_at(bytes, at),
            bitmap: match self.geometry.extended {
                true => number_at(bytes, at + 8),
                false => 0,
            },
        })
    }

    fn place_in_slice(&self, cluster: u64) -> usize {
        let index = cluster & ((1 << self.slice_entry_bits()) - 1);
        (index << self.geometry.l2_entry_bits()) as usize
    }

    /// What the L2 entry of a cluster says; `None` if it is not in memory.
    pub(super) fn mapping(&self, cluster: u64) -> Result<Option<Mapping>, Damage> {
        let Some(entry) = self.entry(cluster) else {
            return Ok(None);
        };
        let offset = cluster << self.geometry.cluster_bits;
        let mapping = entry.mapping(self.geometry).map_err(|_| {
            Damage(format!(
                "the L2 entry for offset {offset:#x} is {:#x}, which means nothing",
                entry.descriptor
            ))
        })?;
        match self.is_possible(cluster, mapping) {
            true => Ok(Some(mapping)),
            false => Err(Damage(format!(
                "the L2 entry for offset {offset:#x} is {:#x}, where there cannot be data",
                entry.descriptor
            ))),
        }
    }

    /// Whether data can be where an entry says it is.
    fn is_possible(&self, cluster: u64, mapping: Mapping) -> bool {
        let (host, len) = match mapping {
            Mapping::Unallocated => return true,
            Mapping::Zero { host, .. } | Mapping::Subclusters { host, .. } => match host {
                Some(host) => (host, self.geometry.cluster_size()),
                None => return true,
            },
            Mapping::Data { host, .. } => (host, self.geometry.cluster_size()),
            Mapping::Compressed { offset, len } => (offset, len),
        };
        if self.geometry.external {
            return host == cluster << self.geometry.cluster_bits;
        }
        let bits = self.geometry.cluster_bits;
        let clusters = host >> bits..(host + len).div_ceil(1 << bits);
        !self.places.borrow().overlap(&clusters)
    }

    /// Where the bytes at `offset` are, and how many of `len` are there or follow in the same
    /// place. `None` if the slice that describes the first of them is not in memory.
    pub(super) fn extent(&self, offset: u64, len: u64) -> Result<Option<Extent>, Damage> {
        let mut found: Option<Extent> = None;
        let mut done = 0;
        while done < len {
            let Some(extent) = self.extent_in_cluster(offset + done, len - done)? else {
                break;
            };
            match &mut found {
                None => found = Some(extent),
                Some(found) if found.place.after(done) == Some(extent.place) => {
                    found.len += extent.len;
                }
                Some(_) => break,
            }
            done += extent.len;
        }
        Ok(found)
    }

    /// As [`Qcow2::extent`], no further than the end of the cluster.
    fn extent_in_cluster(&self, offset: u64, len: u64) -> Result<Option<Extent>, Damage> {
        let cluster = offset >> self.geometry.cluster_bits;
        let Some(mapping) = self.mapping(cluster)? else {
            return Ok(None);
        };
        let within = self.geometry.in_cluster(offset);
        let mut len = len.min(self.geometry.cluster_size() - within);
        let place = match mapping {
            Mapping::Unallocated => Place::Backing,
            Mapping::Zero { .. } => Place::Zero,
            Mapping::Data { host, copied } => Place::Data {
                host: host + within,
                ours: copied,
            },
            Mapping::Compressed { offset, len } => Place::Compressed { offset, len },
            Mapping::Subclusters {
                host,
                copied,
                allocated,
                zero,
            } => {
                let bits = self.geometry.subcluster_bits();
                let first = (within >> bits) as u32;
                let kind = |at: u32| (allocated >> at & 1, zero >> at & 1);
                let mut end = first + 1;
                while end < SUBCLUSTERS && kind(end) == kind(first) {
                    end += 1;
                }
                len = len.min((u64::from(end) << bits) - within);
                match (kind(first), host) {
                    ((1, _), Some(host)) => Place::Data {
                        host: host + within,
                        ours: copied,
                    },
                    ((_, 1), _) => Place::Zero,
                    _ => Place::Backing,
                }
            }
        };
        Ok(Some(Extent { place, len }))
    }

    /// Reads the slice that describes a cluster into memory; false if there is no table for it.
    pub(super) async fn load(&self, cluster: u64) -> io::Result<bool> {
        let slice = self.l2_slice(cluster);
        let _held = self.loading_l2.lock(slice..slice + 1).await;
        if self.l2.borrow().contains(slice) {
            return Ok(true);
        }
        let table = self.l1.borrow().at(self.l1_index_of_slice(slice)) & OFFSET_MASK;
        if table == 0 {
            return Ok(false);
        }
        if !self.l2.borrow_mut().make_room() {
            // All that is there must first be written, and may be written only in its order. Where
            // that fails the guest can still read: this slice is the first to go again.
            let _ = self.commit().await;
            self.l2.borrow_mut().make_room();
        }
        // Should the table be copied meanwhile, then the copy holds the same.
        let offset = table + self.offset_in_l2_table(slice);
        let bytes = self.read_metadata(offset).await?;
        self.l2.borrow_mut().insert(slice, bytes);
        Ok(true)
    }

    /// What the L2 entry of a cluster says, read from the file if need be.
    pub(super) async fn mapping_of(&self, cluster: u64) -> io::Result<Mapping> {
        loop {
            match self.mapping(cluster) {
                Ok(Some(mapping)) => return Ok(mapping),
                Ok(None) => drop(self.load(cluster).await?),
                Err(damage) => return Err(self.condemn(damage).await),
            }
        }
    }

    /// As [`Qcow2::extent`], read from the file if need be.
    pub(super) async fn extent_of(&self, offset: u64, len: u64) -> io::Result<Extent> {
        loop {
            match self.extent(offset, len) {
                Ok(Some(extent)) => return Ok(extent),
                Ok(None) => drop(self.load(offset >> self.geometry.cluster_bits).await?),
                Err(damage) => return Err(self.condemn(damage).await),
            }
        }
    }

    /// Changes L2 entries of one slice, of a table that is ours.
    pub(super) async fn set_entries(&self, first: u64, entries: &[Entry]) -> io::Result<()> {
        let slice = self.l2_slice(first);
        loop {
            if let Some(bytes) = self.l2.borrow_mut().bytes_mut(slice)? {
                for (cluster, entry) in (first..).zip(entries) {
                    let at = self.place_in_slice(cluster);
                    bytes[at..at + 8].copy_from_slice(&entry.descriptor.to_be_bytes());
                    if self.geometry.extended {
                        bytes[at + 8..at + 16].copy_from_slice(&entry.bitmap.to_be_bytes());
                    }
                }
                return Ok(());
            }
            if !self.load(first).await? {
                return Err(io::Error::other("an L2 table is gone"));
            }
        }
    }

    /// Makes the L2 table that describes a cluster one that is there, and that nothing but the
    /// active L1 table refers to.
    pub(super) async fn own_l2_table(&self, cluster: u64) -> io::Result<()> {
        let index = self.l1_index_of_slice(self.l2_slice(cluster));
        if self.l1.borrow().at(index) & COPIED != 0 {
            return Ok(());
        }
        let _held = self.tables.lock(index..index + 1).await;
        let old = self.l1.borrow().at(index);
        if old & COPIED != 0 {
            return Ok(());
        }
        let new = self.allocate(1).await?;
        let host = new.start << self.geometry.cluster_bits;
        let len = self.geometry.cluster_size();
        let old_host = old & OFFSET_MASK;
        let filled = match (old_host, new.zero) {
            (0, true) => Ok(()),
            (0, false) => self.file.write_zeroes(host, len, false).await,
            _ => self.copy_table(old_host, host).await,
        };
        if let Err(error) = filled {
            self.give_back(new);
            return Err(error);
        }
        // Only now may a slice of the old table be taken for one of the new one.
        self.places.borrow_mut().add(new.start..new.start + 1);
        self.l1.borrow_mut().set(index, host | COPIED);
        if old_host != 0 {
            let old = old_host >> self.geometry.cluster_bits;
            self.places.borrow_mut().remove(&(old..old + 1));
            self.unlink(old, 1);
        }
        Ok(())
    }

    /// Copies an L2 table that a snapshot refers to as well.
    async fn copy_table(&self, from: u64, to: u64) -> io::Result<()> {
        let len = self.geometry.cluster_size();
        let memory = Segments::from_buffer(Buffer::zeroed(len as usize, 4096)?);
        self.file.read_zero_filled(from, memory.clone()).await?;
        self.file.write(to, memory).await
    }

    /// Reads one slice of metadata.
    pub(super) async fn read_metadata(&self, offset: u64) -> io::Result<Buffer> {
        let len = 1 << self.slice_bits;
        let memory = Segments::from_buffer(Buffer::zeroed(len, len)?);
        self.file.read_zero_filled(offset, memory.clone()).await?;
        owned(memory)
    }
}

/// The big-endian number at `at`; 0 past the end.
pub(super) fn number_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    if let Some(found) = bytes.get(at..at + 8) {
        number.copy_from_slice(found);
    }
    u64::from_be_bytes(number)
}
