//! The lock file of a VM, `<stem>.lock` beside its TOML file: what the VM boots from, and the
//! machine that its guest finds. With it, the same file boots the same VM on every host, or says
//! what differs.

mod chain;
mod contents;
mod drift;
mod gather;
mod text;

use std::path::{Path, PathBuf};

use crate::config::Vm;
use crate::{Error, Result, config, durable};

pub(crate) use drift::Drift;

use contents::Lock;
use drift::Found;

/// Where the lock of a VM's file is.
///
/// # Errors
///
/// The file has the name that its lock would have.
pub(crate) fn place(file: &Path) -> Result<PathBuf> {
    let place = file.with_extension("lock");
    match place == file {
        true => {
            let message = format!("{} has the name of a lock file", file.display());
            Err(Error::usage(message).help("give the VM's file the extension .toml"))
        }
        false => Ok(place),
    }
}

/// Writes the lock of a VM: atomically, in the place of an older one. Whether anything in it is
/// new.
///
/// # Errors
///
/// A file that the VM is made of cannot be read, or the lock cannot be written.
pub(crate) fn write(vm: &Vm) -> Result<bool> {
    let place = place(&vm.file)?;
    let text = Lock::of(vm)?.text(vm)?;
    if config::text(&place).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(false);
    }
    durable::replace(&place, &text).map_err(|error| {
        Error::failed(format!("cannot write {}: {error}", place.display()))
            .help("the lock is kept beside the VM's file; check that folder and its disk")
    })?;
    Ok(true)
}

/// Compares a VM with its lock.
///
/// # Errors
///
/// There is no lock, or it is not readable as one. What has drifted is no error here.
pub(crate) fn compare(vm: &Vm) -> Result<Drift> {
    let place = place(&vm.file)?;
    let lock = Lock::read(&place, &vm.file)?;
    Ok(Drift::between(&lock, Found::of(vm)?))
}

/// Refuses a VM that is not as its lock has it.
///
/// # Errors
///
/// As [`compare`]; or something has drifted: all of it is said (exit code 2).
pub(crate) fn check(vm: &Vm) -> Result<()> {
    let drift = compare(vm)?;
    match drift.is_none() {
        true => Ok(()),
        false => Err(drift.error(vm)),
    }
}

#[cfg(test)]
mod tests;
