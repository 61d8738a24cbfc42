//! Kernel and initrd from the file system of a disk: what `boot.from_block` stands for.
//!
//! They are read through the open disk, by the thread that serves it: so every format works, no
//! lock is in the way, and at a reboot of the guest the disk is as the guest has left it, whether
//! that is in the image already or not. What is on the disk is not trusted.

mod contents;
mod kernels;
mod partitions;
#[cfg(test)]
mod tests;
mod window;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use ext4_view::{Ext4, Ext4Error};

use super::files::{BootFile, BootFiles, Part};
use crate::config::Block;
use crate::devices::virtio::blk::BlkHandle;
use crate::scratch::Scratch;
use crate::{Error, Result};
use contents::Contents;
use kernels::Kernel;
use partitions::{TableError, Volume};
use window::{Watch, Window};

/// A reader that asks for nothing new for so long is taken to go in circles: a file system can be
/// built so.
const STALLED: Duration = Duration::from_secs(30);

const KEY: &str = "boot.from_block";

/// Reads kernel and initrd from a disk that no guest uses now.
pub(crate) fn read(disk: &BlkHandle, block: &Block) -> Result<BootFiles> {
    read_patiently(disk, block, STALLED)
}

/// As [`read`], of a disk that is described nowhere yet, and may have no root file system.
pub(crate) fn read_alone(disk: &BlkHandle, path: &Path) -> Result<BootFiles> {
    Image::alone(path).patiently(disk, STALLED, Image::read)
}

fn read_patiently(disk: &BlkHandle, block: &Block, patience: Duration) -> Result<BootFiles> {
    let image = Image {
        shown: format!("`{}`", block.path.display()),
        sector: block.block_size.into(),
        root: block.root,
    };
    image.patiently(disk, patience, Image::read)
}

/// Number of the partition with a root file system; `None` if that is the whole disk, or cannot be
/// told. The disk is described nowhere yet.
pub(crate) fn root_of(disk: &BlkHandle, path: &Path) -> Result<Option<u32>> {
    Image::alone(path).patiently(disk, STALLED, Image::root)
}

const REPAIR: &str = "repair it with e2fsck, or name files of the host with `kernel` and `initrd`";

/// A disk that is searched.
struct Image {
    /// Its path, as messages have it.
    shown: String,
    /// Its logical block size in bytes.
    sector: u64,
    /// Whether it has the guest's root file system.
    root: bool,
}

impl Image {
    fn alone(path: &Path) -> Image {
        Image {
            shown: format!("`{}`", path.display()),
            sector: 512,
            root: false,
        }
    }

    /// Reads something of it, as long as its reader asks for something new again and again.
    fn patiently<T: Send + 'static>(
        self,
        disk: &BlkHandle,
        patience: Duration,
        read: fn(&Image, Window) -> Result<T>,
    ) -> Result<T> {
        let watch = Arc::new(Watch::default());
        let (answer, answered) = mpsc::sync_channel(1);
        let (handle, watched) = (disk.clone(), Arc::clone(&watch));
        let shown = self.shown.clone();
        // A thread of its own can be left to itself if the reader never comes to an end: the error
        // ends this process.
        thread::Builder::new()
            .name("boot files".into())
            .spawn(move || {
                let _ = answer.send(read(&self, Window::of(handle, watched)));
            })
            .map_err(|error| Error::failed(format!("cannot start a thread: {error}")))?;
        loop {
            let before = watch.idle_at();
            match answered.recv_timeout(patience) {
                Ok(result) => return result.map_err(|error| error.about(KEY)),
                Err(RecvTimeoutError::Timeout) if before.is_none() || before != watch.idle_at() => {
                }
                Err(error) => {
                    let what = match error {
                        RecvTimeoutError::Timeout => "leads in circles",
                        RecvTimeoutError::Disconnected => "is more than its reader can take",
                    };
                    let message = format!("the file system of {shown} is damaged: it {what}");
                    return Err(Error::usage(message).help(REPAIR).about(KEY));
                }
            }
        }
    }

    fn volumes(&self, disk: &Window) -> Result<Vec<Volume>> {
        partitions::volumes(disk, self.sector).map_err(|error| match error {
            TableError::Unreadable(error) => self.unreadable(&error),
            TableError::Damaged(what, help) => {
                let message = format!("the partition table of {} is damaged: {what}", self.shown);
                let usual = || "repair it with sfdisk or sgdisk".to_owned();
                Error::usage(message).help(help.unwrap_or_else(usual))
            }
        })
    }

    fn root(&self, disk: Window) -> Result<Option<u32>> {
        let volumes = self.volumes(&disk)?;
        if let Some(told) = volumes.iter().find(|volume| volume.root) {
            return Ok(told.number);
        }
        for volume in &volumes {
            let contents = Contents::of(&volume.window);
            if let Contents::Ext4(fs) = contents.map_err(|error| self.unreadable(&error))?
                && kernels::is_root(&fs)
            {
                return Ok(volume.number);
            }
        }
        Ok(None)
    }

    fn read(&self, disk: Window) -> Result<BootFiles> {
        let volumes = self.volumes(&disk)?;
        let mut systems = Vec::new();
        let mut others = Vec::new();
        let mut first_error = None;
        for volume in &volumes {
            let contents = Contents::of(&volume.window);
            match contents.map_err(|error| self.unreadable(&error))? {
                Contents::Ext4(fs) => systems.push((volume, fs)),
                Contents::Unusable(error) => {
                    first_error.get_or_insert_with(|| self.damaged(volume, &error));
                }
                Contents::Other(name) => others.push((volume, name)),
                Contents::Unknown => {}
            }
        }
        // One that the table calls the root comes first.
        systems.sort_by_key(|(volume, _)| !volume.root);
        for (volume, fs) in &systems {
            match kernels::find(fs) {
                Ok(None) => {}
                Ok(Some(kernel)) => {
                    let root_partition = self.root_partition(&volumes, &systems)?;
                    return self.take(volume, fs, &kernel, root_partition);
                }
                Err((path, error)) => {
                    first_error.get_or_insert_with(|| self.wrong_at(volume, &path, &error));
                }
            }
        }
        Err(first_error.unwrap_or_else(|| self.nothing(&volumes, &systems, &others)))
    }

    /// The partition that `root = true` means; `None` if it is the whole disk.
    fn root_partition(
        &self,
        volumes: &[Volume],
        systems: &[(&Volume, Ext4)],
    ) -> Result<Option<u32>> {
        let told = volumes.iter().find(|volume| volume.root);
        let seen = || systems.iter().find(|(_, fs)| kernels::is_root(fs));
        let root = told.or_else(|| seen().map(|(volume, _)| *volume));
        match root.or(volumes.first().filter(|volume| volume.number.is_none())) {
            Some(volume) => Ok(volume.number),
            None if !self.root => Ok(None),
            None => {
                let message = format!(
                    "`root` is true, but no partition of {} can be told to be the root",
                    self.shown
                );
                Err(Error::usage(message)
                    .help("remove `root`, and name the partition: `cmdline = \"root=/dev/vdaN\"`"))
            }
        }
    }

    /// Copies kernel and initrd into memory.
    fn take(
        &self,
        volume: &Volume,
        fs: &Ext4,
        kernel: &Kernel,
        root_partition: Option<u32>,
    ) -> Result<BootFiles> {
        let file = |part, path: &str| {
            let shown = format!("{path} of {}", self.name(volume));
            let file = self.copy(part, volume, fs, path)?;
            Ok::<_, Error>(BootFile::from_disk(part, shown, file))
        };
        let initrd = kernel.initrd.as_deref();
        let files = BootFiles {
            kernel: file(Part::Kernel, &kernel.path)?,
            initrd: initrd.map(|path| file(Part::Initrd, path)).transpose()?,
            root_partition,
        };
        tracing::info!(
            kernel = kernel.path,
            initrd = kernel.initrd.as_deref().unwrap_or("none"),
            "from {}",
            self.name(volume)
        );
        Ok(files)
    }

    fn copy(&self, part: Part, volume: &Volume, fs: &Ext4, path: &str) -> Result<File> {
        const MIB: u64 = 1 << 20;
        let most = match part {
            Part::Kernel => 256 * MIB,
            Part::Initrd => 1024 * MIB,
        };
        let wrong = |error| self.wrong_at(volume, path, &error);
        let mut from = fs.open(path).map_err(wrong)?;
        let size = from.metadata().len();
        if size > most {
            let (what, place) = (part.name(), self.name(volume));
            let message = format!(
                "the {what} {path} of {place} is {} MiB, expected at most {} MiB",
                size / MIB,
                most / MIB
            );
            return Err(Error::usage(message));
        }
        let no_memory = |error| Error::failed(format!("no memory for {path}: {error}"));
        let mut to = Scratch::new(part.name()).map_err(no_memory)?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let mut filled = 0;
            while filled < buffer.len() {
                match from.read_bytes(&mut buffer[filled..]).map_err(wrong)? {
                    0 => break,
                    len => filled += len,
                }
            }
            if filled == 0 {
                return Ok(to.into_file());
            }
            to.append(&buffer[..filled]).map_err(no_memory)?;
        }
    }

    /// A volume, as messages have it.
    fn name(&self, volume: &Volume) -> String {
        match volume.number {
            Some(number) => format!("partition {number} of {}", self.shown),
            None => self.shown.clone(),
        }
    }

    fn unreadable(&self, error: &dyn std::fmt::Display) -> Error {
        Error::failed(format!("cannot read {}: {error}", self.shown))
    }

    fn damaged(&self, volume: &Volume, error: &Ext4Error) -> Error {
        let place = self.name(volume);
        match error {
            error if is_host(error) => self.unreadable(error),
            Ext4Error::Incompatible(what) => Error::usage(format!(
                "the ext4 file system of {place} has features that launcher cannot read: {what}"
            ))
            .help("name files of the host with `kernel` and `initrd`"),
            Ext4Error::Io(error) => Error::usage(format!(
                "the ext4 file system of {place} is damaged: {error}"
            ))
            .help(REPAIR),
            error => Error::usage(format!(
                "the ext4 file system of {place} is damaged: {error}"
            ))
            .help(REPAIR),
        }
    }

    fn wrong_at(&self, volume: &Volume, path: &str, error: &Ext4Error) -> Error {
        if is_host(error) {
            return self.unreadable(error);
        }
        let place = self.name(volume);
        Error::usage(format!("cannot read {path} of {place}: {error}")).help(REPAIR)
    }

    /// There is no kernel: what there is, and what to do.
    fn nothing(
        &self,
        volumes: &[Volume],
        systems: &[(&Volume, Ext4)],
        others: &[(&Volume, &str)],
    ) -> Error {
        let shown = &self.shown;
        if !systems.is_empty() {
            let message = format!(
                "{shown} has no kernel: neither /vmlinuz nor /boot/vmlinuz-* is in its file system"
            );
            return Error::usage(message).help(
                "install a kernel in it (Debian: `apt install linux-image-amd64`), or name one of \
                 the host with `kernel`",
            );
        }
        let found: Vec<_> = others
            .iter()
            .map(|(volume, name)| match volume.number {
                Some(number) => format!("partition {number} is {name}"),
                None => format!("it is {name}"),
            })
            .collect();
        let found = match (found.is_empty(), volumes) {
            (false, _) => found.join(", "),
            (true, [Volume { number: None, .. }]) => "it is none that launcher knows".to_owned(),
            (true, []) => "it has no partition".to_owned(),
            (true, _) => "its partitions are none that launcher knows".to_owned(),
        };
        Error::usage(format!(
            "{shown} has no ext4 file system to take a kernel from: {found}"
        ))
        .help(
            "write `kernel` and `initrd` instead of `from_block`: copies of those in the guest's \
             /boot",
        )
    }
}

/// Whether the host could not read the disk, rather than the disk being wrong.
fn is_host(error: &Ext4Error) -> bool {
    let error = error.as_io().and_then(|error| error.downcast_ref());
    error.is_some_and(|error: &std::io::Error| error.raw_os_error().is_some())
}
