//! A file under the locks of its image, for what works on it without a ring.

use std::fs::File;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::path::Path;

use super::lock::{Lock, lock};
use super::open::open_file;
use crate::{Image, OpenError};

/// A file or block device that is open for reading and writing and locked as by a VM whose disk
/// it is, until this is dropped.
pub(crate) struct LockedFile {
    file: File,
    _lock: Lock,
}

impl LockedFile {
    /// Opens and locks it: refused while anyone else uses it.
    pub(crate) fn open(path: &Path) -> Result<LockedFile, OpenError> {
        let (fd, _, _) = open_file(&image(path, false)).map_err(|error| OpenError {
            // What is said of keys in the configuration is of no help here.
            help: error.help.filter(|_| path.exists()),
            ..error
        })?;
        let lock = lock(fd.as_fd(), path, false)?;
        Ok(LockedFile {
            file: fd.into(),
            _lock: lock,
        })
    }

    /// Opens it for reading, without a lock: others may write to it meanwhile.
    pub(crate) fn open_shared(path: &Path) -> Result<File, OpenError> {
        let (fd, _, _) = open_file(&image(path, true)).map_err(|error| OpenError {
            help: error.help.filter(|_| path.exists()),
            ..error
        })?;
        Ok(fd.into())
    }
}

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

fn image(path: &Path, ro: bool) -> Image {
    Image {
        ro,
        ..Image::new(path)
    }
}
