//! The lock file of a VM, `<stem>.lock` beside its TOML file: what the VM boots from, and the
//! machine that its guest finds. With it, the same file boots the same VM on every host, or says
//! what differs.

mod chain;
mod contents;
mod drift;
mod gather;
mod place;
mod text;

use crate::config::Vm;
use crate::{Error, Result, config, durable};

pub(crate) use drift::Drift;
pub(crate) use place::Place;

use contents::Lock;
use drift::Found;

/// Writes the lock of a VM: atomically, in the place of an older one. Whether anything in it is
/// new.
///
/// # Errors
///
/// A file that the VM is made of cannot be read, or the lock cannot be written.
pub(crate) fn write(vm: &Vm, place: &Place) -> Result<bool> {
    let text = Lock::of(vm)?.text(place)?;
    if config::text(&place.lock).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(false);
    }
    durable::replace(&place.lock, &text).map_err(|error| {
        Error::failed(format!("cannot write {}: {error}", place.lock.display()))
            .help("the lock is kept beside the VM's file; check that folder and its disk")
    })?;
    Ok(true)
}

/// Compares a VM with its lock.
///
/// # Errors
///
/// There is no lock, or it is not readable as one. What has drifted is no error here.
pub(crate) fn compare(vm: &Vm, place: &Place) -> Result<Drift> {
    let lock = Lock::read(place)?;
    Ok(Drift::between(&lock, Found::of(vm)?))
}

/// Refuses a VM that is not as its lock has it.
///
/// # Errors
///
/// As [`compare`]; or something has drifted: all of it is said (exit code 2).
pub(crate) fn check(vm: &Vm, place: &Place) -> Result<()> {
    checked(vm, place).map(drop)
}

/// As [`check`], and has the VM boot nothing else later, at a reboot of its guest: kernel and
/// initrd get the digests of the lock.
///
/// # Errors
///
/// As [`check`].
pub(crate) fn hold(vm: &mut Vm, place: &Place) -> Result<()> {
    let lock = checked(vm, place)?;
    let files = [
        ("kernel", vm.boot.kernel.as_mut()),
        ("initrd", vm.boot.initrd.as_mut()),
    ];
    for (key, file) in files {
        if let (Some(file), Some(locked)) = (file, lock.boot.get(key)) {
            file.sha256 = Some(locked.sha256);
        }
    }
    Ok(())
}

/// The lock of a VM that is as its lock has it.
fn checked(vm: &Vm, place: &Place) -> Result<Lock> {
    let lock = Lock::read(place)?;
    let drift = Drift::between(&lock, Found::of(vm)?);
    match drift.is_none() {
        true => Ok(lock),
        false => Err(drift.error(place)),
    }
}

#[cfg(test)]
mod tests;
