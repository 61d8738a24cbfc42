//! Disks whose changes are dropped: the image is only ever read.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;

use crate::host_file::{HostFile, Size, text};
use crate::{Disk, Extent, Format, Image, Limits, OpenError, Pending, Ring, Segments};

mod marks;

use marks::Marks;

/// A disk that begins as `base`, opened read-only from `image`, and keeps what is written to it
/// in a file without a name beside the image, which vanishes when the disk is dropped, or the
/// process ends in whatever way.
pub fn ephemeral(
    ring: &Ring,
    image: &Image,
    base: Box<dyn Disk>,
) -> Result<Box<dyn Disk>, OpenError> {
    let changes = temporary(ring, image, base.size())?;
    Ok(Box::new(Ephemeral {
        shown: Cell::new(base.size()),
        base,
        changes,
        changed: RefCell::new(Marks::new(image.block_size)),
    }))
}

/// Opens an image as the base of an [`ephemeral`] disk. The image must exist; `image.size` may
/// be larger than it is, for the disk alone.
pub async fn open_ephemeral(
    format: &Format,
    ring: &Ring,
    image: &Image,
) -> Result<Box<dyn Disk>, OpenError> {
    let base = Image {
        ro: true,
        size: None,
        ..image.clone()
    };
    let base = (format.open)(ring, &base).await?;
    let has = base.size();
    let disk = ephemeral(ring, image, base)?;
    let Some(size) = image.size.filter(|size| *size != has) else {
        return Ok(disk);
    };
    let wrong = |message| OpenError {
        message,
        help: None,
        key: "size",
    };
    let (wanted, path) = (Size(size), image.path.display());
    if size < has {
        let help = "leave `size` out to use all of it";
        return Err(OpenError {
            help: Some(help.into()),
            ..wrong(format!(
                "`size` is {wanted}, but `{path}` has {}",
                Size(has)
            ))
        });
    }
    let failed = |error| {
        wrong(format!(
            "an ephemeral disk of {wanted} over `{path}` is not possible: {}",
            text(&error)
        ))
    };
    disk.resize(size).await.map_err(failed)?;
    Ok(disk)
}

fn temporary(ring: &Ring, image: &Image, size: u64) -> Result<HostFile, OpenError> {
    let beside = image
        .path
        .parent()
        .filter(|path| !path.as_os_str().is_empty());
    let beside = beside.unwrap_or(Path::new("."));
    // An image may lie where nobody may write; /dev is no place for files.
    let elsewhere = std::env::var_os("TMPDIR").unwrap_or("/var/tmp".into());
    let places = [beside, elsewhere.as_ref()];
    let device = std::fs::metadata(&image.path).is_ok_and(|meta| !meta.is_file());
    let mut error = io::ErrorKind::NotFound.into();
    for place in &places[usize::from(device)..] {
        match HostFile::temporary(ring, place, size) {
            Ok(file) => return Ok(file),
            Err(refused) => error = refused,
        }
    }
    Err(OpenError {
        message: format!(
            "cannot create a temporary file beside `{}` or in `{}`: {}",
            image.path.display(),
            places[1].display(),
            text(&error)
        ),
        help: Some("set TMPDIR to a directory on a disk with space for the changes".into()),
        key: OpenError::HOST,
    })
}

struct Ephemeral {
    base: Box<dyn Disk>,
    /// From here on nothing of the base is to be seen: it ends, or the disk did once.
    shown: Cell<u64>,
    changes: HostFile,
    /// The blocks that are to be found among the changes.
    changed: RefCell<Marks>,
}

impl Ephemeral {
    /// Whether what lies at `offset` is to be found among the changes, and for how many of `len`
    /// bytes that is so.
    fn run(&self, offset: u64, len: u64) -> (bool, u64) {
        match self.shown.get().saturating_sub(offset) {
            0 => (true, len),
            shown => self.changed.borrow().run(offset, len.min(shown)),
        }
    }

    async fn read_runs(&self, mut offset: u64, mut to: Segments) -> io::Result<()> {
        while !to.is_empty() {
            let (changed, len) = self.run(offset, to.len() as u64);
            let part = to.split_to(len as usize);
            match changed {
                true => self.changes.read(offset, part).await?,
                false => self.base.read(offset, part).await?,
            }
            offset += len;
        }
        Ok(())
    }
}

impl Disk for Ephemeral {
    fn size(&self) -> u64 {
        self.changes.size()
    }

    fn limits(&self) -> Limits {
        Limits {
            discard_granularity: self.changes.block(),
            write_zeroes: true,
            resize: true,
            ..self.base.limits()
        }
    }

    fn read(&self, offset: u64, to: Segments) -> Pending<'_> {
        match self.run(offset, to.len() as u64) {
            (true, len) if len == to.len() as u64 => Box::pin(self.changes.read(offset, to)),
            (false, len) if len == to.len() as u64 => self.base.read(offset, to),
            _ => Box::pin(self.read_runs(offset, to)),
        }
    }

    fn write(&self, offset: u64, from: Segments) -> Pending<'_> {
        Box::pin(async move {
            let len = from.len() as u64;
            self.changes.write(offset, from).await?;
            self.changed.borrow_mut().set(offset, len);
            Ok(())
        })
    }

    fn extent(&self, offset: u64, len: u64) -> Pending<'_, Extent> {
        match self.run(offset, len) {
            (true, len) => Box::pin(std::future::ready(self.changes.extent(offset, len))),
            (false, len) => self.base.extent(offset, len),
        }
    }

    fn flush(&self) -> Pending<'_> {
        // Nothing of this outlives the process.
        Box::pin(std::future::ready(Ok(())))
    }

    fn volatile(&self) -> bool {
        true
    }

    fn discard(&self, offset: u64, len: u64) -> Pending<'_> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Pending<'_> {
        Box::pin(async move {
            self.changes.write_zeroes(offset, len, unmap).await?;
            self.changed.borrow_mut().set(offset, len);
            Ok(())
        })
    }

    fn resize(&self, size: u64) -> Pending<'_> {
        Box::pin(async move {
            if !self.changed.borrow().is_whole(size) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            self.changes.resize(size).await?;
            // What was cut off must not come back from the image.
            self.shown.set(self.shown.get().min(size));
            Ok(())
        })
    }

    fn close(self: Box<Self>) -> Pending<'static> {
        self.base.close()
    }
}

#[cfg(test)]
mod tests;
