//! What is to be known of an image without opening the disk in it: its size, and whether every
//! file behind it has been named.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use formats::qcow2::Header;
use formats::qcow2::header::MAX_HEADER;
use formats::{Engine, Format, Image, Ring, find, for_extension, raw_for};
use rustix::fs::{Mode, OFlags};

use crate::{Error, Result};

/// The size of the disk in an image that its VM writes, in bytes; of one that is still to be
/// created over a backing file, that file's.
pub(super) fn size(image: &Image, format: &str) -> Result<u64> {
    let absent =
        std::fs::metadata(&image.path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    match image.backing.first() {
        Some(backing) if absent => size_of(backing, format_of(backing, None)?),
        _ => size_of(&image.path, named(format)?),
    }
}

/// Refuses an image with a file behind it that `backing` does not have: `launcher up` would.
pub(super) fn is_named(image: &Image, format: &str) -> Result<()> {
    let mut format = named(format)?;
    let mut path = &image.path;
    let mut rest = image.backing.iter();
    while is_qcow2(format) {
        // One that is not there is created, or reported where its content is needed.
        let Ok(Some(header)) = header(path) else {
            return Ok(());
        };
        match (&header.backing_file, rest.next()) {
            (None, _) => return Ok(()),
            (Some(name), None) => {
                let (path, name) = (path.display(), Path::new(name).display());
                let message =
                    format!("{path} has the backing file `{name}`, which `backing` does not name");
                return Err(Error::usage(message).help("name it there, if that is right"));
            }
            (Some(_), Some(next)) => {
                format = format_of(next, header.backing_format.as_deref())?;
                path = next;
            }
        }
    }
    Ok(())
}

/// What each of an image's backing files is read as, as far as that can be told.
pub(super) fn formats(image: &Image, format: &str) -> Vec<&'static str> {
    let Ok(mut above) = named(format) else {
        return Vec::new();
    };
    let mut path = &image.path;
    let mut formats = Vec::new();
    for backing in &image.backing {
        let header = is_qcow2(above).then(|| header(path).ok().flatten());
        let said = header.flatten().and_then(|header| header.backing_format);
        let Ok(format) = format_of(backing, said.as_deref()) else {
            break;
        };
        // Thin or not is nothing that a reader sees.
        formats.push(if is_raw(format) { "raw" } else { format.name });
        (above, path) = (format, backing);
    }
    formats
}

fn size_of(path: &Path, format: &'static Format) -> Result<u64> {
    let failed = |error: io::Error| Error::unopenable(&path.display().to_string(), &error);
    if is_qcow2(format) {
        let header = header(path).map_err(failed)?;
        return header.map(|header| header.size).ok_or_else(|| {
            Error::usage(format!("{} is no usable qcow2 image", path.display()))
                .help("see `launcher disk check`")
        });
    }
    if is_raw(format) {
        let length = open(path).and_then(|mut file| file.seek(SeekFrom::End(0)));
        return length.map_err(failed);
    }
    // Only the format itself can tell.
    let image = Image {
        ro: true,
        ..Image::new(path.to_owned())
    };
    let ring = Ring::new(Engine::Auto)
        .map_err(|error| Error::failed(format!("cannot set up I/O: {error}")))?;
    let size = async {
        let disk = (format.open)(&ring, &image).await?;
        let size = disk.size();
        disk.close().await.map_err(failed)?;
        Ok(size)
    };
    ring.block_on(size, || {})
}

/// Opens what an image may lie in; nothing else has an end.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let kind = file.metadata()?.file_type();
    match kind.is_file() || kind.is_block_device() {
        true => Ok(file),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no file and no block device",
        )),
    }
}

/// The header of a qcow2 image, if that is what it is.
fn header(path: &Path) -> io::Result<Option<Header>> {
    let mut bytes = Vec::new();
    open(path)?
        .take(MAX_HEADER as u64)
        .read_to_end(&mut bytes)?;
    Ok(Header::parse(&bytes).ok())
}

fn named(name: &str) -> Result<&'static Format> {
    find(name).ok_or_else(|| {
        Error::usage(format!("format `{name}` is not in this build")).help("see `launcher formats`")
    })
}

/// The format of a backing file: what the image over it says, or else the file's extension.
fn format_of(path: &Path, said: Option<&str>) -> Result<&'static Format> {
    match said {
        Some(name) => named(name),
        None => {
            let extension = path.extension().and_then(|extension| extension.to_str());
            extension.and_then(for_extension).ok_or_else(|| {
                let message = format!("nothing says what format {} has", path.display());
                Error::usage(message).help("give it an extension that a format has")
            })
        }
    }
}

fn is_qcow2(format: &Format) -> bool {
    matches!(format.name, "qcow2" | "qcow2-rs")
}

fn is_raw(format: &Format) -> bool {
    [true, false].map(raw_for).contains(&format.name)
}
