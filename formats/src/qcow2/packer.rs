//! Filling a new image from its first cluster to its last, in one go: what `convert` does.
//!
//! Nobody else uses the image yet, and if the host fails it is thrown away. So nothing is written
//! in the order that an image in use needs: everything is appended, each table when it is full,
//! and what the header refers to comes last.

use std::io;

use rustix::io::Errno;

use super::create::CreateOptions;
use super::entry::{COMPRESSED, COPIED, Entry, Geometry, OFFSET_MASK};
use super::header::{Header, MAX_HEADER};
use super::map::number_at;
use super::read::owned;
use super::{Compression, Preallocation, refcount};
use crate::host_file::text;
use crate::{Buffer, HostFile, Image, OpenError, Ring, Segments};

/// Compressed clusters are written so many bytes at a time.
const STAGED: usize = 1 << 20;
/// Where the header has the refcount table's offset and, behind it, its length.
const REFCOUNT_TABLE_FIELD: u64 = 48;

/// A new image that is being filled. Clusters are given in the disk's order, each once.
pub(crate) struct Packer {
    file: HostFile,
    header: Header,
    geometry: Geometry,
    l1: Vec<u64>,
    /// The L2 table that clusters are now entered into: its index, and its bytes.
    table: Option<(u64, Vec<u8>)>,
    /// In bytes, where nothing is yet. Within a cluster only while compressed ones are appended.
    end: u64,
    /// What was appended last and is not written yet: it ends at `end`.
    staged: Buffer,
    staged_len: usize,
    /// Refcounts of the clusters that the first refcount block is for, which are complete last.
    first_counts: Vec<u16>,
    /// Those of the blocks from `counted` on.
    counts: Vec<u16>,
    counted: u64,
    /// Offsets of the refcount blocks.
    blocks: Vec<u64>,
    /// Offset and number of clusters.
    refcount_table: (u64, u64),
}

impl Packer {
    /// Whether an image with these options can be filled in this way: its clusters must be there
    /// only when they are written, and in the image's own file.
    pub(crate) fn fits(image: &Image) -> Result<bool, OpenError> {
        let options = CreateOptions::from_image(image)?;
        Ok(options.preallocation == Preallocation::Off && options.data_file.is_none())
    }

    /// Opens an image that has just been created.
    pub(crate) async fn open(ring: &Ring, image: &Image) -> Result<Packer, OpenError> {
        let file = HostFile::open(ring, image)?;
        Packer::load(file).await.map_err(|error| OpenError {
            message: format!("cannot read `{}`: {}", image.path.display(), text(&error)),
            help: None,
            key: OpenError::HOST,
        })
    }

    async fn load(file: HostFile) -> io::Result<Packer> {
        let head = read(&file, 0, MAX_HEADER.min(file.size() as usize)).await?;
        let header = Header::parse(&head).map_err(io::Error::other)?;
        let geometry = Geometry::of(&header);
        let bits = geometry.cluster_bits;
        let refcount_table = (
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters),
        );
        let table = read(&file, refcount_table.0, (refcount_table.1 << bits) as usize).await?;
        let blocks = (0..table.len() / 8).map(|at| number_at(&table, at * 8) & OFFSET_MASK);
        let mut packer = Packer {
            l1: vec![0; header.l1_size as usize],
            table: None,
            end: file.size().next_multiple_of(1 << bits),
            staged: Buffer::zeroed(STAGED, 4096)?,
            staged_len: 0,
            first_counts: vec![0; 1 << geometry.refcount_block_bits()],
            counts: Vec::new(),
            counted: 1,
            blocks: blocks.take_while(|block| *block != 0).collect(),
            refcount_table,
            file,
            header,
            geometry,
        };
        // A new image has no cluster that is not in use.
        packer.count(0, packer.end >> bits, 1)?;
        Ok(packer)
    }

    /// The unit that it takes, in bytes.
    pub(crate) fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// How clusters are to be compressed.
    pub(crate) fn compression(&self) -> Compression {
        self.header.compression
    }

    /// Whether [`Packer::zeroes`] works.
    pub(crate) fn has_zeroes(&self) -> bool {
        self.geometry.version >= 3
    }

    /// Stores whole clusters from `offset` of the disk on.
    pub(crate) async fn data(&mut self, offset: u64, mut from: Segments) -> io::Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut cluster = offset >> bits;
        while !from.is_empty() {
            self.enter(cluster).await?;
            self.align().await?;
            let left = (1 << self.geometry.l2_bits()) - self.index(cluster) as u64;
            let count = left.min((from.len() >> bits) as u64);
            let host = self.append(count)?;
            let part = from.split_to((count << bits) as usize);
            self.file.write(host, part).await?;
            for at in 0..count {
                self.set(
                    cluster + at,
                    Entry::data(self.geometry, host + (at << bits)),
                );
            }
            cluster += count;
        }
        Ok(())
    }

    /// Stores a cluster that was compressed to `bytes`, fewer than a cluster has.
    pub(crate) async fn compressed(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let bits = self.geometry.cluster_bits;
        let cluster = offset >> bits;
        self.enter(cluster).await?;
        let most = self.geometry.max_refcount().min(u16::MAX.into()) as u16;
        if !self.end.is_multiple_of(self.cluster_size()) && self.count_of(self.end >> bits) >= most
        {
            self.align().await?;
        }
        let at = self.end;
        let end = at + bytes.len() as u64;
        // The number of further sectors stands above the offset.
        let shift = 62 - (bits - 8);
        if end > OFFSET_MASK.min((1 << shift) - 1) {
            return Err(Errno::FBIG.into());
        }
        self.stage(bytes).await?;
        let first = at >> bits;
        self.count(first, end.div_ceil(1 << bits) - first, 1)?;
        let sectors = (at % 512 + bytes.len() as u64 - 1) / 512;
        let descriptor = COMPRESSED | sectors << shift | at;
        self.set(
            cluster,
            Entry {
                descriptor,
                bitmap: 0,
            },
        );
        Ok(())
    }

    /// Has a cluster read as zeroes, whatever the backing file has.
    pub(crate) async fn zeroes(&mut self, offset: u64) -> io::Result<()> {
        let cluster = offset >> self.geometry.cluster_bits;
        self.enter(cluster).await?;
        self.set(cluster, Entry::zero(self.geometry, None));
        Ok(())
    }

    /// Writes all that refers to what was stored. Nothing is durable yet.
    pub(crate) async fn finish(&mut self) -> io::Result<()> {
        self.close_table().await?;
        self.align().await?;
        self.place_refcounts()?;
        let a_block = 1 << self.geometry.refcount_block_bits();
        self.write_counts(0, &self.first_counts).await?;
        for (number, counts) in (self.counted..).zip(self.counts.chunks(a_block)) {
            self.write_counts(number, counts).await?;
        }
        let (offset, clusters) = self.refcount_table;
        self.write_numbers(offset, &self.blocks).await?;
        if offset != self.header.refcount_table_offset {
            let mut field = offset.to_be_bytes().to_vec();
            field.extend((clusters as u32).to_be_bytes());
            self.write(REFCOUNT_TABLE_FIELD, &field).await?;
        }
        self.write_numbers(self.header.l1_table_offset, &self.l1)
            .await?;
        self.file.resize(self.end).await
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

    /// Makes the L2 table that a cluster belongs to the one that is entered into.
    async fn enter(&mut self, cluster: u64) -> io::Result<()> {
        let index = cluster >> self.geometry.l2_bits();
        if self.table.as_ref().is_some_and(|(now, _)| *now == index) {
            return Ok(());
        }
        let mut bytes = self.close_table().await?;
        bytes.clear();
        bytes.resize(self.cluster_size() as usize, 0);
        self.table = Some((index, bytes));
        Ok(())
    }

    /// Writes the L2 table, and refcount blocks that are complete. Returns the table's memory.
    async fn close_table(&mut self) -> io::Result<Vec<u8>> {
        let Some((index, bytes)) = self.table.take() else {
            return Ok(Vec::new());
        };
        self.align().await?;
        let host = self.append(1)?;
        self.write(host, &bytes).await?;
        let Some(entry) = self.l1.get_mut(index as usize) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        *entry = host | COPIED;
        let block_bits = self.geometry.refcount_block_bits();
        while self.end >> self.geometry.cluster_bits >= (self.counted + 1) << block_bits {
            while self.blocks.len() as u64 <= self.counted {
                let block = self.append(1)?;
                self.blocks.push(block);
            }
            let rest = self.counts.split_off(1 << block_bits);
            let complete = std::mem::replace(&mut self.counts, rest);
            self.write_counts(self.counted, &complete).await?;
            self.counted += 1;
        }
        Ok(bytes)
    }

    fn index(&self, cluster: u64) -> usize {
        (cluster & ((1 << self.geometry.l2_bits()) - 1)) as usize
    }

    fn set(&mut self, cluster: u64, entry: Entry) {
        let at = self.index(cluster) << self.geometry.l2_entry_bits();
        let Some((_, bytes)) = &mut self.table else {
            return;
        };
        bytes[at..at + 8].copy_from_slice(&entry.descriptor.to_be_bytes());
        if self.geometry.extended {
            bytes[at + 8..at + 16].copy_from_slice(&entry.bitmap.to_be_bytes());
        }
    }

    /// Takes whole clusters, of refcount 1, at the end. Returns their offset.
    fn append(&mut self, clusters: u64) -> io::Result<u64> {
        let bits = self.geometry.cluster_bits;
        let host = self.end;
        let end = host + (clusters << bits);
        if end > OFFSET_MASK {
            return Err(Errno::FBIG.into());
        }
        self.count(host >> bits, clusters, 1)?;
        self.end = end;
        Ok(host)
    }

    /// Appends bytes, to be written together with others.
    async fn stage(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let len = bytes.len().min(STAGED - self.staged_len);
            let (now, later) = bytes.split_at(len);
            self.staged[self.staged_len..][..len].copy_from_slice(now);
            self.staged_len += len;
            self.end += len as u64;
            bytes = later;
            if self.staged_len == STAGED {
                self.write_staged().await?;
            }
        }
        Ok(())
    }

    async fn write_staged(&mut self) -> io::Result<()> {
        if self.staged_len == 0 {
            return Ok(());
        }
        let buffer = std::mem::replace(&mut self.staged, Buffer::zeroed(0, 1)?);
        let memory = Segments::from_buffer(buffer);
        let len = std::mem::take(&mut self.staged_len);
        let written = self.file.write(self.end - len as u64, memory.slice(0, len));
        written.await?;
        self.staged = owned(memory)?;
        Ok(())
    }

    /// Goes on with a whole cluster.
    async fn align(&mut self) -> io::Result<()> {
        self.write_staged().await?;
        self.end = self.end.next_multiple_of(self.cluster_size());
        Ok(())
    }

    /// Raises the refcounts of clusters by one; with `by` 0, sets them to 0.
    fn count(&mut self, first: u64, clusters: u64, by: u16) -> io::Result<()> {
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

    fn count_of(&self, cluster: u64) -> u16 {
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
    async fn write_counts(&self, number: u64, counts: &[u16]) -> io::Result<()> {
        let Some(offset) = self.blocks.get(number as usize) else {
            return Ok(());
        };
        let mut bytes = vec![0; self.cluster_size() as usize];
        for (index, count) in counts.iter().enumerate() {
            let order = self.geometry.refcount_order;
            refcount::store(&mut bytes, order, index, (*count).into());
        }
        self.write(*offset, &bytes).await
    }

    /// Writes a table.
    async fn write_numbers(&self, offset: u64, numbers: &[u64]) -> io::Result<()> {
        let bytes: Vec<u8> = numbers
            .iter()
            .flat_map(|number| number.to_be_bytes())
            .collect();
        self.write(offset, &bytes).await
    }

    async fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut buffer = Buffer::zeroed(bytes.len(), 4096)?;
        buffer.copy_from_slice(bytes);
        self.file.write(offset, Segments::from_buffer(buffer)).await
    }
}

async fn read(file: &HostFile, offset: u64, len: usize) -> io::Result<Buffer> {
    let memory = Segments::from_buffer(Buffer::zeroed(len, 4096)?);
    file.read_zero_filled(offset, memory.clone()).await?;
    owned(memory)
}
