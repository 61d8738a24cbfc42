//! The other files that an image refers to. They are opened only if the configuration names
//! them: what an image says may come from anybody.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{self, Path, PathBuf};

use super::header::{Header, incompatible};
use crate::{Disk, Format, HostFile, Image, OpenError, OptionValue, Ring, find, for_extension};

/// Longest chain of backing files.
const MAX_CHAIN: usize = 64;

/// Opens the backing file that the header names, if `image` approves it.
pub(super) async fn open_backing(
    ring: &Ring,
    image: &Image,
    header: &Header,
) -> Result<Option<Box<dyn Disk>>, OpenError> {
    let path = image.path.display();
    let wrong = |message: String, help: String| {
        Err(OpenError {
            message,
            help: Some(help),
            key: "backing",
        })
    };
    let (name, approved) = match (&header.backing_file, image.backing.first()) {
        (None, None) => return Ok(None),
        (None, Some(approved)) => {
            return wrong(
                format!(
                    "`backing` names `{}`, but `{path}` has no backing file",
                    approved.display()
                ),
                "take it out of `backing`".into(),
            );
        }
        (Some(name), None) => {
            return wrong(
                format!(
                    "`{path}` has the backing file `{}`, which the configuration does not name",
                    Path::new(name).display()
                ),
                match located(&image.path, name) {
                    Some(file) => format!(
                        "add `backing = {}` if that is right; after others of its chain, in order",
                        quoted(&file)
                    ),
                    None => format!(
                        "that is no file's name: tell the image of a file, `qemu-img rebase -u -b \
                         FILE -F FORMAT {}`",
                        absolute(&image.path).display()
                    ),
                },
            );
        }
        (Some(name), Some(approved)) => (name, approved),
    };
    if image.backing.len() > MAX_CHAIN {
        return wrong(
            format!(
                "`backing` names {} files, expected at most {MAX_CHAIN}",
                image.backing.len()
            ),
            "merge some of them with `qemu-img commit`".into(),
        );
    }
    if !is_file_named(&image.path, name, approved) {
        let fix = format!(
            "if the backing file has moved, tell the image: `qemu-img rebase -u -b {} -F {} {}`",
            absolute(approved).display(),
            header.backing_format.as_deref().unwrap_or("raw"),
            absolute(&image.path).display(),
        );
        return wrong(
            format!(
                "`backing` is `{}`, but `{path}` is based on `{}`",
                approved.display(),
                Path::new(name).display()
            ),
            fix,
        );
    }
    let format = backing_format(image, header, approved)?;
    open_read_only(ring, image, approved, format)
        .await
        .map(Some)
}

/// The format of the backing file: what the image says, or else what the file's name says.
fn backing_format(
    image: &Image,
    header: &Header,
    approved: &Path,
) -> Result<&'static Format, OpenError> {
    let said = header.backing_format.as_deref();
    let found = match said {
        // There is nothing to be allocated of what is only read.
        Some("raw") => find(crate::raw_for(true)),
        Some(name) => find(name),
        None => {
            let extension = approved.extension().and_then(OsStr::to_str);
            extension.and_then(for_extension)
        }
    };
    found.ok_or_else(|| {
        let path = image.path.display();
        OpenError {
            message: match said {
                Some(name) => format!(
                    "`{path}` says that its backing file has the format `{name}`, which is not in \
                     this build"
                ),
                None => format!(
                    "`{path}` does not say what format its backing file `{}` has, nor does that \
                     file's name",
                    approved.display()
                ),
            },
            help: Some(format!(
                "tell the image: `qemu-img rebase -u -b {} -F FORMAT {}`",
                absolute(approved).display(),
                absolute(&image.path).display()
            )),
            key: "backing",
        }
    })
}

async fn open_read_only(
    ring: &Ring,
    image: &Image,
    path: &Path,
    format: &Format,
) -> Result<Box<dyn Disk>, OpenError> {
    let mut backing = Image {
        path: path.into(),
        ro: true,
        sparse: true,
        size: None,
        backing: image.backing.get(1..).unwrap_or_default().to_vec(),
        format_written: true,
        options: Vec::new(),
        ..image.clone()
    };
    let wrong = |error: OpenError| OpenError {
        // It is not the option of this name that is at fault.
        key: match error.key {
            OpenError::HOST => OpenError::HOST,
            _ => "backing",
        },
        ..error
    };
    if image.o_direct {
        match (format.open)(ring, &backing).await {
            Err(error) if error.key == "block_size" => {}
            result => return result.map_err(wrong),
        }
    }
    // A backing file may end anywhere, which O_DIRECT cannot do.
    backing.o_direct = false;
    backing.block_size = 1;
    (format.open)(ring, &backing).await.map_err(wrong)
}

/// Opens the external data file of an image that has one, if `image` approves it.
pub(super) fn open_data_file(
    ring: &Ring,
    image: &Image,
    header: &Header,
) -> Result<Option<HostFile>, OpenError> {
    let path = image.path.display();
    let approved = image.options.iter().find_map(|option| match option {
        ("data_file", OptionValue::Path(path)) => Some(path),
        _ => None,
    });
    let wrong = |message, help| {
        Err(OpenError {
            message,
            help: Some(help),
            key: "data_file",
        })
    };
    let name = header.data_file.as_deref();
    match (header.has(incompatible::DATA_FILE), approved) {
        (false, None) => Ok(None),
        (false, Some(approved)) => wrong(
            format!(
                "`data_file` is `{}`, but `{path}` has no external data file",
                approved.display()
            ),
            "leave `data_file` out".into(),
        ),
        (true, None) => {
            let name = name.unwrap_or(OsStr::new("?"));
            let file = located(&image.path, name);
            let file = file.unwrap_or_else(|| name.into());
            wrong(
                format!(
                    "`{path}` has the data file `{}`, which the configuration does not name",
                    file.display()
                ),
                format!(
                    "add `data_file = {}` to `[block.qcow2]` if that is right",
                    quoted(&file)
                ),
            )
        }
        (true, Some(approved)) => {
            if let Some(name) = name
                && !is_file_named(&image.path, name, approved)
            {
                return wrong(
                    format!(
                        "`data_file` is `{}`, but the data file of `{path}` is `{}`",
                        approved.display(),
                        Path::new(name).display()
                    ),
                    "name that one".into(),
                );
            }
            let data = Image {
                path: approved.clone(),
                ..image.clone()
            };
            let opened = HostFile::open(ring, &data);
            opened.map(Some).map_err(|error| OpenError {
                key: match error.key {
                    "path" => "data_file",
                    key => key,
                },
                ..error
            })
        }
    }
}

/// The path from the root on: a relative one means something else to a configuration, to an image
/// and to a shell.
fn absolute(file: &Path) -> PathBuf {
    path::absolute(file).unwrap_or_else(|_| file.into())
}

/// A path as the configuration has it, which may lie in any directory.
fn quoted(file: &Path) -> String {
    format!("{:?}", absolute(file).to_string_lossy())
}

/// Where a file is that an image names: relative to the image. `None` for what is no file's name.
fn located(image: &Path, name: &OsStr) -> Option<PathBuf> {
    let name = name.as_bytes();
    let name = name.strip_prefix(b"file:").unwrap_or(name);
    let before_slash = name.split(|byte| *byte == b'/').next()?;
    if before_slash.contains(&b':') {
        return None;
    }
    let directory = image.parent().unwrap_or(Path::new(""));
    Some(directory.join(OsStr::from_bytes(name)))
}

/// Whether `approved` is the file that an image names.
fn is_file_named(image: &Path, name: &OsStr, approved: &Path) -> bool {
    let Some(file) = located(image, name) else {
        return false;
    };
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    match (identity(&file), identity(approved)) {
        (Ok(file), Ok(approved)) => file == approved,
        // Then to open it says what is wrong.
        _ => file == approved,
    }
}
