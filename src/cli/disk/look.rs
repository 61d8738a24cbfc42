//! A look at an image without a lock, also while a VM writes to it.
//!
//! That is safe: the file is opened for reading only, and of a qcow2 image nothing is read but the
//! header and the table of internal snapshots. A running VM changes the header by writes of one
//! sector, and has no way to change the snapshots; the tables that it does change, of which it
//! has newer ones in memory, are not looked at.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use formats::Format;
use formats::qcow2::header::{MAX_HEADER, autoclear, compatible, incompatible};
use formats::qcow2::{Compression, Header, Snapshot, snapshot};
use rustix::fs::OFlags;
use serde::Serialize;

use super::format::{is_qcow2, raw_name};
use super::image::{lone, ring};
use super::snapshots::Listed;
use crate::error::text;
use crate::{Error, Result};

/// What is to be seen of an image.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Look {
    pub(super) path: String,
    pub(super) format: &'static str,
    /// Bytes of the disk; none where only opening the image would tell, and it is in use.
    pub(super) size: Option<u64>,
    /// Bytes that the image takes on the host; none for a block device.
    pub(super) host_size: Option<u64>,
    /// Length of the file, or of the block device, in bytes.
    pub(super) file_size: u64,
    /// Whether it is a host block device.
    pub(super) device: bool,
    /// What a qcow2 image says of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) qcow2: Option<Qcow2>,
}

/// What a qcow2 image says of itself.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Qcow2 {
    pub(super) version: u32,
    pub(super) cluster_size: u64,
    pub(super) refcount_bits: u32,
    pub(super) compression_type: &'static str,
    /// Names of the feature bits that are set.
    pub(super) features: Vec<&'static str>,
    /// The backing file that it names, as it names it.
    pub(super) backing_file: Option<String>,
    pub(super) backing_format: Option<String>,
    pub(super) data_file: Option<String>,
    pub(super) bitmaps: u32,
    pub(super) snapshots: Vec<Listed>,
}

/// Looks at an image. `in_use` says that another process may be writing to it.
pub(super) fn look(path: &Path, format: &'static Format, in_use: bool) -> Result<Look> {
    let shown = path.display();
    let mut file = open(path)?;
    let unreadable =
        |error: &io::Error| Error::failed(format!("cannot read `{shown}`: {}", text(error)));
    let meta = file.metadata().map_err(|error| unreadable(&error))?;
    let device = meta.file_type().is_block_device();
    let file_size = file
        .seek(SeekFrom::End(0))
        .map_err(|error| unreadable(&error))?;
    let mut seen = Look {
        path: shown.to_string(),
        format: format.name,
        size: None,
        host_size: (!device).then(|| meta.blocks().saturating_mul(512)),
        file_size,
        device,
        qcow2: None,
    };
    if raw_name(format.name) {
        seen.size = Some(file_size);
    } else if is_qcow2(format) {
        let (header, snapshots) = qcow2(path, &mut file)?;
        seen.size = Some(header.size);
        seen.qcow2 = Some(Qcow2::of(&header, &snapshots));
    } else if !in_use {
        seen.size = Some(opened(path, format)?);
    }
    Ok(seen)
}

/// Opens a regular file or a block device: with nothing else there is an end to it.
fn open(path: &Path) -> Result<File> {
    let shown = path.display();
    let failed = |error: io::Error| {
        let message = format!("cannot open `{shown}`: {}", text(&error));
        Error::failed(message)
    };
    let file = File::options()
        .read(true)
        .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
        .open(path)
        .map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    match kind.is_file() || kind.is_block_device() {
        true => Ok(file),
        false => Err(Error::failed(format!(
            "`{shown}` is no file and no block device"
        ))),
    }
}

/// The header of a qcow2 image, and its snapshots.
fn qcow2(path: &Path, file: &mut File) -> Result<(Header, Vec<Snapshot>)> {
    let shown = path.display();
    let unreadable =
        |error: io::Error| Error::failed(format!("cannot read `{shown}`: {}", text(&error)));
    let mut bytes = Vec::new();
    file.rewind().map_err(unreadable)?;
    file.by_ref()
        .take(MAX_HEADER as u64)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    let refused = |refusal: formats::qcow2::Refusal| {
        let error = Error::failed(format!("`{shown}` is no usable qcow2 image: {refusal}"));
        match refusal.help {
            Some(help) => error.help(help),
            None => error,
        }
    };
    let header = Header::parse(&bytes).map_err(refused)?;
    let (snapshots, _) = snapshot::read(file, &header)
        .map_err(unreadable)?
        .map_err(refused)?;
    Ok((header, snapshots))
}

/// The size that an image of any format tells when it is opened.
fn opened(path: &Path, format: &'static Format) -> Result<u64> {
    let (ring, image) = (ring()?, lone(path));
    let size = async {
        let disk = (format.open)(&ring, &image).await?;
        let size = disk.size();
        disk.close().await.map_err(|error| {
            Error::failed(format!(
                "cannot close `{}`: {}",
                path.display(),
                text(&error)
            ))
        })?;
        Ok(size)
    };
    ring.block_on(size, || {})
}

impl Qcow2 {
    fn of(header: &Header, snapshots: &[Snapshot]) -> Qcow2 {
        let named = [
            (header.incompatible_features, incompatible::DIRTY, "dirty"),
            (
                header.incompatible_features,
                incompatible::CORRUPT,
                "corrupt",
            ),
            (
                header.incompatible_features,
                incompatible::DATA_FILE,
                "data-file",
            ),
            (
                header.incompatible_features,
                incompatible::EXTENDED_L2,
                "extended-l2",
            ),
            (
                header.compatible_features,
                compatible::LAZY_REFCOUNTS,
                "lazy-refcounts",
            ),
            (header.autoclear_features, autoclear::BITMAPS, "bitmaps"),
            (
                header.autoclear_features,
                autoclear::RAW_DATA_FILE,
                "raw-data-file",
            ),
        ];
        let set = named.into_iter().filter(|(bits, bit, _)| bits & bit != 0);
        Qcow2 {
            version: header.version,
            cluster_size: header.cluster_size(),
            refcount_bits: 1 << header.refcount_order,
            compression_type: match header.compression {
                Compression::Zlib => "zlib",
                Compression::Zstd => "zstd",
            },
            features: set.map(|(.., name)| name).collect(),
            backing_file: header.backing_file.as_deref().map(plain),
            backing_format: header.backing_format.clone(),
            data_file: header.data_file.as_deref().map(plain),
            bitmaps: header.bitmaps.as_ref().map_or(0, |bitmaps| bitmaps.count),
            snapshots: snapshots.iter().map(Listed::from).collect(),
        }
    }
}

fn plain(name: impl AsRef<std::ffi::OsStr>) -> String {
    name.as_ref().to_string_lossy().into_owned()
}

/// An error as a part of a line: its first one.
pub(super) fn one_line(error: &Error) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    first.strip_prefix("error: ").unwrap_or(first).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_error_the_first_line_is_shown() {
        assert_eq!(one_line(&Error::failed("no").help("try")), "no");
    }
}
