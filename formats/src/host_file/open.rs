//! Opening a host file or block device, with an answer to everything that can be wrong with it.

use std::cell::{Cell, OnceCell};
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::direct::Alignment;
use super::flush::Flushes;
use super::{HostFile, Kind, lock};
use crate::{File, Image, OpenError, Ring};

impl HostFile {
    /// Opens the file or block device of an image, and locks it. Its size is as it is.
    pub fn open(ring: &Ring, image: &Image) -> Result<HostFile, OpenError> {
        let path = image.path.display();
        let (mut fd, mut kind, mut stat) = open_file(image)?;
        let mut lock = None;
        if image.lock {
            lock = Some(lock::lock(fd.as_fd(), &image.path, image.ro)?);
            // Who puts another file in its place does so under its lock: then this one is nobody's
            // any more, and what would be written to it lost.
            while is_replaced(image, &stat) {
                (fd, kind, stat) = open_file(image)?;
                lock = Some(lock::lock(fd.as_fd(), &image.path, image.ro)?);
            }
        }
        let direct = match image.o_direct {
            true => Some(alignment(image, &fd, kind)?),
            false => None,
        };
        let size = length(&fd).map_err(|error| OpenError {
            message: format!("cannot find the size of `{path}`: {}", text(&error)),
            help: None,
            key: OpenError::HOST,
        })?;
        let block = block(&fd, kind, &stat);
        let file = File::from(fd);
        if let Some(lock) = lock {
            file.keep(lock);
        }
        Ok(HostFile {
            ring: ring.clone(),
            block,
            file,
            path: image.path.clone(),
            size: Cell::new(size),
            kind,
            data: Cell::new((0, 0)),
            direct,
            flushes: Flushes::new(direct.is_none()),
            zeroes: OnceCell::new(),
            no_punch: Cell::new(false),
            no_zero_range: Cell::new(false),
        })
    }
}

/// Whether the image's name is that of another file by now.
fn is_replaced(image: &Image, stat: &Stat) -> bool {
    let now = rustix::fs::stat(&image.path);
    now.is_ok_and(|now| (now.st_dev, now.st_ino) != (stat.st_dev, stat.st_ino))
}

/// Opens what an image lies in, which is a file or a block device.
pub(super) fn open_file(image: &Image) -> Result<(OwnedFd, Kind, Stat), OpenError> {
    // Looked at first, for to open is to wait, or to do harm, with some kinds of files.
    let meta = fs::metadata(&image.path).map_err(|error| unopenable(image, &error))?;
    kind(image, meta.mode())?;
    let fd = open(image)?;
    let stat = rustix::fs::fstat(&fd).map_err(|errno| unopenable(image, &errno.into()))?;
    let kind = kind(image, stat.st_mode)?;
    // O_NONBLOCK was for the case that it is a FIFO by now.
    let flags = rustix::fs::fcntl_getfl(&fd)
        .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK));
    flags.map_err(|errno| unopenable(image, &errno.into()))?;
    Ok((fd, kind, stat))
}

/// The size of a file or block device in bytes.
pub(super) fn length(file: impl AsFd) -> io::Result<u64> {
    // Nobody uses the position: every transfer names its offset.
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

fn open(image: &Image) -> Result<OwnedFd, OpenError> {
    let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK;
    flags |= if image.ro {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    if image.o_direct {
        flags |= OFlags::DIRECT;
    }
    let device = fs::metadata(&image.path)
        .is_ok_and(|meta| FileType::from_raw_mode(meta.mode()) == FileType::BlockDevice);
    // Refused while the host itself uses the device, as for a mounted file system.
    let exclusive = match device && image.lock && !image.ro {
        true => OFlags::EXCL,
        false => OFlags::empty(),
    };
    loop {
        match rustix::fs::open(&image.path, flags | exclusive, Mode::empty()) {
            Ok(fd) => return Ok(fd),
            Err(Errno::INTR) => {}
            Err(Errno::INVAL) if image.o_direct => return Err(no_direct(image)),
            Err(Errno::BUSY) if device => {
                // One of us has it like this too. Then its locks tell who it is.
                if let Ok(fd) = rustix::fs::open(&image.path, flags, Mode::empty()) {
                    lock::lock(fd.as_fd(), &image.path, image.ro)?;
                }
                return Err(unopenable(image, &Errno::BUSY.into()));
            }
            Err(errno) => return Err(unopenable(image, &errno.into())),
        }
    }
}

fn no_direct(image: &Image) -> OpenError {
    OpenError {
        message: format!(
            "`o_direct` is true, but the file system of `{}` has no O_DIRECT",
            image.path.display()
        ),
        help: Some("set `o_direct = false`".into()),
        key: "o_direct",
    }
}

fn alignment(image: &Image, fd: &OwnedFd, kind: Kind) -> Result<Alignment, OpenError> {
    let found = Alignment::of(fd, kind).map_err(|error| unopenable(image, &error))?;
    let alignment = found.ok_or_else(|| no_direct(image))?;
    if alignment.offset > image.block_size {
        return Err(OpenError {
            message: format!(
                "`block_size` is {}, but O_DIRECT on `{}` takes no less than {}",
                image.block_size,
                image.path.display(),
                alignment.offset
            ),
            help: Some(format!(
                "set `block_size = {}`, or `o_direct = false`",
                alignment.offset
            )),
            key: "block_size",
        });
    }
    Ok(alignment)
}

/// What a file is, by its mode: only regular files and block devices hold images.
fn kind(image: &Image, mode: u32) -> Result<Kind, OpenError> {
    let what = match FileType::from_raw_mode(mode) {
        FileType::RegularFile => return Ok(Kind::Regular),
        FileType::BlockDevice => return Ok(Kind::Device),
        FileType::Directory => "a directory",
        FileType::CharacterDevice => "a character device",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        _ => "no file",
    };
    Err(OpenError {
        message: format!(
            "`{}` is {what}, expected a file or a block device",
            image.path.display()
        ),
        help: None,
        key: "path",
    })
}

/// The unit in bytes that the host handles best.
fn block(fd: &OwnedFd, kind: Kind, stat: &Stat) -> u32 {
    match kind {
        Kind::Regular => u32::try_from(stat.st_blksize).unwrap_or(4096),
        Kind::Device => rustix::fs::ioctl_blkpbszget(fd).unwrap_or(4096),
    }
}

/// The error for an image that cannot be opened.
pub(super) fn unopenable(image: &Image, error: &io::Error) -> OpenError {
    let help = match error.raw_os_error() {
        Some(libc::ENOENT) if image.ro => None,
        Some(libc::ENOENT) => {
            Some("create it with `launcher disk create`, or add `size` to its `[[block]]`".into())
        }
        Some(libc::EACCES | libc::EPERM) => Some(permission(image)),
        Some(libc::EROFS) => Some("set `ro = true`: its file system is read-only".into()),
        Some(libc::EBUSY) => Some("unmount it first: the host itself uses this device".into()),
        _ => None,
    };
    OpenError {
        message: format!("cannot open `{}`: {}", image.path.display(), text(error)),
        help,
        key: OpenError::key_of(error),
    }
}

/// Who may open the image, and who tries to.
fn permission(image: &Image) -> String {
    let what = if image.ro { "read" } else { "read and write" };
    let me = rustix::process::geteuid().as_raw();
    match fs::metadata(&image.path) {
        Ok(meta) => format!(
            "it belongs to user {} and group {} with mode {:o}; user {me} must be able to {what} it",
            meta.uid(),
            meta.gid(),
            meta.mode() & 0o7777,
        ),
        Err(_) => format!("user {me} must be able to search every directory of the path"),
    }
}

/// The text of an error, without the number that the standard library appends.
pub(crate) fn text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}

/// A size in bytes as a person writes it.
pub(crate) struct Size(pub(crate) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let unit = units
            .into_iter()
            .find(|(shift, _)| self.0 > 0 && self.0.is_multiple_of(1 << shift));
        match unit {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}
