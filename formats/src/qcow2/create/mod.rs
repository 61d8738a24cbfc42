//! Creating an image: empty, or with its clusters allocated in advance.

mod check;
mod header;
mod image;
mod layout;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::Compression;
use super::entry::{COPIED, Entry, Geometry};
use super::refcount;
use crate::OpenError;
use crate::host_file::create_file;
pub use image::OPTIONS;
use layout::Layout;

/// How much is written at once.
const CHUNK: usize = 1 << 20;

/// What a new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes: a multiple of 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size: 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits: 0 to 6, 4 in version 2.
    pub refcount_order: u32,
    /// Clusters have 32 subclusters, which are allocated one by one.
    pub extended_l2: bool,
    /// How clusters that are compressed later will be.
    pub compression: Compression,
    /// Writers may postpone refcounts, and count anew after a crash.
    pub lazy_refcounts: bool,
    /// What is allocated in advance.
    pub preallocation: Preallocation,
    /// Where the bytes of unallocated clusters are.
    pub backing: Option<Backing>,
    /// Where the guest's data is, if not in the image itself.
    pub data_file: Option<DataFile>,
}

/// What of a new image is allocated in advance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Every cluster has its place; the file is sparse.
    Metadata,
    /// The file's blocks too, by fallocate(2).
    Falloc,
    /// The file's blocks too, by writing zeroes.
    Full,
}

/// The backing file of a new image. It is not opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name as the image has it: absolute, or relative to the image's directory.
    pub name: OsString,
    /// Name of its format.
    pub format: String,
}

/// The external data file of a new image, which is created with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Where it is created.
    pub path: PathBuf,
    /// Its name as the image has it, best absolute: programs differ in where a relative one
    /// begins.
    pub name: OsString,
    /// It is a raw image of the disk at all times.
    pub raw: bool,
}

impl CreateOptions {
    /// An image of `size` bytes as others make it who say nothing else: version 3, clusters of
    /// 64 KiB, refcounts of 16 bits.
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions {
            size,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            compression: Compression::Zlib,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
            backing: None,
            data_file: None,
        }
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            version: self.version,
            extended: self.extended_l2,
            external: self.data_file.is_some(),
        }
    }

    /// Whether every cluster of the guest has its place.
    fn allocates(&self) -> bool {
        // A raw data file is written at places that the image then knows of already.
        self.preallocation != Preallocation::Off
            || self.data_file.as_ref().is_some_and(|file| file.raw)
    }
}

/// Creates an image at `path`, which must not exist yet, and its data file if it has one. They
/// are there whole and durable, or after an error not at all.
pub fn create(path: &Path, options: &CreateOptions) -> Result<(), OpenError> {
    options.check()?;
    let layout = Layout::new(options.geometry(), options.size, options.allocates())?;
    let header = header::header(options, &layout).ok_or_else(|| check::no_room(options))?;
    if let Some(file) = &options.data_file {
        create_data_file(file, options)?;
    }
    let created = create_file(path, |file| fill(file, options, &layout, &header));
    if let Some(file) = options.data_file.as_ref().filter(|_| created.is_err()) {
        // We have just made it: nobody has come to use it.
        let _ = fs::remove_file(&file.path);
    }
    created
}

fn create_data_file(file: &DataFile, options: &CreateOptions) -> Result<(), OpenError> {
    let created = create_file(&file.path, |fd| {
        let len = options.size.next_multiple_of(1 << options.cluster_bits);
        // A raw image is as long as the disk.
        let len = if file.raw { options.size } else { len };
        rustix::fs::ftruncate(fd, len)?;
        allocate(fd, 0, len, options.preallocation)
    });
    created.map_err(|error| OpenError {
        key: match error.key {
            "path" => "data_file",
            key => key,
        },
        ..error
    })
}

fn fill(file: &OwnedFd, options: &CreateOptions, layout: &Layout, header: &[u8]) -> io::Result<()> {
    rustix::fs::ftruncate(file, layout.file_len())?;
    write_all(file, 0, header)?;
    let cluster_size = layout.geometry.cluster_size();
    let blocks = (0..layout.refcount_blocks)
        .map(|block| layout.refcount_blocks_offset() + block * cluster_size);
    write_entries(file, layout.refcount_table_offset(), blocks)?;
    write_ones(file, layout)?;
    if layout.l2 > 0 {
        let tables =
            (0..layout.l2).map(|table| (layout.l2_offset() + table * cluster_size) | COPIED);
        write_entries(file, layout.l1_offset(), tables)?;
        write_l2(file, options, layout)?;
    }
    let data = layout.data() << options.cluster_bits;
    allocate(file, layout.data_offset(), data, options.preallocation)
}

/// Writes a refcount of 1 for every cluster of the image.
fn write_ones(file: &OwnedFd, layout: &Layout) -> io::Result<()> {
    let order = layout.geometry.refcount_order;
    let a_chunk = CHUNK << 3 >> order;
    let mut chunk = vec![0; CHUNK];
    for index in 0..a_chunk {
        refcount::store(&mut chunk, order, index, 1);
    }
    let mut offset = layout.refcount_blocks_offset();
    let mut left = layout.clusters();
    while left > 0 {
        let now = left.min(a_chunk as u64) as usize;
        let len = (now << order).div_ceil(8);
        if now < a_chunk {
            // The last byte may have room for clusters that there are not.
            for index in now..(len << 3 >> order) {
                refcount::store(&mut chunk, order, index, 0);
            }
        }
        write_all(file, offset, &chunk[..len])?;
        offset += len as u64;
        left -= now as u64;
    }
    Ok(())
}

/// Writes L2 tables that map every cluster of the guest.
fn write_l2(file: &OwnedFd, options: &CreateOptions, layout: &Layout) -> io::Result<()> {
    let geometry = layout.geometry;
    let entry = |index: u64| {
        let host = layout.data_offset() + (index << geometry.cluster_bits);
        match options.backing {
            // The cluster has its place, but the backing file's bytes show through.
            Some(_) => Entry::subclusters(Some(host), 0, 0),
            None => Entry::data(geometry, host),
        }
    };
    let all = (0..layout.allocated).map(entry);
    match geometry.extended {
        true => {
            let words = all.flat_map(|entry| [entry.descriptor, entry.bitmap]);
            write_entries(file, layout.l2_offset(), words)
        }
        false => write_entries(file, layout.l2_offset(), all.map(|entry| entry.descriptor)),
    }
}

/// Writes big-endian numbers one after another.
fn write_entries(
    file: &OwnedFd,
    mut offset: u64,
    entries: impl Iterator<Item = u64>,
) -> io::Result<()> {
    let mut chunk = Vec::new();
    for entry in entries {
        chunk.extend(entry.to_be_bytes());
        if chunk.len() == CHUNK {
            write_all(file, offset, &chunk)?;
            offset += CHUNK as u64;
            chunk.clear();
        }
    }
    write_all(file, offset, &chunk)
}

/// Gives a part of the file its blocks, as far as that is wanted.
fn allocate(file: &OwnedFd, offset: u64, len: u64, how: Preallocation) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    match how {
        Preallocation::Off | Preallocation::Metadata => return Ok(()),
        Preallocation::Falloc => loop {
            match rustix::fs::fallocate(file, FallocateFlags::empty(), offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                // Not every file system can: zeroes are as good.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
                Err(errno) => return Err(errno.into()),
            }
        },
        Preallocation::Full => {}
    }
    let zeroes = vec![0; CHUNK];
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let now = (end - at).min(CHUNK as u64);
        write_all(file, at, &zeroes[..now as usize])?;
        at += now;
    }
    Ok(())
}

fn write_all(file: &OwnedFd, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(len) => {
                bytes = &bytes[len..];
                offset += len as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
