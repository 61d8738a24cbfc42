//! Raw images: the bytes of the disk and nothing else, fully allocated or thin.

use std::io;

use crate::host_file::HostFile;
use crate::{Disk, Format, Image, Limits, Opening, Pending, Ring, Segments};

inventory::submit! {
    Format {
        name: "raw",
        extensions: &["img", "raw"],
        description: "the bytes of the disk, fully allocated when it is opened",
        abilities: &["resize"],
        options: &[],
        open: |ring, image| open(ring, image, false),
        create: HostFile::create,
    }
}

inventory::submit! {
    Format {
        name: "sparse-raw",
        extensions: &[],
        description: "the bytes of the disk, thin: what is discarded becomes a hole",
        abilities: &["discard", "resize"],
        options: &[],
        open: |ring, image| open(ring, image, true),
        create: HostFile::create,
    }
}

fn open<'a>(ring: &'a Ring, image: &'a Image, sparse: bool) -> Opening<'a> {
    Box::pin(async move {
        let file = HostFile::open(ring, image).await?;
        Ok(Box::new(Raw { file, sparse }) as Box<dyn Disk>)
    })
}

/// An open raw image.
struct Raw {
    file: HostFile,
    sparse: bool,
}

impl Disk for Raw {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn limits(&self) -> Limits {
        Limits {
            alignment: 1,
            memory_alignment: 1,
            optimal_io: 4096,
            discard_granularity: if self.sparse { 4096 } else { 0 },
            write_zeroes: true,
            resize: true,
        }
    }

    fn read(&self, offset: u64, to: Segments) -> Pending<'_> {
        Box::pin(self.file.read(offset, to))
    }

    fn write(&self, offset: u64, from: Segments) -> Pending<'_> {
        Box::pin(self.file.write(offset, from))
    }

    fn flush(&self) -> Pending<'_> {
        Box::pin(self.file.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> Pending<'_> {
        if !self.sparse {
            return Box::pin(std::future::ready(Err(io::ErrorKind::Unsupported.into())));
        }
        Box::pin(self.file.punch(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Pending<'_> {
        Box::pin(self.file.zero(offset, len))
    }

    fn resize(&self, size: u64) -> Pending<'_> {
        Box::pin(self.file.resize(size))
    }

    fn close(self: Box<Self>) -> Pending<'static> {
        Box::pin(async move { self.file.flush().await })
    }
}
