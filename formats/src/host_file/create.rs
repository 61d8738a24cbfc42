//! Creating an image: it appears under its name when it is whole, or not at all.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use super::open::text;
use crate::OpenError;

/// As `open(2)` from a shell: the umask takes away what the user does not want.
const MODE: Mode = Mode::from_raw_mode(0o666);

/// Creates a file at `path`, which must not exist yet, as `fill` leaves it. After an error, of
/// `fill` too, nothing is there.
pub fn create_file(
    path: &Path,
    fill: impl FnOnce(&OwnedFd) -> io::Result<()>,
) -> Result<(), OpenError> {
    create(path, fill).map_err(|error| OpenError {
        message: format!("cannot create `{}`: {}", path.display(), text(&error)),
        help: match error.raw_os_error() {
            Some(libc::ENOENT) => Some("create its directory first".into()),
            Some(libc::EEXIST) => Some("remove it first, or choose another name".into()),
            Some(libc::ENOSPC | libc::EDQUOT) => Some("free some space".into()),
            _ => None,
        },
        key: match error.raw_os_error() {
            Some(libc::EFBIG) => "size",
            _ => OpenError::key_of(&error),
        },
    })
}

fn create(path: &Path, fill: impl FnOnce(&OwnedFd) -> io::Result<()>) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if fs::symlink_metadata(path).is_ok() {
        return Err(Errno::EXIST.into());
    }
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, MODE) {
        Ok(file) => {
            fill(&file)?;
            rustix::fs::fsync(&file)?;
            link(&file, path)?;
        }
        // Not every file system has files without a name.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            let file = rustix::fs::open(path, flags | OFlags::CREATE | OFlags::EXCL, MODE)?;
            let filled = fill(&file).and_then(|()| Ok(rustix::fs::fsync(&file)?));
            if let Err(error) = filled {
                let _ = fs::remove_file(path);
                return Err(error);
            }
        }
        Err(errno) => return Err(errno.into()),
    }
    // The name is durable when its directory is. Some directories cannot be synchronised.
    if let Ok(directory) = fs::File::open(directory) {
        let _ = directory.sync_all();
    }
    Ok(())
}

/// Gives a file without a name its name, unless that is taken.
fn link(file: &OwnedFd, path: &Path) -> io::Result<()> {
    let proc = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    Ok(rustix::fs::linkat(
        CWD,
        proc,
        CWD,
        path,
        AtFlags::SYMLINK_FOLLOW,
    )?)
}

/// A file without a name. Where the file system has none such, it has one for a moment.
pub(super) fn nameless(directory: &Path) -> io::Result<OwnedFd> {
    let private = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, private) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            let name = format!(".ephemeral-{}", std::process::id());
            let path = directory.join(name);
            let file = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, private)?;
            fs::remove_file(&path)?;
            Ok(file)
        }
        result => Ok(result?),
    }
}
