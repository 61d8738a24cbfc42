//! A socket that listens, and its name in the file system.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::address::{self, Address};
use crate::{Error, Result};

/// How many connections wait to be accepted.
const BACKLOG: i32 = 128;

/// A socket that listens; its end removes the socket's name.
pub(crate) struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    folder: OwnedFd,
    /// Device and inode of the name.
    made: (u64, u64),
}

impl Listener {
    /// Listens at a path where nothing is: mode 0600.
    pub(super) fn bind(path: &Path) -> Result<Listener> {
        Listener::try_bind(path).map_err(|error| cannot_listen(path, &error))
    }

    /// As [`Listener::bind`], after the socket of one who was killed there has been removed.
    pub(super) fn bind_again(path: &Path) -> Result<Listener> {
        remove_stale(path).map_err(|error| cannot_listen(path, &error))?;
        Listener::bind(path)
    }

    /// As [`Listener::bind_again`]; the error of a path where another process listens is
    /// [`io::ErrorKind::AddrInUse`].
    pub(crate) fn at(path: &Path) -> io::Result<Listener> {
        remove_stale(path)?;
        Listener::try_bind(path)
    }

    fn try_bind(path: &Path) -> io::Result<Listener> {
        let address = Address::of(path)?;
        let fd = socket()?;
        // The name gets the mode that the socket has: there is no moment with another one.
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::fchmod(&fd, mode)?;
        rustix::net::bind(&fd, &address.socket()?)?;
        let stat = rustix::fs::statat(&address.folder, address.name, AtFlags::SYMLINK_NOFOLLOW)?;
        let listener = Listener {
            fd,
            path: path.to_owned(),
            folder: address.folder,
            made: (stat.st_dev, stat.st_ino),
        };
        rustix::net::listen(&listener.fd, BACKLOG)?;
        Ok(listener)
    }

    /// Device and inode of its name.
    pub(super) fn made(&self) -> (u64, u64) {
        self.made
    }

    /// The next connection, of whoever may connect here: `None` if there is none now.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC) {
                Ok(fd) => return Ok(Some(UnixStream::from(fd))),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(name) = self.path.file_name() else {
            return;
        };
        let stat = rustix::fs::statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW);
        if stat.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.made) {
            // Whoever comes next removes it otherwise.
            let _ = rustix::fs::unlinkat(&self.folder, name, AtFlags::empty());
        }
    }
}

/// Whether a user may control the VMs of this process.
pub(super) fn admits(peer: u32, us: u32) -> bool {
    peer == us || peer == 0
}

fn socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?)
}

/// Removes a socket of this user's that nobody listens at.
fn remove_stale(path: &Path) -> io::Result<()> {
    let address = Address::of(path)?;
    let stat = match rustix::fs::statat(&address.folder, address.name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(io::Error::other("what is there is no socket"));
    }
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("what is there belongs to another user"));
    }
    match rustix::net::connect(socket()?, &address.socket()?) {
        Err(Errno::CONNREFUSED) => {
            rustix::fs::unlinkat(&address.folder, address.name, AtFlags::empty())?;
            Ok(())
        }
        Err(Errno::NOENT) => Ok(()),
        // A queue that is full (EAGAIN) is somebody's, too.
        Ok(()) | Err(Errno::AGAIN) => {
            let message = "another process listens there";
            Err(io::Error::new(io::ErrorKind::AddrInUse, message))
        }
        Err(errno) => Err(errno.into()),
    }
}

fn cannot_listen(path: &Path, error: &io::Error) -> Error {
    let message = format!("cannot listen at `{}`: {error}", path.display());
    Error::failed(message).help("name another place with `--socket PATH`")
}

/// Who is at the other end, if it may be.
pub(super) fn stranger(connection: &UnixStream) -> Option<String> {
    let us = rustix::process::geteuid().as_raw();
    match address::peer(connection) {
        Ok(peer) if admits(peer, us) => None,
        Ok(peer) => Some(format!("user {peer}")),
        Err(error) => Some(format!("somebody unknown: {error}")),
    }
}
