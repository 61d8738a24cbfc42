//! Where a target is made: beside its final name, which it gets when it is whole.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

use super::scan::failure;
use crate::{HostFile, Image, OpenError, Ring};

/// The place of a target. What was made there is removed with it unless it was finished.
pub(super) struct Place {
    /// The final name, no symbolic link.
    path: PathBuf,
    partial: PathBuf,
    replace: bool,
    /// Further files that were made, under their final names.
    others: Vec<PathBuf>,
    /// There may be something of ours.
    made: bool,
}

impl Place {
    /// Looks whether the target may be made. A file that is there is replaced with `force` alone,
    /// and only if nobody uses it.
    pub(super) fn new(ring: &Ring, image: &Image, force: bool) -> Result<Place, OpenError> {
        let path = match (
            fs::symlink_metadata(&image.path),
            fs::canonicalize(&image.path),
        ) {
            (Ok(_), Ok(path)) => path,
            _ => image.path.clone(),
        };
        let there = fs::symlink_metadata(&path).ok();
        if let Some(there) = &there {
            let wrong = |message: String, help: &str| OpenError {
                message,
                help: Some(help.into()),
                key: "path",
            };
            let shown = image.path.display();
            if there.file_type().is_block_device() {
                return Err(wrong(
                    format!("`{shown}` is a block device, expected the name of a file"),
                    "convert to a raw file, and copy that to the device",
                ));
            }
            if !there.is_file() {
                return Err(wrong(
                    format!("`{shown}` exists, and is no file"),
                    "choose another name",
                ));
            }
            if !force {
                return Err(wrong(
                    format!("`{shown}` exists"),
                    "remove it first, choose another name, or replace it with --force",
                ));
            }
            // Refused while someone uses it; only its locks matter.
            let used = Image {
                ro: false,
                lock: true,
                ..image.clone()
            };
            HostFile::open(ring, &used)?;
        }
        let name = path.file_name().ok_or_else(|| OpenError {
            message: format!("`{}` is no file's name", image.path.display()),
            help: None,
            key: "path",
        })?;
        let mut partial = OsString::from(".");
        partial.push(name);
        partial.push(".partial");
        Ok(Place {
            partial: path.with_file_name(partial),
            path,
            replace: force,
            others: Vec::new(),
            made: false,
        })
    }

    /// Where it is made.
    pub(super) fn partial(&self) -> &Path {
        &self.partial
    }

    /// Has `open` make and lock it there. Of several who want to make the same target, one does.
    pub(super) fn make<T>(
        &mut self,
        ring: &Ring,
        image: &Image,
        open: impl FnOnce() -> Result<T, OpenError>,
    ) -> Result<T, OpenError> {
        // Held until the file has its own lock. Not every file system has such locks.
        let directory = File::open(self.directory());
        if let Ok(directory) = &directory {
            let _ = rustix::fs::flock(directory, FlockOperation::LockExclusive);
        }
        if fs::symlink_metadata(&self.partial).is_ok() {
            // Left by one who was killed, unless it is locked.
            HostFile::open(ring, image)?;
            fs::remove_file(&self.partial)
                .map_err(|error| failure("remove", &self.partial, &error))?;
        }
        self.made = true;
        open()
    }

    /// Has another file go too if this one is not finished.
    pub(super) fn with(&mut self, other: &Path) {
        self.others.push(other.into());
    }

    /// Gives it its name, durably.
    pub(super) fn finish(mut self) -> Result<(), OpenError> {
        let renamed = match self.replace {
            true => rustix::fs::rename(&self.partial, &self.path),
            false => {
                let flags = RenameFlags::NOREPLACE;
                match rustix::fs::renameat_with(CWD, &self.partial, CWD, &self.path, flags) {
                    // Not every file system knows this; none loses a file by a link.
                    Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::link(&self.partial, &self.path)
                        .and_then(|()| rustix::fs::unlink(&self.partial)),
                    result => result,
                }
            }
        };
        renamed.map_err(|errno| failure("create", &self.path, &io::Error::from(errno)))?;
        self.made = false;
        // Some directories cannot be synchronised.
        if let Ok(directory) = File::open(self.directory()) {
            let _ = directory.sync_all();
        }
        Ok(())
    }

    fn directory(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.made {
            let _ = fs::remove_file(&self.partial);
            for other in &self.others {
                let _ = fs::remove_file(other);
            }
        }
    }
}

/// Whether two names are of one file that exists.
pub(super) fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}
