//! qcow2 images, versions 2 and 3, as QEMU's `docs/interop/qcow2` specifies them.
//!
//! The way of a request: `read` and `write` look the disk's offset up in cached L2 entries (`map`)
//! and go straight to the file. A write to what is not the disk's own yet gets clusters (`alloc`),
//! which are referred to once the data is written. Tables stay in memory (`slices`, `table`) until
//! a flush writes them in the order that keeps the image valid at every instant (`commit`).

mod alloc;
mod backing;
mod blank;
mod check;
mod commit;
mod compressed;
mod content;
mod create;
mod entry;
mod epochs;
mod full;
#[cfg(any(test, all(fuzzing, feature = "faults")))]
#[doc(hidden)]
pub mod fuzzing;
pub mod header;
mod join;
mod locks;
mod map;
mod open;
mod packer;
mod places;
mod read;
mod refcount;
mod refcounts;
mod repair;
mod resize;
mod slices;
pub mod snapshot;
pub mod snapshots;
mod table;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod write;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;

pub use check::{CheckError, Problem, ProblemKind, Report, check};
pub use compressed::Encoder;
pub use create::{Backing, CreateOptions, DataFile, OPTIONS, Preallocation, create};
pub use header::{Compression, Header};
pub(crate) use packer::Packer;
pub use repair::{Repair, repair};
pub use snapshot::Snapshot;

use crate::{Disk, Extent, Format, HostFile, Limits, Pending, Segments};
use alloc::Alloc;
use commit::Damage;
use entry::Geometry;
use epochs::Epochs;
use locks::Locks;
use places::Places;
use read::Decoded;
use slices::Slices;
use table::Table;

inventory::submit! {
    Format {
        name: "qcow2",
        extensions: &["qcow2"],
        description: "QEMU's format: thin, with backing files, snapshots and compressed clusters",
        abilities: &["backing", "discard", "resize", "snapshots"],
        options: OPTIONS,
        open: |ring, image| Box::pin(open::open(ring, image)),
        create: |image| create(&image.path, &CreateOptions::from_image(image)?),
    }
}

/// An open image.
struct Qcow2 {
    file: HostFile,
    /// What data clusters lie in, if not in `file`.
    data: Option<HostFile>,
    /// What is seen where the image has nothing.
    backing: Option<Box<dyn Disk>>,
    geometry: Geometry,
    /// log2 of the size of a slice of an L2 table or refcount block.
    slice_bits: u32,
    ro: bool,
    sparse: bool,
    block_size: u32,
    /// Size of the disk.
    size: Cell<u64>,
    head: RefCell<Head>,
    l1: RefCell<Table>,
    refcount_table: RefCell<Table>,
    /// Slices of L2 tables, by the part of the disk that they describe.
    l2: RefCell<Slices>,
    /// Slices of refcount blocks, by the clusters that they count.
    refcounts: RefCell<Slices>,
    alloc: RefCell<Alloc>,
    places: RefCell<Places>,
    decoded: RefCell<Decoded>,
    epochs: Epochs,

    /// What is freed goes back to the host, although the image is fully allocated.
    giving_back: Cell<bool>,
    // Where several of these locks are held, they were taken in the order in which they stand.
    resizing: Locks,
    /// Clusters of the disk whose L2 entries are about to change.
    clusters: Locks,
    /// L1 entries whose L2 tables are being made.
    tables: Locks,
    /// L2 slices that are being read.
    loading_l2: Locks,
    allocating: Locks,
    committing: Locks,
    retiring: Locks,
    /// Slices of refcounts that are being read.
    loading_refcounts: Locks,
    writing_refcounts: Locks,
    changing_header: Locks,

    commits_begun: Cell<u64>,
    /// The number of the last commit that succeeded.
    committed: Cell<u64>,
    /// A commit under way writes tables that say where the guest's data lies.
    writing_tables: Cell<bool>,
    /// Damage was met: the disk is changed no more, and no cluster is freed.
    condemned: Cell<bool>,
    /// Clusters could not be freed, the last time that was tried.
    retire_failed: Cell<bool>,
}

/// The header, and the first bytes of the file, as they are on the host.
struct Head {
    header: Header,
    bytes: Vec<u8>,
}

impl Disk for Qcow2 {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn limits(&self) -> Limits {
        self.limits_now()
    }

    fn read(&self, offset: u64, to: Segments) -> Pending<'_> {
        self.read_at(offset, to)
    }

    fn write(&self, offset: u64, from: Segments) -> Pending<'_> {
        self.write_at(offset, from)
    }

    fn extent(&self, offset: u64, len: u64) -> Pending<'_, Extent> {
        Box::pin(self.content(offset, len))
    }

    fn flush(&self) -> Pending<'_> {
        match self.ro {
            true => Box::pin(std::future::ready(Ok(()))),
            false => Box::pin(self.commit()),
        }
    }

    fn volatile(&self) -> bool {
        self.is_volatile()
    }

    fn discard(&self, offset: u64, len: u64) -> Pending<'_> {
        match self.sparse {
            true => Box::pin(self.discard_range(offset, len)),
            false => Box::pin(std::future::ready(Err(io::ErrorKind::Unsupported.into()))),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Pending<'_> {
        Box::pin(self.zero_range(offset, len, unmap))
    }

    fn resize(&self, size: u64) -> Pending<'_> {
        Box::pin(self.resize_to(size))
    }

    fn close(self: Box<Self>) -> Pending<'static> {
        Box::pin(async move {
            let closed = match self.ro {
                true => Ok(()),
                false => self.finish().await,
            };
            match self.backing {
                Some(backing) => closed.and(backing.close().await),
                None => closed,
            }
        })
    }
}

/// Why an image is not used: what is wrong with it, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Lower case; begins with "it" or "its", the image.
    pub message: String,
    /// What to do, if there is something to say.
    pub help: Option<String>,
}

impl Refusal {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Refusal {
            message: message.into(),
            help: None,
        }
    }

    pub(crate) fn help(self, help: impl Into<String>) -> Self {
        Refusal {
            help: Some(help.into()),
            ..self
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}
