//! A new size for a disk while the VM runs: checked as a whole before anything is done.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::sync::TryLockError;

use super::{Control, Disk, failure};
use crate::control::messages::{Event, Failure, FailureKind, Progress, Resize, Resized};
use crate::resize::{self, Consent, Subject, Wanted};
use crate::vm::devices::DiskHandle;

impl Control {
    pub(super) fn resize(
        &self,
        order: &Resize,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Resized, Failure> {
        let (index, disk) = self.disk(&order.disk)?;
        let DiskHandle::Own(handle) = &disk.handle else {
            return Err(resize::served(&index.to_string(), &disk.path));
        };
        let _alone = match disk.resizing.try_lock() {
            Ok(alone) => alone,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let message = format!("disk {index} is being resized already");
                return Err(failure(FailureKind::Busy, message));
            }
        };
        let from = handle.size();
        let name = index.to_string();
        let subject = disk.subject(&name, from);
        let wanted = order.size.as_ref().map(Wanted::try_from).transpose()?;
        let consent = Consent {
            shrink: order.shrink,
            force: order.force,
        };
        let wanted = resize::decide(&subject, wanted, consent)?;
        let resized = handle.resize_reporting(wanted, &mut |done, of| {
            progress(Progress { done, of });
        });
        resized.map_err(|error| resize::failed(&subject, wanted, &error))?;
        let resized = Resized {
            disk: index,
            from,
            to: handle.size(),
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
    /// The disk as the decision about its size sees it.
    fn subject<'a>(&'a self, name: &'a str, size: u64) -> Subject<'a> {
        Subject {
            disk: name,
            path: &self.path,
            ro: self.block.ro,
            ephemeral: self.block.ephemeral,
            // The disk itself says so.
            fixed: None,
            block_size: self.block.block_size,
            size,
            device: self.device_size(),
            running: true,
        }
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
}
