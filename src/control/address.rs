//! Addresses of sockets, and who is at the other end.

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::net::SocketAddrUnix;

/// The longest path that an address holds, without the zero at its end: bytes (unix(7)).
const LONGEST: usize = 107;

/// The folder of a socket, and its name there.
pub(super) struct Address<'a> {
    /// Opened with O_PATH, or for reading.
    pub(super) folder: OwnedFd,
    /// Without a slash.
    pub(super) name: &'a OsStr,
    path: &'a Path,
}

impl<'a> Address<'a> {
    /// Opens the folder of a socket, which itself need not be there.
    pub(super) fn of(path: &'a Path) -> io::Result<Self> {
        let Some(name) = path.file_name() else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it has no name of its own",
            ));
        };
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(folder, flags, Mode::empty())?;
        Ok(Address { folder, name, path })
    }

    /// What bind(2) and connect(2) take. A path that is too long for them leads through the
    /// folder's descriptor instead.
    pub(super) fn socket(&self) -> io::Result<SocketAddrUnix> {
        let fits = self.path.as_os_str().len() <= LONGEST;
        if fits {
            return Ok(SocketAddrUnix::new(self.path)?);
        }
        let folder = format!("/proc/self/fd/{}", self.folder.as_fd().as_raw_fd());
        let path = Path::new(&folder).join(self.name);
        let len = path.as_os_str().len();
        if len > LONGEST {
            let most = LONGEST.saturating_sub(folder.len() + 1);
            let message = format!(
                "its name is {} bytes long, expected at most {most}",
                self.name.len()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidFilename, message));
        }
        Ok(SocketAddrUnix::new(&path)?)
    }
}

/// The user at the other end of a connection; for a client, the one who listened.
pub(super) fn peer(socket: impl AsFd) -> io::Result<u32> {
    // Not by rustix, whose process id cannot be the 0 that a process in another namespace has.
    let mut credentials = MaybeUninit::<libc::ucred>::uninit();
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both pointers are valid for writes, the first of `len` bytes.
    let got = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            credentials.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    if len as usize != size_of::<libc::ucred>() {
        return Err(io::Error::other("the kernel knows other credentials"));
    }
    // SAFETY: getsockopt(2) has succeeded and has filled in all of it.
    Ok(unsafe { credentials.assume_init() }.uid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_path_that_fits_is_the_address_itself() {
        let path = Path::new("/tmp").join("x".repeat(LONGEST - 5));
        let address = Address::of(&path).unwrap().socket().unwrap();
        let held = address.path_bytes().unwrap();
        // With or without the zero behind it.
        let held = held.strip_suffix(b"\0").unwrap_or(held);
        assert_eq!(held, path.as_os_str().as_encoded_bytes());
    }

    #[test]
    fn a_path_that_is_too_long_leads_through_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("d".repeat(200));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("control.sock");
        let address = Address::of(&path).unwrap();
        let socket = address.socket().unwrap();
        let bytes = socket.path_bytes().unwrap();
        assert!(bytes.starts_with(b"/proc/self/fd/") && bytes.ends_with(b"/control.sock"));
    }

    #[test]
    fn a_name_that_is_too_long_by_itself_is_an_error_with_its_limit() {
        let path = Path::new("/tmp").join("x".repeat(110));
        let error = Address::of(&path).unwrap().socket().unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("its name is 110 bytes long, expected at most "),
            "{text}"
        );
    }

    #[test]
    fn the_peer_of_a_pair_is_this_user() {
        let (one, other) = UnixStream::pair().unwrap();
        let us = rustix::process::geteuid().as_raw();
        assert_eq!(peer(one).unwrap(), us);
        assert_eq!(peer(other).unwrap(), us);
    }
}
