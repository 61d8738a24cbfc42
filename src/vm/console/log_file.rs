//! The file `console.log`.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::Error;
use crate::config::Vm;

/// Opens the log to append to. A FIFO without a reader is an error, not a wait for one.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(path)?;
    fcntl_setfl(&log, fcntl_getfl(&log)? - OFlags::NONBLOCK)?;
    Ok(log)
}

/// The disk, kernel or initrd of the VM that this file is, by whatever name.
pub(crate) fn same_file<'a>(log: &Metadata, config: &'a Vm) -> Option<&'a Path> {
    let log = Some(log).filter(|log| log.is_file())?;
    let same = |file: Metadata| (file.dev(), file.ino()) == (log.dev(), log.ino());
    let disks = config.block.iter().map(|block| &*block.path);
    let boot = config.boot.kernel.iter().chain(&config.boot.initrd);
    let mut others = disks.chain(boot.map(|file| &*file.path));
    others.find(|other| std::fs::metadata(other).is_ok_and(same))
}

/// The error for a log that is this file of the VM.
pub(crate) fn is_same(other: &Path) -> Error {
    let message = format!("`console.log` is the same file as {}", other.display());
    Error::usage(message)
        .help("what the guest prints would be written into it: give another file")
        .about("console.log")
}

/// The error for a log that cannot be opened.
pub(crate) fn unopenable(path: &Path, error: &io::Error) -> Error {
    let what = format!("the console's log {}", path.display());
    Error::unopenable(&what, error).about("console.log")
}
