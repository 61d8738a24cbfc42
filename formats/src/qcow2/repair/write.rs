//! The writes of a repair, each of which may be the last.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

#[cfg(test)]
thread_local! {
    /// How many writes this thread has left until the power fails.
    pub(super) static LEFT: std::cell::Cell<u64> = const { std::cell::Cell::new(u64::MAX) };
}

pub(super) fn write(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(test)]
    LEFT.set(
        LEFT.get()
            .checked_sub(1)
            .ok_or_else(|| io::Error::other("the power is gone"))?,
    );
    file.write_all_at(bytes, offset)
}
