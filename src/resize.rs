//! What size a disk is to get: decided in one place for disks of running VMs and of others.
//!
//! Nothing here touches an image: [`decide`] says yes or no before anything is changed.

use std::fmt;

use crate::config::size;
use crate::control::messages::{Failure, FailureKind, Size};

/// Largest size in bytes: the kernel's file offsets are signed.
const LARGEST: u64 = i64::MAX as u64;

/// A size that is asked for, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// This one.
    To(u64),
    /// So much on top of what the disk has.
    By(u64),
}

impl Wanted {
    /// Reads what a person writes: `8GiB`, `2147483648`, `+1GiB`.
    ///
    /// # Errors
    ///
    /// It is no size; the failure says how one is written.
    pub(crate) fn parse(text: &str) -> Result<Wanted, Failure> {
        let (more, number) = match text.strip_prefix('+') {
            Some(number) => (true, number),
            None => (false, text),
        };
        let bytes = size::parse(number).map_err(|advice| {
            let shown: String = text.chars().take(40).collect();
            let message = format!("the size is {shown:?}, expected one such as 8GiB or +1GiB");
            failure(FailureKind::Invalid, message).help(match text.strip_prefix('-') {
                Some(_) => "name the size that is to be left, and add `--shrink`".to_owned(),
                None => advice,
            })
        })?;
        Ok(match more {
            true => Wanted::By(bytes),
            false => Wanted::To(bytes),
        })
    }
}

/// Why a disk that another process serves, at this socket, is not resized here.
pub(crate) fn served(disk: &str, socket: &std::path::Path) -> Failure {
    let socket = socket.display();
    let message = format!("disk {disk} is served by another process, at `{socket}`");
    failure(FailureKind::Unsupported, message).help(
        "resize it there: `launcher disk serve` looks at the size again when it gets SIGHUP"
            .to_owned(),
    )
}

impl TryFrom<&Size> for Wanted {
    type Error = Failure;

    fn try_from(size: &Size) -> Result<Wanted, Failure> {
        match size {
            Size::Bytes(bytes) => Ok(Wanted::To(*bytes)),
            Size::Text(text) => Wanted::parse(text),
        }
    }
}

/// A disk whose size is to change, as it is now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    /// How the user names it: its index or `id`.
    pub(crate) disk: &'a str,
    /// Its image.
    pub(crate) path: &'a std::path::Path,
    /// Whether it may not be written.
    pub(crate) ro: bool,
    /// Whether what is written to it is dropped at the end.
    pub(crate) ephemeral: bool,
    /// The name of its format, if that has images of a fixed size.
    pub(crate) fixed: Option<&'a str>,
    /// Bytes of which its size is a multiple.
    pub(crate) block_size: u32,
    /// Bytes that it has.
    pub(crate) size: u64,
    /// Bytes that the host block device has now, if the disk is the device itself.
    pub(crate) device: Option<u64>,
    /// Whether a guest has it.
    pub(crate) running: bool,
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {} (`{}`)", self.disk, self.path.display())
    }
}

/// What the user has agreed to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Consent {
    /// A smaller size is meant: what lies beyond it is lost.
    pub(crate) shrink: bool,
    /// Shrinks although a guest may use what is cut off.
    pub(crate) force: bool,
}

/// The size in bytes that the disk is to get; the one that it has if nothing is to be done.
///
/// # Errors
///
/// It cannot or must not have that size.
pub(crate) fn decide(
    subject: &Subject<'_>,
    wanted: Option<Wanted>,
    consent: Consent,
) -> Result<u64, Failure> {
    changeable(subject)?;
    let to = match (wanted, subject.device) {
        (Some(Wanted::To(bytes)), _) => bytes,
        (Some(Wanted::By(bytes)), _) => {
            let sum = subject.size.checked_add(bytes);
            sum.ok_or_else(too_large)?
        }
        (None, Some(device)) => device,
        (None, None) => {
            let message = format!("{subject} is no host block device: it needs a size");
            let help = "name one, such as 8GiB or +1GiB".to_owned();
            return Err(failure(FailureKind::Invalid, message).help(help));
        }
    };
    possible(subject, to)?;
    if let Some(device) = subject.device.filter(|device| to != *device) {
        let message = format!(
            "{subject} is a host block device of {}, expected that size, not {}",
            size::show(device),
            size::show(to)
        );
        let help = "change the device first (`lvextend`, …), then leave the size out".to_owned();
        return Err(failure(FailureKind::Unsupported, message).help(help));
    }
    if to < subject.size {
        may_shrink(subject, to, consent)?;
    }
    Ok(to)
}

/// Refuses a disk that never changes its size.
fn changeable(subject: &Subject<'_>) -> Result<(), Failure> {
    let (why, help) = match subject {
        Subject { ro: true, .. } => ("is read-only".to_owned(), "set `ro = false`"),
        Subject {
            ephemeral: true, ..
        } => (
            "is ephemeral".to_owned(),
            "its image is never written: set its `size`, which is then that of the disk alone, or \
             take out `ephemeral`",
        ),
        Subject {
            fixed: Some(format),
            ..
        } => (
            format!("has the format `{format}`, whose images have a fixed size"),
            "`launcher formats` lists what each format can do",
        ),
        _ => return Ok(()),
    };
    let message = format!("{subject} {why}");
    Err(failure(FailureKind::Unsupported, message).help(help.to_owned()))
}

/// Refuses what is no size of a disk.
fn possible(subject: &Subject<'_>, to: u64) -> Result<(), Failure> {
    if to > LARGEST {
        return Err(too_large());
    }
    let block_size = u64::from(subject.block_size.max(1));
    if to > 0 && to.is_multiple_of(block_size) {
        return Ok(());
    }
    let message = format!("the size is {to}, expected a multiple of {block_size}, and not 0");
    let next = to.max(1).next_multiple_of(block_size);
    let help = format!("`block_size` is {block_size}: the next size that fits is {next}");
    Err(failure(FailureKind::Invalid, message).help(help))
}

fn too_large() -> Failure {
    let message = "the size is past 2^63 bytes, which is more than a file can have";
    failure(FailureKind::Invalid, message.to_owned())
}

/// Refuses to cut off what the user has not agreed to lose.
fn may_shrink(subject: &Subject<'_>, to: u64, consent: Consent) -> Result<(), Failure> {
    let (has, wanted) = (size::show(subject.size), size::show(to));
    let lost = size::show(subject.size - to);
    if !consent.shrink {
        let message = format!("{subject} has {has}: with {wanted}, its last {lost} would be lost");
        let help = "shrink the partitions and file systems in it first, then add `--shrink`";
        return Err(failure(FailureKind::Refused, message).help(help.to_owned()));
    }
    if subject.running && !consent.force {
        let message =
            format!("the guest runs and may use the last {lost} of {subject}, which would be lost");
        let help = "stop the VM first, or add `--force` if the guest uses no more than that";
        return Err(failure(FailureKind::Refused, message).help(help.to_owned()));
    }
    Ok(())
}

/// Why a disk did not get the size that [`decide`] allowed; it has the one that it had.
pub(crate) fn failed(subject: &Subject<'_>, to: u64, error: &std::io::Error) -> Failure {
    use std::io::ErrorKind;
    let canceled = error.raw_os_error() == Some(libc::ECANCELED);
    let errno = error.raw_os_error().filter(|_| !canceled);
    let kind = match (errno, error.kind()) {
        _ if canceled => FailureKind::Ending,
        // The disk was closed meanwhile.
        (None, ErrorKind::NotConnected) => FailureKind::Ending,
        (None, ErrorKind::InvalidInput) => FailureKind::Unsupported,
        _ => FailureKind::Host,
    };
    let text = error.to_string();
    let text = match canceled {
        true => "the VM is ending",
        false => text
            .split_once(" (os error")
            .map_or(&*text, |(text, _)| text),
    };
    let wanted = size::show(to);
    let message = format!("{subject} cannot have {wanted}, and stays as it is: {text}");
    let help = match errno {
        Some(libc::ENOSPC) => Some("free some space there, or use `sparse = true`"),
        Some(libc::EDQUOT) => Some("raise the disk quota, or use `sparse = true`"),
        Some(libc::EFBIG) => {
            Some("its file system, its format, or this process (`ulimit -f`) allows no more")
        }
        _ => None,
    };
    Failure {
        errno,
        help: help.map(str::to_owned),
        ..failure(kind, message)
    }
}

fn failure(kind: FailureKind, message: String) -> Failure {
    Failure {
        kind,
        message,
        help: None,
        errno: None,
    }
}

/// Says what to do about a failure.
trait Help {
    fn help(self, help: String) -> Self;
}

impl Help for Failure {
    fn help(self, help: String) -> Self {
        Failure {
            help: Some(help),
            ..self
        }
    }
}

#[cfg(test)]
mod tests;
