//! A new size for a disk while the VM runs: checked as a whole before anything is done.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::sync::TryLockError;

use super::{Control, Disk, failure};
use crate::config::size;
use crate::control::messages::{Event, Failure, FailureKind, Progress, Resize, Resized, Size};

impl Control {
    pub(super) fn resize(
        &self,
        order: &Resize,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Resized, Failure> {
        let (index, disk) = self.disk(&order.disk)?;
        let _alone = match disk.resizing.try_lock() {
            Ok(alone) => alone,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let message = format!("disk {index} is being resized already");
                return Err(failure(FailureKind::Busy, message));
            }
        };
        let from = disk.handle.size();
        let wanted = disk.checked(index, order, from)?;
        let resized = disk.handle.resize_reporting(wanted, &mut |done, of| {
            progress(Progress { done, of });
        });
        resized.map_err(|error| disk.failed(index, wanted, &error))?;
        let resized = Resized {
            disk: index,
            from,
            to: disk.handle.size(),
        };
        if resized.from != resized.to {
            self.life.publish(Event::Resized(resized.clone()));
        }
        Ok(resized)
    }

    /// The disk of an index or an id.
    fn disk(&self, wanted: &str) -> Result<(usize, &Disk), Failure> {
        let by_id = |disk: &Disk| disk.block.id.as_deref() == Some(wanted);
        let index = match wanted.bytes().all(|byte| byte.is_ascii_digit()) {
            true => wanted
                .parse()
                .ok()
                .filter(|index| *index < self.disks.len()),
            false => None,
        };
        let index = index.or_else(|| self.disks.iter().position(by_id));
        index
            .and_then(|index| Some((index, self.disks.get(index)?)))
            .ok_or_else(|| {
                let name = |(index, disk): (usize, &Disk)| match &disk.block.id {
                    Some(id) => format!("{index} (`{id}`)"),
                    None => index.to_string(),
                };
                let known: Vec<_> = self.disks.iter().enumerate().map(name).collect();
                Failure {
                    help: Some(match known.is_empty() {
                        true => "it has no disks".into(),
                        false => format!("its disks are {}", known.join(", ")),
                    }),
                    ..failure(
                        FailureKind::NoSuchDisk,
                        format!("`{}` has no disk {wanted:?}", self.name),
                    )
                }
            })
    }
}

impl Disk {
    /// The size in bytes that the disk is to have, if it can.
    fn checked(&self, index: usize, order: &Resize, from: u64) -> Result<u64, Failure> {
        let name = format!("disk {index} (`{}`)", self.path.display());
        let fixed = |why: &str, help: &str| Failure {
            help: Some(help.into()),
            ..failure(FailureKind::Unsupported, format!("{name} {why}"))
        };
        if self.block.ro {
            return Err(fixed(
                "is read-only",
                "set `ro = false` and start the VM anew",
            ));
        }
        if self.block.ephemeral {
            let help = "what is done to it is dropped at the end; set `ephemeral = false`";
            return Err(fixed("is ephemeral", help));
        }
        let device = self.device_size();
        let wanted = match (&order.size, device) {
            (None, Some(device)) => device,
            (None, None) => {
                return Err(Failure {
                    help: Some("say how large it is to be, as in 8GiB or +1GiB".into()),
                    ..failure(
                        FailureKind::Invalid,
                        format!("{name} is no host block device, so it needs a size"),
                    )
                });
            }
            (Some(wanted), _) => in_bytes(wanted, from)?,
        };
        if let Some(device) = device.filter(|device| *device != wanted) {
            let why = format!("is a host block device of {}", size::show(device));
            return Err(fixed(&why, "resize the device, then leave the size out"));
        }
        let block_size = u64::from(self.block.block_size);
        if wanted == 0 || !wanted.is_multiple_of(block_size) {
            let message = format!("the size is {wanted}, expected a multiple of {block_size}");
            return Err(Failure {
                help: Some(format!(
                    "`block_size` is {block_size}: the next size that fits is {}",
                    wanted.max(1).next_multiple_of(block_size)
                )),
                ..failure(FailureKind::Invalid, message)
            });
        }
        if wanted < from {
            self.may_shrink(&name, order, from, wanted)?;
        }
        Ok(wanted)
    }

    fn may_shrink(&self, name: &str, order: &Resize, from: u64, to: u64) -> Result<(), Failure> {
        let lost = size::show(from - to);
        let (message, help) = match (order.shrink, order.force) {
            (true, true) => return Ok(()),
            (false, _) => (
                format!(
                    "{name} has {}: with {}, its last {lost} would be lost",
                    size::show(from),
                    size::show(to)
                ),
                "say --shrink if that is meant",
            ),
            (true, false) => (
                format!(
                    "the guest runs and may use the last {lost} of {name}, which would be lost"
                ),
                "stop the VM first, or say --force",
            ),
        };
        Err(Failure {
            help: Some(help.into()),
            ..failure(FailureKind::Refused, message)
        })
    }

    /// What the host block device has now, if the disk is one as it is.
    fn device_size(&self) -> Option<u64> {
        let plain = matches!(self.block.format.as_str(), "raw" | "sparse-raw");
        let meta = std::fs::metadata(&self.path).ok()?;
        if !plain || !meta.file_type().is_block_device() {
            return None;
        }
        File::open(&self.path).ok()?.seek(SeekFrom::End(0)).ok()
    }

    /// What to say of a resize that the disk or the host has refused; nothing has changed.
    fn failed(&self, index: usize, wanted: u64, error: &io::Error) -> Failure {
        let path = self.path.display();
        let help = match error.raw_os_error() {
            Some(libc::ENOSPC) => "free some space there, or use `sparse = true`",
            Some(libc::EDQUOT) => "raise the disk quota, or use `sparse = true`",
            Some(libc::EFBIG) => {
                "files cannot be that large there, or for this process: see `ulimit -f`"
            }
            _ => "",
        };
        let kind = match (error.raw_os_error(), error.kind()) {
            (Some(_), _) => FailureKind::Host,
            (None, io::ErrorKind::NotConnected) => FailureKind::Ending,
            (None, io::ErrorKind::InvalidInput) => FailureKind::Unsupported,
            (None, _) => FailureKind::Host,
        };
        let message = match kind {
            FailureKind::Host => format!(
                "disk {index} (`{path}`) cannot have {}, and stays as it is: {}",
                size::show(wanted),
                text(error)
            ),
            _ => error.to_string(),
        };
        Failure {
            help: Some(help.to_owned()).filter(|help| !help.is_empty()),
            errno: error.raw_os_error(),
            ..failure(kind, message)
        }
    }
}

/// A size as it was written, in bytes.
fn in_bytes(wanted: &Size, from: u64) -> Result<u64, Failure> {
    let text = match wanted {
        Size::Bytes(bytes) => return limited(Some(*bytes)),
        Size::Text(text) => text,
    };
    let (number, base) = match text.strip_prefix('+') {
        Some(more) => (more, from),
        None => (text.as_str(), 0),
    };
    match size::parse(number) {
        Ok(bytes) => limited(base.checked_add(bytes)),
        Err(help) => Err(Failure {
            help: Some(help),
            ..failure(
                FailureKind::Invalid,
                format!("the size is {text:?}, expected one such as 8GiB or +1GiB"),
            )
        }),
    }
}

/// The kernel's file offsets are signed.
fn limited(bytes: Option<u64>) -> Result<u64, Failure> {
    bytes
        .filter(|bytes| *bytes <= i64::MAX as u64)
        .ok_or_else(|| {
            let message = "the size is past 2^63 bytes, which is more than a file can have";
            failure(FailureKind::Invalid, message)
        })
}

/// An error's words without its number, which is told on its own.
fn text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}
