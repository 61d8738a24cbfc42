//! SHA-256 digests of host files. One that is known already is not computed again.

mod cache;

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime};

use formats::Progress;
use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};

use crate::{Error, Result, initramfs, progress};
use cache::{Cache, Identity};

/// A SHA-256 digest. Written as 64 lower-case hex digits, read in either case.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of some bytes.
    pub fn of_bytes(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// Why a text is no [`Digest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotADigest {
    /// It has so many characters.
    Length(usize),
    /// It has this one.
    Character(char),
}

impl fmt::Display for NotADigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotADigest::Length(length) => {
                write!(f, "it has {length} characters, expected 64 hex digits")
            }
            NotADigest::Character(c) => write!(f, "it has {c:?} in it, expected 64 hex digits"),
        }
    }
}

impl std::error::Error for NotADigest {}

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Digest, NotADigest> {
        if let Some(c) = text.chars().find(|c| !c.is_ascii_hexdigit()) {
            return Err(NotADigest::Character(c));
        }
        let wrong = NotADigest::Length(text.len());
        if text.len() != 64 {
            return Err(wrong);
        }
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            let digits = text.get(2 * index..2 * index + 2).ok_or(wrong)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong)?;
        }
        Ok(Digest(bytes))
    }
}

/// The digest of a regular file, or of a block device.
///
/// That of a file which has not changed since is taken from the user's cache: what has changed,
/// its device, inode, size and times tell. What takes longer than a second shows its progress on
/// standard error.
///
/// # Errors
///
/// The file cannot be read, is neither a file nor a block device, or somebody writes it
/// meanwhile.
pub fn of(path: &Path) -> Result<Digest> {
    of_with(path, &Cache::of_user(), SystemTime::now, read)
}

/// The digest of what a VM reads as `key`, such as "boot.initrd", which may be a folder: its digest
/// is that of the archive that is booted.
///
/// # Errors
///
/// As those of [`of`], or what keeps the folder from being packed.
pub fn of_input(key: &str, path: &Path) -> Result<Digest> {
    if key != "boot.initrd" || !path.is_dir() {
        return of(path);
    }
    let failed = |error| Error::failed(format!("cannot read {}: {error}", path.display()));
    read(&mut initramfs::pack(path)?, path).map_err(failed)
}

/// The digest of a file that is open, as [`of`] has it; `path` is for messages. It is read from its
/// start afterwards.
///
/// # Errors
///
/// As those of [`of`].
pub(crate) fn of_open(file: &mut File, path: &Path) -> Result<Digest> {
    let digest = of_file(file, path, &Cache::of_user(), SystemTime::now, read)?;
    file.rewind().map_err(|error| unreadable(path, &error))?;
    Ok(digest)
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::failed(format!("cannot read {}: {error}", path.display()))
        .help("check the file and the host's disk")
}

/// How often a file is read that changes meanwhile.
const ATTEMPTS: usize = 3;

/// As [`of`], with this cache, this clock, and this way to read a file.
fn of_with(
    path: &Path,
    cache: &Cache,
    now: impl Fn() -> SystemTime,
    read: impl FnMut(&mut File, &Path) -> io::Result<Digest>,
) -> Result<Digest> {
    of_file(&mut open(path)?, path, cache, now, read)
}

fn of_file(
    file: &mut File,
    path: &Path,
    cache: &Cache,
    now: impl Fn() -> SystemTime,
    mut read: impl FnMut(&mut File, &Path) -> io::Result<Digest>,
) -> Result<Digest> {
    let failed = |error: io::Error| unreadable(path, &error);
    for _ in 0..ATTEMPTS {
        let seen = now();
        let before = Identity::of(file).map_err(failed)?;
        if let Some(known) = before.and_then(|identity| cache.find(&identity)) {
            return Ok(known);
        }
        let digest = read(file, path).map_err(failed)?;
        if Identity::of(file).map_err(failed)? != before {
            continue;
        }
        if let Some(identity) = before
            && identity.has_settled(seen)
        {
            cache.keep(&identity, digest);
        }
        return Ok(digest);
    }
    let message = format!("{} changes while it is read", path.display());
    Err(Error::failed(message).help("stop what writes it, or wait until it is complete"))
}

fn open(path: &Path) -> Result<File> {
    let shown = path.display();
    let failed = |error: io::Error| {
        Error::unopenable(&shown.to_string(), &error)
            .help("paths in a VM's file are relative to that file")
    };
    // A FIFO without a writer would block the opening: it is opened without waiting and refused.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map(File::from)
        .map_err(|error| failed(error.into()))?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(file);
    }
    let kind = match kind.is_dir() {
        true => "a directory",
        false => "a special file",
    };
    Err(Error::usage(format!(
        "{shown} is {kind}, expected a regular file"
    )))
}

/// Reads the whole file.
fn read(file: &mut File, path: &Path) -> io::Result<Digest> {
    const PIECE: usize = 1 << 20;
    const PAUSE: Duration = Duration::from_millis(50);
    let total = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    let show = progress::hashing();
    let start = Instant::now();
    let mut shown = Duration::ZERO;
    let mut hash = Sha256::new();
    let mut done = 0;
    let mut piece = vec![0; PIECE];
    loop {
        let count = match file.read(&mut piece) {
            Ok(0) => return Ok(Digest(hash.finalize().into())),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(&piece[..count]);
        done += count as u64;
        let elapsed = start.elapsed();
        if elapsed >= shown + PAUSE {
            shown = elapsed;
            show(&Progress {
                path,
                done: done.min(total),
                total,
                elapsed,
            });
        }
    }
}

#[cfg(test)]
mod tests;
