//! The writes of a change, each of which may be the last.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

/// What is done to a file.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(super) enum Step {
    Write(u64, Vec<u8>),
    Sync,
    Punch(u64, u64),
    Truncate(u64),
}

#[cfg(test)]
thread_local! {
    /// How many operations this thread has left until the host fails.
    pub(super) static LEFT: std::cell::Cell<u64> = const { std::cell::Cell::new(u64::MAX) };
    /// What this thread has done.
    pub(super) static STEPS: std::cell::RefCell<Vec<Step>> =
        const { std::cell::RefCell::new(Vec::new()) };
}

#[cfg(test)]
fn record(step: impl FnOnce() -> Step) -> io::Result<()> {
    let left = LEFT.get().checked_sub(1);
    LEFT.set(left.ok_or_else(|| io::Error::other("the host fails"))?);
    STEPS.with_borrow_mut(|steps| steps.push(step()));
    Ok(())
}

pub(super) fn write(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(test)]
    record(|| Step::Write(offset, bytes.to_vec()))?;
    file.write_all_at(bytes, offset)
}

/// All that was written is durable when it returns.
pub(super) fn sync(file: &File) -> io::Result<()> {
    #[cfg(test)]
    record(|| Step::Sync)?;
    file.sync_data()
}

/// Gives space back to the host.
pub(super) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    #[cfg(test)]
    record(|| Step::Punch(offset, len))?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, offset, len)?)
}

/// Makes a file shorter.
pub(super) fn truncate(file: &File, len: u64) -> io::Result<()> {
    #[cfg(test)]
    record(|| Step::Truncate(len))?;
    file.set_len(len)
}
