//! Disks whose changes are dropped: the image is only ever read.

use std::cell::RefCell;
use std::io;
use std::path::Path;

use crate::host_file::{HostFile, text};
use crate::{Disk, Image, Limits, OpenError, Pending, Ring, Segments};

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
        base,
        changes,
        changed: RefCell::new(Marks::new(image.block_size)),
    }))
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
        key: "ephemeral",
    })
}

struct Ephemeral {
    base: Box<dyn Disk>,
    changes: HostFile,
    /// The blocks that are to be found among the changes.
    changed: RefCell<Marks>,
}

impl Ephemeral {
    async fn read_runs(&self, mut offset: u64, mut to: Segments) -> io::Result<()> {
        while !to.is_empty() {
            let (changed, len) = self.changed.borrow().run(offset, to.len() as u64);
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
        match self.changed.borrow().run(offset, to.len() as u64) {
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

    fn flush(&self) -> Pending<'_> {
        // Nothing of this outlives the process.
        Box::pin(std::future::ready(Ok(())))
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
            let old = self.size();
            if !self.changed.borrow().is_whole(size) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            self.changes.resize(size).await?;
            // What was cut off must not come back from the image.
            let grown = size.saturating_sub(old);
            self.changed.borrow_mut().set(old, grown);
            Ok(())
        })
    }

    fn close(self: Box<Self>) -> Pending<'static> {
        self.base.close()
    }
}
