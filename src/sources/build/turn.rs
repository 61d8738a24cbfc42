//! Whose turn it is to run a command: one at a time does, and what a command that was interrupted
//! has begun is known as such.
//!
//! While a command runs there is a file for it in the user's cache, locked, that says how the files
//! it makes were before. One that nobody has locked is that of a command which was interrupted.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::{Errno, retry_on_intr};

use super::Which;
use crate::digest::Digest;
use crate::{cache, messages};

/// The turn to run a command.
pub(super) struct Turn {
    path: PathBuf,
    file: File,
    /// What the one before, which was interrupted, has left.
    left: String,
}

impl Turn {
    /// Whether somebody runs the command, or was interrupted.
    pub(super) fn is_taken(which: Which<'_>) -> bool {
        place(which).is_some_and(|path| path.exists())
    }

    /// Waits until nobody else runs the command. `None` where nothing can be kept: what can be
    /// built is built all the same.
    pub(super) fn take(which: Which<'_>, shown: &str) -> Option<Turn> {
        let path = place(which)?;
        let taken = Turn::lock(&path, shown);
        let warn = |error: &io::Error| {
            tracing::warn!(
                "cannot lock {}: {error}: two launchers may build the same at once",
                path.display()
            );
        };
        taken.inspect_err(warn).ok()
    }

    fn lock(path: &Path, shown: &str) -> io::Result<Turn> {
        if let Some(folder) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)?;
        }
        loop {
            let file = File::options()
                .read(true)
                .append(true)
                .create(true)
                .mode(0o600)
                .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32)
                .open(path)?;
            let locked = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {
                    messages::say(format_args!(
                        "launcher: waiting for another launcher that builds: {shown}"
                    ));
                    retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
                }
                other => other,
            };
            locked?;
            // Whoever ends a turn removes its file.
            let own = file.metadata()?;
            let same = |there: Metadata| (there.dev(), there.ino()) == (own.dev(), own.ino());
            if fs::symlink_metadata(path).is_ok_and(same) {
                let mut left = Vec::new();
                (&file).take(LONGEST).read_to_end(&mut left)?;
                return Ok(Turn {
                    path: path.to_owned(),
                    file,
                    left: String::from_utf8_lossy(&left).into_owned(),
                });
            }
        }
    }

    /// Whether the one before was interrupted, and has begun this file.
    pub(super) fn has_begun(&self, path: &Path) -> bool {
        let name = name(path);
        let mut lines = self.left.lines().filter_map(|line| line.split_once(' '));
        let before = lines.find(|(of, _)| *of == name);
        before.is_some_and(|(_, before)| State::of(path).is_begun_since(before))
    }

    /// Notes how files are before the command runs.
    pub(super) fn note(&mut self, files: &[(&Path, State)]) {
        let lines = files
            .iter()
            .map(|(path, state)| format!("{} {}\n", name(path), state.0));
        let lines: String = lines.collect();
        let noted = self.file.set_len(0);
        let noted = noted.and_then(|()| self.file.write_all(lines.as_bytes()));
        if let Err(error) = noted.and_then(|()| self.file.sync_all()) {
            tracing::warn!("cannot write {}: {error}", self.path.display());
        }
    }

    /// Nothing is left half done.
    pub(super) fn end(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// More than the files of any command take.
const LONGEST: u64 = 1 << 20;

/// Where the file for a command is.
fn place((folder, build): Which<'_>) -> Option<PathBuf> {
    let folder = match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    };
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let mut command = folder.into_os_string().into_encoded_bytes();
    for word in build {
        command.push(0);
        command.extend(word.bytes());
    }
    Some(cache::folder("builds")?.join(Digest::of_bytes(&command).to_string()))
}

/// What a file is called there: one line, whatever its path has in it.
fn name(path: &Path) -> String {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    Digest::of_bytes(whole.as_os_str().as_bytes()).to_string()
}

/// How a file is: what tells that it was written since.
#[derive(PartialEq, Eq)]
pub(super) struct State(String);

impl State {
    pub(super) fn of(path: &Path) -> State {
        State(match fs::metadata(path) {
            Err(_) => ABSENT.to_owned(),
            // What is in a folder does not show in it.
            Ok(meta) if meta.is_dir() => format!("{} {}", meta.dev(), meta.ino()),
            Ok(meta) => format!(
                "{} {} {} {}.{:09} {}.{:09}",
                meta.dev(),
                meta.ino(),
                meta.size(),
                meta.mtime(),
                meta.mtime_nsec(),
                meta.ctime(),
                meta.ctime_nsec()
            ),
        })
    }

    /// That of a file that is not there, or as good as not.
    pub(super) fn absent() -> State {
        State(ABSENT.to_owned())
    }

    /// Whether there is something else than `before`.
    pub(super) fn is_begun_since(&self, before: &str) -> bool {
        self.0 != ABSENT && self.0 != before
    }

    /// As it is compared with another.
    pub(super) fn text(&self) -> &str {
        &self.0
    }
}

const ABSENT: &str = "-";
