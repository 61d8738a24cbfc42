//! The digests that are known, by the identity of their files.
//!
//! The cache is a folder of small files, each for the files whose device and inode hash to it;
//! every line of one is a file's identity, its digest, and a check of the line. Whatever is not
//! as it was written counts for nothing: the worst that befalls is that a file is read again.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::OFlags;

use super::Digest;

/// Lines of one file; the oldest makes room. With 256 files that is 4096 digests, a megabyte.
const LINES: usize = 16;
/// More than any file of ours has.
const LONGEST: u64 = 8192;
/// How old the last change of a file must be: what is written within the same tick of the clock
/// leaves the times as they are, and that of some file systems ticks every two seconds.
const SETTLED: Duration = Duration::from_secs(2);

/// What tells a file from others, and from itself before a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// When content or attributes changed: that nobody can set.
    changed: (i64, i64),
}

impl Identity {
    /// That of a regular file; nothing tells the content of a block device.
    pub(super) fn of(file: &File) -> io::Result<Option<Identity>> {
        let meta = file.metadata()?;
        Ok(meta.is_file().then(|| Identity::from_metadata(&meta)))
    }

    fn from_metadata(meta: &Metadata) -> Identity {
        Identity {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    #[cfg(test)]
    pub(super) fn with_inode(self, inode: u64) -> Identity {
        Identity { inode, ..self }
    }

    /// Whether any write after `now` gives the file another identity.
    pub(super) fn has_settled(&self, now: SystemTime) -> bool {
        let (seconds, _) = self.changed;
        let Ok(seconds) = u64::try_from(seconds) else {
            return true;
        };
        // A second more: the nanoseconds.
        let settled = Duration::from_secs(seconds.saturating_add(1)).saturating_add(SETTLED);
        let now = now.duration_since(SystemTime::UNIX_EPOCH);
        now.is_ok_and(|now| now >= settled)
    }

    /// The start of its line.
    fn line(&self) -> String {
        let Identity {
            device,
            inode,
            size,
            modified,
            changed,
        } = self;
        format!(
            "{device} {inode} {size} {}.{:09} {}.{:09} ",
            modified.0, modified.1, changed.0, changed.1
        )
    }

    /// The start of the lines that this file has ever had.
    fn name(&self) -> String {
        format!("{} {} ", self.device, self.inode)
    }
}

/// The cache, if there is a place for it.
pub(super) struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// The user's own.
    pub(super) fn of_user() -> Cache {
        Cache {
            folder: crate::cache::folder("digests"),
        }
    }

    #[cfg(test)]
    pub(super) fn in_folder(folder: &Path) -> Cache {
        Cache {
            folder: Some(folder.to_owned()),
        }
    }

    #[cfg(test)]
    pub(super) fn none() -> Cache {
        Cache { folder: None }
    }

    /// The digest of a file, if it is known.
    pub(super) fn find(&self, identity: &Identity) -> Option<Digest> {
        let folder = self.folder.as_deref()?;
        if !is_ours_alone(folder) {
            return None;
        }
        let text = lines(&folder.join(slot(identity)))?;
        let start = identity.line();
        let mut known = text.lines().filter(|line| line.starts_with(&start));
        checked(known.next()?)?.strip_prefix(&start)?.parse().ok()
    }

    /// Keeps a digest. That it cannot be kept is no error.
    pub(super) fn keep(&self, identity: &Identity, digest: Digest) {
        if let Some(folder) = &self.folder
            && let Err(error) = add(folder, identity, digest)
        {
            tracing::debug!("cannot keep a digest in {}: {error}", folder.display());
        }
    }
}

fn add(folder: &Path, identity: &Identity, digest: Digest) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    if !is_ours_alone(folder) {
        return Err(io::Error::other("others can write to it"));
    }
    let path = folder.join(slot(identity));
    let old = lines(&path).unwrap_or_default();
    let line = format!("{}{digest}", identity.line());
    let mut text = format!("{line} {}\n", check(&line));
    let others = old
        .lines()
        .filter(|line| !line.starts_with(&identity.name()) && checked(line).is_some());
    for line in others.take(LINES - 1) {
        text.push_str(line);
        text.push('\n');
    }
    replace(&path, &text)
}

/// Whether nobody else can write to a folder.
fn is_ours_alone(folder: &Path) -> bool {
    let us = rustix::process::geteuid().as_raw();
    fs::metadata(folder)
        .is_ok_and(|meta| meta.is_dir() && meta.uid() == us && meta.mode() & 0o022 == 0)
}

/// The name of the file for the files like this one.
pub(super) fn slot(identity: &Identity) -> String {
    let Digest([first, ..]) = Digest::of_bytes(identity.name().as_bytes());
    format!("{first:02x}")
}

/// The text of one of our files.
fn lines(path: &Path) -> Option<String> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)
        .ok()?;
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).ok()?;
    Some(text)
}

/// What ends a line: a few digits of its own digest.
fn check(line: &str) -> String {
    let Digest([a, b, c, d, ..]) = Digest::of_bytes(line.as_bytes());
    format!("{a:02x}{b:02x}{c:02x}{d:02x}")
}

/// A line without its check, if that is right.
fn checked(line: &str) -> Option<&str> {
    let (line, found) = line.rsplit_once(' ')?;
    (found == check(line)).then_some(line)
}

/// Gives a file this text, at once: whoever reads it meanwhile finds all of the old one.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{count}", std::process::id()));
    let mut new = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    let written = new
        .write_all(text.as_bytes())
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}
