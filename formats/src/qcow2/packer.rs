//! Filling a new image from its first cluster to its last, in one go: what `convert` does.
//!
//! Nobody else uses the image yet, and if the host fails it is thrown away. So nothing is written
//! in the order that an image in use needs: everything is appended, each table when it is full,
//! and what the header refers to comes last.

mod refcounts;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::create::CreateOptions;
use super::entry::{COMPRESSED, COPIED, Entry, Geometry, OFFSET_MASK};
use super::header::{Header, MAX_HEADER};
use super::map::number_at;
use super::read::owned;
use super::{Compression, Preallocation};
use crate::host_file::text;
use crate::{Buffer, HostFile, Image, OpenError, Ring, Segments};

/// Compressed clusters are written so many bytes at a time.
const STAGED: usize = 1 << 20;
/// Where the header has the refcount table's offset and, behind it, its length.
const REFCOUNT_TABLE_FIELD: u64 = 48;

/// A new image that is being filled. Clusters are given in the disk's order, each once.
pub(crate) struct Packer {
    /// Written with plain calls: an engine would have another thread make each, while the one that
    /// fills the image has nothing else to do.
    file: File,
    /// The same file, with the image's lock.
    _held: HostFile,
    header: Header,
    geometry: Geometry,
    l1: Vec<u64>,
    /// The L2 table that clusters are now entered into: its index, and its bytes.
    table: Option<(u64, Vec<u8>)>,
    /// In bytes, where nothing is yet. Within a cluster only while compressed ones are appended.
    end: u64,
    /// What was appended last and is not written yet: it ends at `end`.
    staged: Vec<u8>,
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
            staged: Vec::with_capacity(STAGED),
            first_counts: vec![0; 1 << geometry.refcount_block_bits()],
            counts: Vec::new(),
            counted: 1,
            blocks: blocks.take_while(|block| *block != 0).collect(),
            refcount_table,
            file: File::from(file.file().as_fd().try_clone_to_owned()?),
            _held: file,
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
    pub(crate) fn data(&mut self, offset: u64, mut from: &[u8]) -> io::Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut cluster = offset >> bits;
        while !from.is_empty() {
            self.enter(cluster)?;
            self.align()?;
            let left = (1 << self.geometry.l2_bits()) - self.index(cluster) as u64;
            let count = left.min((from.len() >> bits) as u64);
            let host = self.append(count)?;
            let (part, rest) = from.split_at((count << bits) as usize);
            self.file.write_all_at(part, host)?;
            from = rest;
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
    pub(crate) fn compressed(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let bits = self.geometry.cluster_bits;
        let cluster = offset >> bits;
        self.enter(cluster)?;
        let most = self.geometry.max_refcount().min(u16::MAX.into()) as u16;
        if !self.end.is_multiple_of(self.cluster_size()) && self.count_of(self.end >> bits) >= most
        {
            self.align()?;
        }
        let at = self.end;
        let end = at + bytes.len() as u64;
        // The number of further sectors stands above the offset.
        let shift = 62 - (bits - 8);
        if end > OFFSET_MASK.min((1 << shift) - 1) {
            return Err(Errno::FBIG.into());
        }
        self.stage(bytes)?;
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
    pub(crate) fn zeroes(&mut self, offset: u64) -> io::Result<()> {
        let cluster = offset >> self.geometry.cluster_bits;
        self.enter(cluster)?;
        self.set(cluster, Entry::zero(self.geometry, None));
        Ok(())
    }

    /// Writes all that refers to what was stored. Nothing is durable yet.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        self.close_table()?;
        self.align()?;
        let (offset, clusters) = self.write_refcounts()?;
        if offset != self.header.refcount_table_offset {
            let mut field = offset.to_be_bytes().to_vec();
            field.extend((clusters as u32).to_be_bytes());
            self.file.write_all_at(&field, REFCOUNT_TABLE_FIELD)?;
        }
        self.write_numbers(self.header.l1_table_offset, &self.l1)?;
        self.file.set_len(self.end)
    }

    /// Makes the L2 table that a cluster belongs to the one that is entered into.
    fn enter(&mut self, cluster: u64) -> io::Result<()> {
        let index = cluster >> self.geometry.l2_bits();
        if self.table.as_ref().is_some_and(|(now, _)| *now == index) {
            return Ok(());
        }
        let mut bytes = self.close_table()?;
        bytes.clear();
        bytes.resize(self.cluster_size() as usize, 0);
        self.table = Some((index, bytes));
        Ok(())
    }

    /// Writes the L2 table, and refcount blocks that are complete. Returns the table's memory.
    fn close_table(&mut self) -> io::Result<Vec<u8>> {
        let Some((index, bytes)) = self.table.take() else {
            return Ok(Vec::new());
        };
        self.align()?;
        let host = self.append(1)?;
        self.file.write_all_at(&bytes, host)?;
        let Some(entry) = self.l1.get_mut(index as usize) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        *entry = host | COPIED;
        self.write_complete_counts()?;
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
    fn stage(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let len = bytes.len().min(STAGED - self.staged.len());
            let (now, later) = bytes.split_at(len);
            self.staged.extend_from_slice(now);
            self.end += len as u64;
            bytes = later;
            if self.staged.len() == STAGED {
                self.write_staged()?;
            }
        }
        Ok(())
    }

    fn write_staged(&mut self) -> io::Result<()> {
        let offset = self.end - self.staged.len() as u64;
        self.file.write_all_at(&self.staged, offset)?;
        self.staged.clear();
        Ok(())
    }

    /// Goes on with a whole cluster.
    fn align(&mut self) -> io::Result<()> {
        self.write_staged()?;
        self.end = self.end.next_multiple_of(self.cluster_size());
        Ok(())
    }

    /// Writes a table.
    fn write_numbers(&self, offset: u64, numbers: &[u64]) -> io::Result<()> {
        let bytes: Vec<u8> = numbers
            .iter()
            .flat_map(|number| number.to_be_bytes())
            .collect();
        self.file.write_all_at(&bytes, offset)
    }
}

async fn read(file: &HostFile, offset: u64, len: usize) -> io::Result<Buffer> {
    let memory = Segments::from_buffer(Buffer::zeroed(len, 4096)?);
    file.read_zero_filled(offset, memory.clone()).await?;
    owned(memory)
}
