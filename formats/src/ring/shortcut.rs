//! Transfers that need no engine, because the page cache has or takes the bytes at once.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FileType, OFlags};

use super::op::{Kind, Request};

/// Whether, and how, a transfer of a file is tried before the engine is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shortcut {
    /// Not at all.
    Never,
    /// With RWF_NOWAIT, which fails rather than waits.
    Nowait,
}

impl Shortcut {
    /// For reads and for writes of a newly opened file.
    pub(super) fn of(fd: &OwnedFd, flags: OFlags) -> (Shortcut, Shortcut) {
        let regular = rustix::fs::fstat(fd)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        if regular && !flags.contains(OFlags::DIRECT) {
            (Shortcut::Nowait, Shortcut::Nowait)
        } else {
            (Shortcut::Never, Shortcut::Never)
        }
    }
}

/// Tries a request at once. Returns what the kernel returned, or `None` if the engine is to be
/// asked.
pub(super) fn attempt(request: &Request) -> Option<i32> {
    let file = request.file.opened();
    let shortcut = match request.kind {
        Kind::Read => &file.reads,
        Kind::Write => &file.writes,
        _ => return None,
    };
    if shortcut.get() == Shortcut::Never {
        return None;
    }
    let iov = request.iovecs();
    let fd = request.file.as_raw_fd();
    let offset = i64::try_from(request.offset).ok()?;
    // SAFETY: the pieces are mapped, for the request owns their segments.
    let count = unsafe {
        match request.kind {
            Kind::Read => {
                libc::preadv2(fd, iov.as_ptr(), iov.len() as i32, offset, libc::RWF_NOWAIT)
            }
            _ => libc::pwritev2(fd, iov.as_ptr(), iov.len() as i32, offset, libc::RWF_NOWAIT),
        }
    };
    if count > 0 {
        return i32::try_from(count).ok();
    }
    if count < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
        shortcut.set(Shortcut::Never);
    }
    None
}
