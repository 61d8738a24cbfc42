//! The images of a conversion, and what is wrong with them.

use std::path::Path;

use super::{Conversion, place};
use crate::{Image, OpenError, OptionValue};

/// An image as it is when it is only read, whatever its size.
pub(super) fn read_only(image: &Image, lock: bool) -> Image {
    Image {
        ro: true,
        sparse: true,
        size: None,
        block_size: 1,
        lock,
        ..image.clone()
    }
}

/// The target's own backing file.
pub(super) fn backing(image: &Image) -> Option<Image> {
    let path = image.backing.first()?;
    Some(Image {
        path: path.clone(),
        backing: image.backing[1..].to_vec(),
        format_written: true,
        options: Vec::new(),
        ..read_only(image, true)
    })
}

pub(super) fn data_file(image: &Image) -> Option<&Path> {
    image.options.iter().find_map(|option| match option {
        ("data_file", OptionValue::Path(path)) => Some(path.as_path()),
        _ => None,
    })
}

/// Refuses to convert a file to itself.
pub(super) fn check_names(conversion: &Conversion<'_>) -> Result<(), OpenError> {
    let (source, target) = (conversion.source, &conversion.target.path);
    let mut read = [&source.path].into_iter();
    let all = read
        .by_ref()
        .chain(&source.backing)
        .chain(&conversion.target.backing);
    let all = all.map(|path| path.as_path()).chain(data_file(source));
    for path in all {
        if place::is_same_file(path, target) {
            return Err(OpenError {
                message: format!(
                    "`{}` is to be read, and cannot be the target",
                    path.display()
                ),
                help: Some("choose another name for the target".into()),
                key: "path",
            });
        }
    }
    Ok(())
}

pub(super) fn too_small(conversion: &Conversion<'_>, size: u64, has: u64) -> OpenError {
    OpenError {
        message: format!(
            "the target is to have {size} bytes, but `{}` has {has}",
            conversion.source.path.display()
        ),
        help: Some("leave the size out to have the source's".into()),
        key: "size",
    }
}

pub(super) fn no_compression(conversion: &Conversion<'_>) -> OpenError {
    let name = conversion.to.name;
    OpenError {
        message: format!("format `{name}` as it is asked for cannot be compressed"),
        help: Some(match name {
            "qcow2" => "leave `data_file` and `preallocation` out".into(),
            _ => "convert to format `qcow2`, or leave the compression out".into(),
        }),
        key: "format",
    }
}
