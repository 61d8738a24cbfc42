//! How an image is opened.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use formats::{HostFile, Image, OpenError, Ring};

use crate::cli::up;
use crate::config::{Block, Vm};
use crate::{Error, Result};

/// An image as a VM's file describes it, of whatever size it is.
pub(super) fn image(block: &Block) -> Image {
    Image {
        size: None,
        ..block.image()
    }
}

/// An image that no VM's file describes, to be read under a lock.
pub(super) fn lone(path: &Path) -> Image {
    Image {
        ro: true,
        ..Image::new(path)
    }
}

/// What carries out the I/O of this command.
pub(super) fn ring() -> Result<Ring> {
    Ring::new(up::engine()?).map_err(|error| Error::failed(format!("cannot set up I/O: {error}")))
}

/// Opens the file of an image under its lock: for reading, with the writers shut out, or for
/// writing with everybody shut out. The lock lasts as long as the [`HostFile`].
pub(super) fn locked(ring: &Ring, image: &Image) -> Result<(HostFile, File), OpenError> {
    let file = HostFile::open(ring, image)?;
    let same = file.file().as_fd().try_clone_to_owned();
    let same = same.map_err(|error| OpenError {
        message: format!("cannot open `{}`: {error}", image.path.display()),
        help: None,
        key: OpenError::HOST,
    })?;
    Ok((file, File::from(same)))
}

/// The error of opening a disk's image, shown at the key of the VM's file that is at fault.
pub(super) fn at_block(vm: &Vm, index: usize, error: OpenError) -> Error {
    let key = match error.key {
        OpenError::HOST => "path",
        key => key,
    };
    let about = format!("block.{index}.{key}");
    Error::from(error).about(about).at(&vm.places)
}
