//! Locks on an image, in the form that QEMU honours too.
//!
//! QEMU (block/file-posix.c) keeps, for every permission that a user of an image may have, two
//! bytes of the file: one that is locked by those who use the permission, one by those who do
//! not let others use it. All locks are shared locks of the open file description; a conflict
//! is found by asking whether an exclusive lock on the opposite byte would be granted. As
//! everyone locks first and asks then, of two that come at once at most one succeeds.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::open::text;
use crate::OpenError;

/// First of the bytes for permissions in use.
const USED: i64 = 100;
/// First of the bytes for permissions denied to others.
const DENIED: i64 = 200;

/// Reading what others do not change behind one's back: `BLK_PERM_CONSISTENT_READ`.
const READ: i64 = 0;
/// `BLK_PERM_WRITE`.
const WRITE: i64 = 1;
/// `BLK_PERM_RESIZE`.
const RESIZE: i64 = 3;

/// Locks on an open file description, released when dropped: a child process that has not yet
/// executed its program may hold the description open for longer.
pub(super) struct Lock(OwnedFd);

impl Drop for Lock {
    fn drop(&mut self) {
        // To the end of the file, with everything in between.
        let _ = request(self.0.as_fd(), libc::F_OFD_SETLK, libc::F_UNLCK, USED, 0);
    }
}

/// How long a lock is waited for that no process is seen to hold: when one was killed, the kernel
/// closes what its io_uring had open a little after it is gone.
const PATIENCE: Duration = Duration::from_secs(1);

/// Takes the locks of a reader or a writer on an open file.
///
/// Readers share; a writer, like a guest's disk in QEMU, suffers no other writer, and neither
/// writer nor reader suffers one that is there already.
pub(super) fn lock(file: BorrowedFd<'_>, path: &Path, ro: bool) -> Result<Lock, OpenError> {
    let begin = Instant::now();
    loop {
        match try_lock(file, path, ro)? {
            Ok(lock) => return Ok(lock),
            Err(byte) => match holder(file, byte) {
                None if begin.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(10)),
                holder => return Err(held(path, byte, holder)),
            },
        }
    }
}

/// The lock, or the byte that someone else has locked.
fn try_lock(file: BorrowedFd<'_>, path: &Path, ro: bool) -> Result<Result<Lock, i64>, OpenError> {
    let taken = file.try_clone_to_owned().map(Lock).and_then(|lock| {
        let conflict = take(file, ro)?;
        Ok((lock, conflict))
    });
    match taken {
        Ok((lock, None)) => Ok(Ok(lock)),
        // Ours is dropped: the holder is looked for among those who have locks.
        Ok((_, Some(byte))) => Ok(Err(byte)),
        Err(error) => Err(OpenError {
            message: format!("cannot lock `{}`: {}", path.display(), text(&error)),
            help: Some("set `lock = false` if nothing else uses the image".into()),
            key: "lock",
        }),
    }
}

/// Returns the byte that someone else has locked, if there is one.
fn take(file: BorrowedFd<'_>, ro: bool) -> io::Result<Option<i64>> {
    let used: &[i64] = if ro { &[READ] } else { &[READ, WRITE, RESIZE] };
    let denied = &[WRITE, RESIZE];
    let own = used.iter().map(|bit| USED + bit);
    for byte in own.chain(denied.iter().map(|bit| DENIED + bit)) {
        match request(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte, 1) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Some(byte)),
            Err(error) => return Err(error),
        }
    }
    let others = denied.iter().map(|bit| USED + bit);
    for byte in others.chain(used.iter().map(|bit| DENIED + bit)) {
        let found = request(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)?;
        if i32::from(found.l_type) != libc::F_UNLCK {
            return Ok(Some(byte));
        }
    }
    Ok(None)
}

fn request(
    file: BorrowedFd<'_>,
    command: i32,
    kind: i32,
    byte: i64,
    len: i64,
) -> io::Result<libc::flock64> {
    let mut lock = libc::flock64 {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: len,
        l_pid: 0,
    };
    loop {
        // SAFETY: the command takes a pointer to such a structure.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) } {
            0 => return Ok(lock),
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// The error for a lock on `byte` that someone else holds.
fn held(path: &Path, byte: i64, holder: Option<String>) -> OpenError {
    let holder = holder.unwrap_or_else(|| "another process".into());
    let path = path.display();
    OpenError {
        message: if byte < DENIED {
            format!("`{path}` is being written by {holder}")
        } else {
            format!("`{path}` is in use by {holder}, which lets nobody else write to it")
        },
        help: Some("stop it first; only disks with `ro = true` share an image".into()),
        key: OpenError::HOST,
    }
}

/// Name and id of a process that holds a lock on `byte` of the file. The kernel does not tell
/// for locks of open file descriptions, but lists them with the descriptors of each process.
fn holder(file: BorrowedFd<'_>, byte: i64) -> Option<String> {
    let own = rustix::fs::fstat(file).ok()?;
    let same = |fd: &Path| {
        fs::metadata(fd).is_ok_and(|other| (other.dev(), other.ino()) == (own.st_dev, own.st_ino))
    };
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|pid| pid.parse::<u32>().is_ok()) else {
            continue;
        };
        // Other users' processes cannot be looked into.
        let Ok(open) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        for fd in open.flatten() {
            let number = fd.file_name();
            if !same(&fd.path()) {
                continue;
            }
            let info = process.path().join("fdinfo").join(&number);
            if fs::read_to_string(info).is_ok_and(|info| locks(&info, byte)) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some(format!("process {pid} (`{}`)", name.trim_end()));
            }
        }
    }
    None
}

/// Whether a descriptor's `fdinfo` (proc_pid_fdinfo(5)) lists a lock on `byte`. A line reads
/// `lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101`.
fn locks(info: &str, byte: i64) -> bool {
    let mut lines = info.lines().filter(|line| line.starts_with("lock:"));
    lines.any(|line| {
        let mut words = line.split_whitespace().rev();
        let last = words.next().map(|end| end.parse().unwrap_or(i64::MAX));
        let first = words.next().and_then(|start| start.parse().ok());
        first
            .zip(last)
            .is_some_and(|(first, last): (i64, i64)| (first..=last).contains(&byte))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_of_a_listed_lock_is_understood() {
        let info = "pos:\t0\nflags:\t02\nlock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:17 100 101\n";
        for (byte, locked) in [(99, false), (100, true), (101, true), (102, false)] {
            assert_eq!(locks(info, byte), locked);
        }
        assert!(locks(
            "lock:\t1: POSIX ADVISORY WRITE 7 fe:00:17 0 EOF",
            203
        ));
        assert!(!locks("pos: 100 101", 100));
    }
}
