//! New images for what is written.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use formats::{Disk, Image, OptionValue, Ring};

use crate::cli::disk::look::look;
use crate::cli::disk::which::Found;
use crate::error::text;
use crate::{Error, Result};

/// Bytes of the largest one.
pub(super) const MOST: u64 = 256 << 20;

/// A new image beside another, of the same format and with clusters of the same size, open and
/// without a name: it is gone when it is closed, or when the process ends, however it does.
pub(super) async fn made(ring: &Ring, found: &Found, size: u64) -> Result<Box<dyn Disk>> {
    let beside = found.path();
    let shown = beside.display();
    let failed = |error: &std::io::Error| {
        let why = text(error);
        Error::failed(format!("cannot make an image beside `{shown}`: {why}"))
    };
    let meta = fs::metadata(beside).map_err(|error| failed(&error))?;
    if meta.file_type().is_block_device() {
        let message = format!("`{shown}` is a block device, beside which no image can be made");
        return Err(Error::usage(message).help("measure it without `--write`"));
    }
    let folder = match beside.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    // A folder that only this user can enter; it goes with whatever is still in it.
    let private = tempfile::Builder::new()
        .prefix(".launcher-bench-")
        .tempdir_in(folder)
        .map_err(|error| failed(&error))?;
    let mut image = Image {
        o_direct: found.image.o_direct,
        block_size: found.image.block_size,
        size: Some(size),
        ..Image::new(private.path().join("image"))
    };
    let seen = look(beside, found.format, false)?;
    if let Some(qcow2) = seen.qcow2
        && let Some(option) = found
            .format
            .options
            .iter()
            .find(|it| it.name == "cluster_size")
    {
        image.options = vec![(option.name, OptionValue::Number(qcow2.cluster_size))];
    }
    (found.format.create)(&image)?;
    image.size = None;
    let disk = (found.format.open)(ring, &image).await?;
    private.close().map_err(|error| failed(&error))?;
    Ok(disk)
}
