//! The options of a new image as the configuration has them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use super::super::header::{Header, MAX_HEADER};
use super::{Backing, CreateOptions, DataFile, Preallocation};
use crate::host_file::text;
use crate::qcow2::Compression;
use crate::{FormatOption, Image, OpenError, OptionKind, OptionValue, for_extension};

/// The options of the table `[block.qcow2]`. All but the last say how a new image is made, and
/// mean nothing for one that exists.
pub const OPTIONS: &[FormatOption] = &[
    FormatOption {
        name: "cluster_size",
        kind: OptionKind::Size,
        default: "\"64KiB\"",
        doc: "Unit of allocation of a new image: a power of two, 512 bytes to 2MiB.",
    },
    FormatOption {
        name: "compression_type",
        kind: OptionKind::Choice(&["zlib", "zstd"]),
        default: "\"zlib\"",
        doc: "How compressed clusters of a new image are compressed.",
    },
    FormatOption {
        name: "extended_l2",
        kind: OptionKind::Bool,
        default: "false",
        doc: "Allocates a new image in subclusters of 1/32 cluster: less is copied from the \
              backing file at a first write. Needs clusters of 16KiB or more; best with 128KiB.",
    },
    FormatOption {
        name: "lazy_refcounts",
        kind: OptionKind::Bool,
        default: "false",
        doc: "Lets writers of a new image postpone refcounts; after a crash they are counted \
              anew.",
    },
    FormatOption {
        name: "preallocation",
        kind: OptionKind::Choice(&["off", "metadata", "falloc", "full"]),
        default: "\"off\"",
        doc: "What of a new image is allocated in advance: nothing, the tables, or the data too \
              (reserved, or written with zeroes).",
    },
    FormatOption {
        name: "refcount_bits",
        kind: OptionKind::Integer,
        default: "16",
        doc: "Width of the refcounts of a new image: 1, 2, 4, 8, 16, 32 or 64.",
    },
    FormatOption {
        name: "version",
        kind: OptionKind::Integer,
        default: "3",
        doc: "Version of a new image: 3, or 2 for programs from before 2012.",
    },
    FormatOption {
        name: "data_file",
        kind: OptionKind::Path,
        default: "",
        doc: "The file of its own that the guest's data is in: created with a new image, \
              approved for one that exists.",
    },
    FormatOption {
        name: "data_file_raw",
        kind: OptionKind::Bool,
        default: "false",
        doc: "Keeps the data file of a new image a raw image of the disk at all times.",
    },
    FormatOption {
        name: "cache_size",
        kind: OptionKind::Size,
        default: "0",
        doc: "Memory for tables in bytes; 0: enough for the whole disk, but no more than 32MiB.",
    },
];

fn refused(key: &'static str, message: String, help: impl Into<Option<String>>) -> OpenError {
    OpenError {
        message,
        help: help.into(),
        key,
    }
}

impl CreateOptions {
    /// What the configuration asks for: the options of the format's own table, `size`, and the
    /// backing file, whose header is read for its size if there is no `size`.
    pub fn from_image(image: &Image) -> Result<CreateOptions, OpenError> {
        let mut options = CreateOptions::new(0);
        let mut data_file = None;
        let mut raw = false;
        for (key, value) in &image.options {
            match (*key, value) {
                ("cluster_size", OptionValue::Number(size)) => {
                    options.cluster_bits = log2(*size, 9..=21, "cluster_size", "512 to 2MiB")?;
                }
                ("refcount_bits", OptionValue::Number(bits)) => {
                    options.refcount_order = log2(*bits, 0..=6, "refcount_bits", "1 to 64")?;
                }
                ("version", OptionValue::Number(version)) => {
                    options.version = u32::try_from(*version).unwrap_or(u32::MAX);
                }
                ("compression_type", OptionValue::Word(word)) => {
                    options.compression = match word.as_str() {
                        "zstd" => Compression::Zstd,
                        _ => Compression::Zlib,
                    };
                }
                ("preallocation", OptionValue::Word(word)) => {
                    options.preallocation = match word.as_str() {
                        "metadata" => Preallocation::Metadata,
                        "falloc" => Preallocation::Falloc,
                        "full" => Preallocation::Full,
                        _ => Preallocation::Off,
                    };
                }
                ("extended_l2", OptionValue::Bool(wanted)) => options.extended_l2 = *wanted,
                ("lazy_refcounts", OptionValue::Bool(wanted)) => options.lazy_refcounts = *wanted,
                ("data_file_raw", OptionValue::Bool(wanted)) => raw = *wanted,
                ("data_file", OptionValue::Path(path)) => data_file = Some(path),
                _ => {}
            }
        }
        if raw && data_file.is_none() {
            let message = "`data_file_raw` is true, but there is no `data_file`".to_owned();
            let help = "name the file, or leave `data_file_raw` out".to_owned();
            return Err(refused("data_file_raw", message, help));
        }
        options.data_file = data_file.map(|path| DataFile {
            path: path.clone(),
            // QEMU takes a relative name to begin where it is started.
            name: absolute(path).unwrap_or_else(|| path.clone()).into(),
            raw,
        });
        let backing = image.backing.first();
        if let Some(path) = backing {
            options.backing = Some(Backing {
                name: name_for(&image.path, path),
                format: format_of(path)?,
            });
        }
        let said = image.options.iter().any(|(key, _)| *key == "preallocation");
        if !image.sparse && !said && backing.is_none() {
            // It is to be allocated at its opening: that is cheaper now.
            options.preallocation = Preallocation::Falloc;
        }
        options.size = match (image.size, backing.zip(options.backing.as_ref())) {
            (Some(size), _) => size,
            (None, Some((path, backing))) => backing_size(path, &backing.format)?,
            (None, None) => {
                let message = format!("`{}` has no `size`", image.path.display());
                let help = "say how large the new image is to be".to_owned();
                return Err(refused("size", message, help));
            }
        };
        let block_size = u64::from(image.block_size);
        if !options.size.is_multiple_of(block_size) {
            let size = options.size;
            let (message, help) = match image.size {
                Some(_) => (
                    format!("`size` is {size}, expected a multiple of `block_size`, {block_size}"),
                    None,
                ),
                None => (
                    format!(
                        "the `backing` file has {size} bytes, no multiple of `block_size`, \
                         {block_size}"
                    ),
                    size.checked_next_multiple_of(block_size)
                        .map(|next| format!("add `size = {next}`")),
                ),
            };
            return Err(refused("size", message, help));
        }
        options.check()?;
        Ok(options)
    }
}

/// log2 of a power of two, which must be in `range`.
fn log2(
    value: u64,
    range: std::ops::RangeInclusive<u32>,
    key: &'static str,
    limits: &str,
) -> Result<u32, OpenError> {
    let found = value.checked_ilog2().filter(|log2| range.contains(log2));
    found.filter(|_| value.is_power_of_two()).ok_or_else(|| {
        let message = format!("`{key}` is {value}, expected a power of two, {limits}");
        refused(key, message, None)
    })
}

/// The name of a file as an image has it: relative to the image's directory where both are below
/// one directory that is not the root, so that they can be moved together; else absolute.
fn name_for(image: &Path, file: &Path) -> OsString {
    let (Some(from), Some(to)) = (absolute(image), absolute(file)) else {
        return file.into();
    };
    let directory = from.parent().unwrap_or(Path::new("/"));
    let shared = directory
        .components()
        .zip(to.components())
        .take_while(|(one, other)| one == other)
        .count();
    // The root is the first component.
    if shared < 2 {
        return to.into();
    }
    let up = directory.components().count() - shared;
    let ups = std::iter::repeat_n(Component::ParentDir, up);
    let name: PathBuf = ups.chain(to.components().skip(shared)).collect();
    // Elsewhere, what stands before a colon is the name of a protocol.
    match name.as_os_str().as_bytes().contains(&b':') {
        true => Path::new(".").join(name).into(),
        false => name.into(),
    }
}

/// Where a file is, or will be, without symbolic links in its directory's name.
fn absolute(file: &Path) -> Option<PathBuf> {
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Some(fs::canonicalize(directory).ok()?.join(file.file_name()?))
}

/// The format of a backing file, by its name: its content is not asked.
fn format_of(path: &Path) -> Result<String, OpenError> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension.and_then(for_extension) {
        // Outside of this program there is one raw format.
        Some(format) if format.name == "sparse-raw" => Ok("raw".into()),
        Some(format) => Ok(format.name.into()),
        None => {
            let message = format!(
                "the format of the `backing` file `{}` does not follow from its name",
                path.display()
            );
            let help = "give it an extension that a format has: see `launcher formats`".to_owned();
            Err(refused("backing", message, help))
        }
    }
}

/// The size of a backing file's disk in bytes.
pub(super) fn backing_size(path: &Path, format: &str) -> Result<u64, OpenError> {
    let unreadable = |error: io::Error| {
        let why = text(&error);
        let message = format!("cannot read the `backing` file `{}`: {why}", path.display());
        refused("backing", message, None)
    };
    let file = open(path).map_err(unreadable)?;
    match format {
        "raw" => rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
            .map_err(|errno| unreadable(errno.into())),
        "qcow2" => {
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut io::Read::take(&file, MAX_HEADER as u64), &mut bytes)
                .map_err(unreadable)?;
            let header = Header::parse(&bytes).map_err(|refusal| {
                let message = format!(
                    "the `backing` file `{}` is no usable qcow2 image: {refusal}",
                    path.display()
                );
                refused("backing", message, refusal.help)
            })?;
            Ok(header.size)
        }
        _ => {
            let message = format!(
                "`{}` has no `size`, and that of its `backing` file is not known",
                path.display()
            );
            let help = "say how large the new image is to be".to_owned();
            Err(refused("size", message, help))
        }
    }
}

/// Opens a regular file or a block device: nothing that to open is to wait for.
fn open(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::FileTypeExt;
    let kind = fs::metadata(path)?.file_type();
    match kind.is_file() || kind.is_block_device() {
        true => File::open(path),
        false => Err(io::Error::other("it is no file and no block device")),
    }
}
