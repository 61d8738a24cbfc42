//! Reading from a file that may end too early, or be nothing but holes.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

#[cfg(test)]
thread_local! {
    /// How many reads this thread has left until the host fails.
    pub(in super::super) static LEFT: std::cell::Cell<u64> =
        const { std::cell::Cell::new(u64::MAX) };
}

/// Length of a file or block device.
pub(in super::super) fn length(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// Reads from `offset` on; what is past the end of the file are zeroes.
pub(in super::super) fn read_padded(file: &File, offset: u64, to: &mut [u8]) -> io::Result<()> {
    #[cfg(test)]
    LEFT.set(
        LEFT.get()
            .checked_sub(1)
            .ok_or_else(|| io::Error::other("the host fails"))?,
    );
    let mut done = 0;
    while done < to.len() {
        let Some(at) = offset
            .checked_add(done as u64)
            .filter(|at| *at < i64::MAX as u64)
        else {
            break;
        };
        match file.read_at(&mut to[done..], at) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    to[done..].fill(0);
    Ok(())
}

/// As [`read_padded`], but only if anything is there: returns whether. A file may be said to have
/// any number of tables where it has but holes.
pub(in super::super) fn read_table(file: &File, offset: u64, to: &mut [u8]) -> io::Result<bool> {
    if offset > i64::MAX as u64 {
        return Ok(false);
    }
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data - offset >= to.len() as u64 => Ok(false),
        // Past the end, or nothing but holes up to it.
        Err(Errno::NXIO) => Ok(false),
        // Not everything can be asked.
        _ => read_padded(file, offset, to).map(|()| true),
    }
}
