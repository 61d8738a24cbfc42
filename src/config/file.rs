//! Brings a file's text into memory: bounded, and never from something that would block.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

use super::size;
use crate::{Error, Result};

/// The largest file that is read: far past any configuration that people or programs write.
const LIMIT: u64 = 1 << 20;

/// What is in a file.
pub(super) struct Content {
    pub(super) bytes: Vec<u8>,
    /// Which file it is, by whatever name: device and inode.
    pub(super) identity: (u64, u64),
}

/// The bytes of a regular file of at most [`LIMIT`] bytes.
pub(crate) fn text(path: &Path) -> Result<Vec<u8>> {
    Ok(read(path)?.bytes)
}

/// Reads a regular file of at most [`LIMIT`] bytes.
pub(super) fn read(path: &Path) -> Result<Content> {
    let shown = path.display();
    let failed = |errno: rustix::io::Errno| {
        let error = Error::usage(format!("cannot read {shown}: {errno}"));
        match errno {
            rustix::io::Errno::NOENT => error.help("name the TOML file of a VM"),
            _ => error,
        }
    };
    // Non-blocking: opening a FIFO must not wait for its writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => None,
        FileType::Directory => Some("a directory"),
        FileType::Fifo => Some("a FIFO"),
        FileType::Socket => Some("a socket"),
        FileType::CharacterDevice | FileType::BlockDevice => Some("a device"),
        _ => Some("no regular file"),
    };
    if let Some(kind) = kind {
        return Err(Error::usage(format!(
            "{shown} is {kind}, expected a TOML file"
        )));
    }
    let mut bytes = Vec::new();
    File::from(fd)
        .take(LIMIT + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::usage(format!("cannot read {shown}: {error}")))?;
    if bytes.len() as u64 > LIMIT {
        let limit = size::show(LIMIT);
        return Err(Error::usage(format!(
            "{shown} is larger than {limit}, the limit of a VM's file"
        )));
    }
    Ok(Content {
        bytes,
        identity: (stat.st_dev, stat.st_ino),
    })
}
