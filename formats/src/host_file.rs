//! The host file or block device that an image lies in.

use std::cell::Cell;
use std::fs;
use std::io;

use crate::{File, Image, OpenError, Ring, Segments, Whole};

/// An open host file.
pub struct HostFile {
    ring: Ring,
    file: File,
    size: Cell<u64>,
}

impl HostFile {
    /// Opens the file of an image.
    pub async fn open(ring: &Ring, image: &Image) -> Result<HostFile, OpenError> {
        let failed = |error: io::Error| OpenError {
            message: format!("cannot open `{}`: {error}", image.path.display()),
            help: None,
            key: "path",
        };
        let file = fs::File::options()
            .read(true)
            .write(!image.ro)
            .open(&image.path)
            .map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        Ok(HostFile {
            ring: ring.clone(),
            file: file.into(),
            size: Cell::new(size),
        })
    }

    /// Creates the file of a raw image.
    pub fn create(image: &Image) -> Result<(), OpenError> {
        fs::File::create_new(&image.path)
            .and_then(|file| file.set_len(image.size.unwrap_or(0)))
            .map_err(|error| OpenError {
                message: format!("cannot create `{}`: {error}", image.path.display()),
                help: None,
                key: "path",
            })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size.get()
    }

    /// Fills `to` from `offset` on.
    pub fn read(&self, offset: u64, to: Segments) -> Whole {
        self.ring.read_exact_at(&self.file, offset, to)
    }

    /// Writes `from` at `offset`.
    pub fn write(&self, offset: u64, from: Segments) -> Whole {
        self.ring.write_all_at(&self.file, offset, from)
    }

    /// Makes every completed write durable.
    pub fn flush(&self) -> Whole {
        self.ring.fdatasync(&self.file)
    }

    /// Frees a range on the host; it reads as zeroes.
    pub fn punch(&self, offset: u64, len: u64) -> Whole {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.ring.fallocate(&self.file, mode, offset, len)
    }

    /// Makes a range read as zeroes.
    pub fn zero(&self, offset: u64, len: u64) -> Whole {
        let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        self.ring.fallocate(&self.file, mode, offset, len)
    }

    /// Changes the size of the file.
    pub async fn resize(&self, size: u64) -> io::Result<()> {
        self.ring
            .call(&self.file, move |file| {
                Ok(rustix::fs::ftruncate(file, size)?)
            })
            .await?;
        self.size.set(size);
        Ok(())
    }
}
