//! Memory that is a file: for what is made here and read as files are.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::MemfdFlags;

/// A file without a name, in memory, that is filled from its start.
pub(crate) struct Scratch {
    file: File,
    len: u64,
}

impl Scratch {
    /// An empty one; `name` is for who looks into /proc.
    pub(crate) fn new(name: &str) -> io::Result<Scratch> {
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
        Ok(Scratch {
            file: file.into(),
            len: 0,
        })
    }

    /// Adds these bytes at its end.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.len)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// The file, to be read from its start.
    pub(crate) fn into_file(self) -> File {
        self.file
    }
}
