//! The host file or block device that an image lies in.

mod create;
mod direct;
mod flush;
mod lock;
mod locked;
mod open;
mod sniff;
mod space;

use std::cell::{Cell, OnceCell};
use std::future::Future;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::{Buffer, File, Pending, Ring, Segments, Whole};
use direct::Alignment;
use flush::Flushes;

pub use create::create_file;
pub(crate) use locked::LockedFile;
pub(crate) use open::{Size, text};
pub use sniff::sniff;

/// An open host file or block device, with the locks of its image.
///
/// What O_DIRECT cannot take where it lies in memory is copied, never refused.
pub struct HostFile {
    ring: Ring,
    file: File,
    path: PathBuf,
    size: Cell<u64>,
    kind: Kind,
    /// Where the host has said last that there is data.
    data: Cell<(u64, u64)>,
    /// What O_DIRECT demands, if the file is open with it.
    direct: Option<Alignment>,
    /// The unit that the host frees, and handles best.
    block: u32,
    flushes: Flushes,
    /// Zeroes to write where the host cannot make them.
    zeroes: OnceCell<Segments>,
    /// The host has said that it cannot punch holes here.
    no_punch: Cell<bool>,
    /// The host has said that it cannot make zeroes here.
    no_zero_range: Cell<bool>,
}

/// What an image lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Regular,
    Device,
}

impl HostFile {
    /// A file of `size` zero bytes without a name in a directory, which vanishes with the last
    /// reference to it.
    pub fn temporary(ring: &Ring, directory: &Path, size: u64) -> io::Result<HostFile> {
        let fd = create::nameless(directory)?;
        rustix::fs::ftruncate(&fd, size)?;
        let stat = rustix::fs::fstat(&fd)?;
        Ok(HostFile {
            ring: ring.clone(),
            file: fd.into(),
            path: directory.into(),
            size: Cell::new(size),
            kind: Kind::Regular,
            data: Cell::new((0, 0)),
            direct: None,
            block: u32::try_from(stat.st_blksize).unwrap_or(4096),
            flushes: Flushes::new(true),
            zeroes: OnceCell::new(),
            no_punch: Cell::new(false),
            no_zero_range: Cell::new(false),
        })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size.get()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.kind == Kind::Device
    }

    /// The ring that carries out its operations.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The open file, for operations of the ring itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What offset and length of a transfer must be multiples of: 1 unless O_DIRECT demands
    /// more.
    pub fn alignment(&self) -> u32 {
        self.direct.map_or(1, |direct| direct.offset)
    }

    /// What the address of memory is best a multiple of: 1 unless O_DIRECT demands more.
    pub fn memory_alignment(&self) -> u32 {
        self.direct.map_or(1, |direct| direct.memory)
    }

    /// The size in bytes of I/O that the host handles best, and of what it frees.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// Fills all of `to` from `offset` on.
    pub fn read(&self, offset: u64, to: Segments) -> Transfer<'_> {
        match self.direct {
            Some(direct) if !direct.takes(&to) => {
                Transfer::Bounced(Box::pin(self.read_bounced(direct, offset, to)))
            }
            _ => Transfer::Plain(self.ring.read_exact_at(&self.file, offset, to)),
        }
    }

    /// Fills all of `to` from `offset` on; what lies past the end of the file reads as zeroes.
    pub async fn read_zero_filled(&self, offset: u64, mut to: Segments) -> io::Result<()> {
        let there = self.size().saturating_sub(offset).min(to.len() as u64);
        // O_DIRECT takes whole units only, and the last one may be cut short.
        let whole = there - there % u64::from(self.alignment());
        let part = to.split_to(whole as usize);
        if !part.is_empty() {
            self.read(offset, part).await?;
        }
        to.fill(0);
        if there > whole {
            let unit = self.alignment() as usize;
            let memory = Segments::from_buffer(Buffer::zeroed(unit, unit.max(4096))?);
            let read = self
                .ring
                .read_at(&self.file, offset + whole, memory.clone());
            let count = read.await?;
            to.copy_segments(&memory.slice(0, count));
        }
        Ok(())
    }

    /// Writes all of `from` at `offset`.
    pub fn write(&self, offset: u64, from: Segments) -> Transfer<'_> {
        match self.direct {
            Some(direct) if !direct.takes(&from) => {
                Transfer::Bounced(Box::pin(self.write_bounced(direct, offset, from)))
            }
            _ => Transfer::Plain(self.ring.write_all_at(&self.file, offset, from)),
        }
    }

    /// Changes the size of a file, or takes notice of that of a block device: then any other
    /// size than the device has is an error of kind [`io::ErrorKind::InvalidInput`].
    pub async fn resize(&self, size: u64) -> io::Result<()> {
        if !size.is_multiple_of(self.alignment().into()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match self.kind {
            Kind::Regular => {
                self.note_zeroing(self.size(), size);
                let truncate = move |file: BorrowedFd<'_>| Ok(rustix::fs::ftruncate(file, size)?);
                self.ring.call(&self.file, truncate).await?;
            }
            Kind::Device => {
                if open::length(&self.file)? != size {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
            }
        }
        self.size.set(size);
        Ok(())
    }
}

/// A transfer of a [`HostFile`]: whole or an error.
#[must_use = "a transfer begins when it is awaited"]
pub enum Transfer<'a> {
    /// The memory goes to the kernel as it is.
    Plain(Whole),
    /// By way of memory that O_DIRECT can take.
    Bounced(Pending<'a>),
}

impl Future for Transfer<'_> {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Transfer::Plain(whole) => Pin::new(whole).poll(cx),
            Transfer::Bounced(bounced) => bounced.as_mut().poll(cx),
        }
    }
}

#[cfg(test)]
mod tests;
