//! The file `console.log`.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

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
pub(crate) fn same_file<'a>(log: &File, config: &'a Vm) -> Option<&'a Path> {
    let log = log.metadata().ok().filter(Metadata::is_file)?;
    let same = |file: Metadata| (file.dev(), file.ino()) == (log.dev(), log.ino());
    let disks = config.block.iter().map(|block| &*block.path);
    let boot = [&config.boot.kernel].into_iter().chain(&config.boot.initrd);
    let mut others = disks.chain(boot.map(|file| &*file.path));
    others.find(|other| std::fs::metadata(other).is_ok_and(same))
}
