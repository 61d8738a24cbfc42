//! Raw images: the bytes of the disk and nothing else, fully allocated or thin.

use std::io;
use std::time::Instant;

use crate::host_file::{self, HostFile, Size};
use crate::{Disk, Extent, Format, Image, Limits, OpenError, Pending, Progress, Ring, Segments};

inventory::submit! {
    Format {
        name: "raw",
        extensions: &["img", "raw"],
        description: "the bytes of the disk, fully allocated when it is opened",
        abilities: &["resize"],
        options: &[],
        open: |ring, image| Box::pin(open(ring, image, false)),
        create,
    }
}

inventory::submit! {
    Format {
        name: "sparse-raw",
        extensions: &[],
        description: "the bytes of the disk, thin: what the guest discards is freed",
        abilities: &["discard", "resize"],
        options: &[],
        open: |ring, image| Box::pin(open(ring, image, true)),
        create,
    }
}

/// An open raw image.
struct Raw {
    file: HostFile,
    sparse: bool,
    ro: bool,
    block_size: u32,
    discard_granularity: u32,
}

fn create(image: &Image) -> Result<(), OpenError> {
    let size = image.size.ok_or_else(|| OpenError {
        message: format!("`{}` has no `size`", image.path.display()),
        help: Some("say how large the new image is to be".into()),
        key: "size",
    })?;
    check_blocks(image, size, "size")?;
    host_file::create_file(&image.path, |file| Ok(rustix::fs::ftruncate(file, size)?))
}

async fn open(ring: &Ring, image: &Image, sparse: bool) -> Result<Box<dyn Disk>, OpenError> {
    let missing =
        std::fs::metadata(&image.path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    let created = missing && image.size.is_some() && !image.ro;
    if created {
        create(image)?;
    }
    let file = HostFile::open(ring, image)?;
    if !image.format_written {
        check_content(&file, image).await?;
    }
    let size = wanted_size(&file, image)?;
    let grown = match image.ro {
        true => Ok(()),
        false => grow(&file, size, sparse).await,
    };
    if let Err(error) = grown {
        if created {
            // It has not been there, and under the lock nobody else has come to use it.
            let _ = std::fs::remove_file(&image.path);
        }
        return Err(error);
    }
    let discard_granularity = match sparse && !image.ro {
        true => file.discard_granularity().await,
        false => 0,
    };
    Ok(Box::new(Raw {
        file,
        sparse,
        ro: image.ro,
        block_size: image.block_size,
        discard_granularity,
    }))
}

fn check_blocks(image: &Image, size: u64, key: &'static str) -> Result<(), OpenError> {
    let block_size = image.block_size;
    if size.is_multiple_of(block_size.into()) {
        return Ok(());
    }
    let path = image.path.display();
    Err(OpenError {
        message: match key {
            "size" => {
                format!("`size` is {size}, expected a multiple of `block_size`, {block_size}")
            }
            _ => format!(
                "`block_size` is {block_size}, but `{path}` has {size} bytes, no multiple of it"
            ),
        },
        help: match key {
            "size" => None,
            _ => {
                let next = size.next_multiple_of(block_size.into());
                Some(match image.ro {
                    true => format!("grow the file to {next} bytes: here it is only read"),
                    false => format!("add `size = {next}` to grow it to whole blocks"),
                })
            }
        },
        key,
    })
}

/// Refuses an image that looks like one of another format.
async fn check_content(file: &HostFile, image: &Image) -> Result<(), OpenError> {
    let path = image.path.display();
    let found = file.sniff().await.map_err(|error| OpenError {
        message: format!("cannot read `{path}`: {}", host_file::text(&error)),
        help: None,
        key: OpenError::HOST,
    })?;
    // A guest that encrypts its whole disk must boot again; there is no LUKS but on a raw disk.
    let Some(found) = found.filter(|found| *found != "luks") else {
        return Ok(());
    };
    let raw = "add `format = \"raw\"` if these bytes are the disk's own";
    Err(OpenError {
        message: format!("`{path}` begins like a {found} image, but its name makes it a raw one"),
        help: Some(match crate::find(found) {
            Some(_) => format!("add `format = \"{found}\"`, or {raw}"),
            None => format!("convert it to a raw image, or {raw}"),
        }),
        key: "format",
    })
}

/// The size that the image is to have.
fn wanted_size(file: &HostFile, image: &Image) -> Result<u64, OpenError> {
    let path = image.path.display();
    let has = file.size();
    let Some(size) = image.size else {
        check_blocks(image, has, "block_size")?;
        return Ok(has);
    };
    check_blocks(image, size, "size")?;
    let refused = |why: &str, help: &str| OpenError {
        message: format!(
            "`size` is {}, but `{path}` has {}{why}",
            Size(size),
            Size(has)
        ),
        help: Some(help.into()),
        key: "size",
    };
    match size.cmp(&has) {
        std::cmp::Ordering::Less => Err(refused(
            "",
            "leave `size` out to use all of it; an image is never shrunk by opening it",
        )),
        std::cmp::Ordering::Greater if file.is_device() => Err(refused(
            ", and a block device does not grow",
            "leave `size` out to use all of it",
        )),
        std::cmp::Ordering::Greater if image.ro => Err(refused(
            ", and a read-only image does not grow",
            "leave `size` out, or set `ro = false`",
        )),
        _ => Ok(size),
    }
}

/// Makes the image as large as it is to be; with `sparse` unset, allocates all of it.
async fn grow(file: &HostFile, size: u64, sparse: bool) -> Result<(), OpenError> {
    let path = file.path();
    if sparse && size > file.size() {
        return file.resize(size).await.map_err(|error| OpenError {
            message: format!(
                "cannot grow `{}` to {}: {}",
                path.display(),
                Size(size),
                host_file::text(&error)
            ),
            help: None,
            key: growth_key(&error),
        });
    }
    if sparse {
        return Ok(());
    }
    allocate(file, size).await.map_err(|error| OpenError {
        message: format!(
            "cannot allocate {} for `{}`: {}",
            Size(size),
            path.display(),
            host_file::text(&error)
        ),
        help: Some("free some space, or set `sparse = true`".into()),
        key: growth_key(&error),
    })
}

/// Allocates all of the image at its new size, and reports how far that is.
async fn allocate(file: &HostFile, size: u64) -> io::Result<()> {
    let start = Instant::now();
    let progress = |done| {
        file.ring().report(&Progress {
            path: file.path(),
            done,
            total: size,
            elapsed: start.elapsed(),
        });
    };
    file.allocate(size, progress).await
}

/// What is at fault if an image cannot become as large as it is to be.
fn growth_key(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        // Past what its file system, or RLIMIT_FSIZE, lets a file be.
        Some(libc::EFBIG) => "size",
        _ => OpenError::HOST,
    }
}

impl Disk for Raw {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn limits(&self) -> Limits {
        Limits {
            alignment: self.file.alignment(),
            memory_alignment: self.file.memory_alignment(),
            optimal_io: self.file.block(),
            discard_granularity: self.discard_granularity,
            write_zeroes: !self.ro,
            resize: !self.ro,
        }
    }

    fn read(&self, offset: u64, to: Segments) -> Pending<'_> {
        Box::pin(self.file.read(offset, to))
    }

    fn write(&self, offset: u64, from: Segments) -> Pending<'_> {
        Box::pin(self.file.write(offset, from))
    }

    fn extent(&self, offset: u64, len: u64) -> Pending<'_, Extent> {
        Box::pin(std::future::ready(self.file.extent(offset, len)))
    }

    fn flush(&self) -> Pending<'_> {
        match self.ro {
            true => Box::pin(std::future::ready(Ok(()))),
            false => Box::pin(self.file.flush()),
        }
    }

    fn volatile(&self) -> bool {
        false
    }

    fn discard(&self, offset: u64, len: u64) -> Pending<'_> {
        match self.discard_granularity {
            0 => Box::pin(std::future::ready(Err(io::ErrorKind::Unsupported.into()))),
            _ => Box::pin(self.file.discard(offset, len)),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Pending<'_> {
        // What is to stay fully allocated is not unmapped.
        Box::pin(self.file.write_zeroes(offset, len, unmap && self.sparse))
    }

    fn resize(&self, size: u64) -> Pending<'_> {
        Box::pin(async move {
            if !size.is_multiple_of(self.block_size.into()) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            match self.sparse || size <= self.size() {
                true => self.file.resize(size).await,
                false => allocate(&self.file, size).await,
            }
        })
    }

    fn close(self: Box<Self>) -> Pending<'static> {
        Box::pin(async move { self.flush().await })
    }
}

#[cfg(test)]
mod tests;
