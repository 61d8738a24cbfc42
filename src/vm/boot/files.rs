//! The files that are booted: kernel and initrd, opened.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::config::{Boot, HostFile};
use crate::{Error, Result};
use crate::{digest, initramfs};

/// What is booted.
pub(crate) struct BootFiles {
    pub(super) kernel: BootFile,
    pub(super) initrd: Option<BootFile>,
    /// Number of the partition with the root file system, on the disk that they were read from.
    pub(crate) root_partition: Option<u32>,
}

impl BootFiles {
    /// Opens the files that the configuration names.
    pub(crate) fn named(boot: &Boot) -> Result<BootFiles> {
        let kernel = boot.kernel.as_ref().ok_or_else(|| {
            Error::usage("there is no kernel to boot").help("write `kernel` in `[boot]`")
        })?;
        let initrd = boot.initrd.as_ref().map(|file| &*file.path);
        BootFiles::open(&kernel.path, initrd)
    }

    /// As [`BootFiles::named`], of what the configuration says is in them: at a reboot of the
    /// guest they may be others than those that were compared before its start.
    pub(crate) fn verified(boot: &Boot) -> Result<BootFiles> {
        let mut files = BootFiles::named(boot)?;
        let named = [boot.kernel.as_ref(), boot.initrd.as_ref()];
        let opened = [Some(&mut files.kernel), files.initrd.as_mut()];
        for (named, opened) in named.into_iter().zip(opened) {
            if let (Some(named), Some(opened)) = (named, opened) {
                opened.verify(named)?;
            }
        }
        Ok(files)
    }

    /// Opens files of the host.
    pub(crate) fn open(kernel: &Path, initrd: Option<&Path>) -> Result<BootFiles> {
        Ok(BootFiles {
            kernel: BootFile::open(Part::Kernel, kernel)?,
            initrd: initrd
                .map(|path| BootFile::open(Part::Initrd, path))
                .transpose()?,
            root_partition: None,
        })
    }
}

/// Which of the two it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Kernel,
    Initrd,
}

impl Part {
    /// As messages call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Part::Kernel => "kernel",
            Part::Initrd => "initrd",
        }
    }

    fn key(self) -> &'static str {
        match self {
            Part::Kernel => "boot.kernel",
            Part::Initrd => "boot.initrd",
        }
    }
}

/// An open kernel or initrd, and what messages call it.
pub(super) struct BootFile {
    pub(super) file: File,
    part: Part,
    shown: String,
    /// The key of the VM's file that an error is about.
    key: &'static str,
}

impl BootFile {
    /// Opens a regular file of the host; an initrd may be a folder, which is packed.
    pub(super) fn open(part: Part, path: &Path) -> Result<BootFile> {
        let (what, shown) = (part.name(), path.display());
        let failed = |error: io::Error| {
            Error::unopenable(&format!("the {what} {shown}"), &error)
                .help("paths in a VM's file are relative to that file")
                .about(part.key())
        };
        let refused = |kind, expected| {
            let message = format!("the {what} {shown} is {kind}, expected {expected}");
            Error::usage(message).about(part.key())
        };
        // A FIFO without a writer would block the opening: it is opened without waiting and
        // refused.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty())
            .map(File::from)
            .map_err(|error| failed(error.into()))?;
        let metadata = file.metadata().map_err(failed)?;
        let file = match part {
            _ if metadata.is_file() => file,
            Part::Initrd if metadata.is_dir() => initramfs::pack(path)?,
            Part::Initrd => return Err(refused("a special file", "a regular file or a folder")),
            Part::Kernel if metadata.is_dir() => {
                return Err(refused("a directory", "a regular file"));
            }
            Part::Kernel => return Err(refused("a special file", "a regular file")),
        };
        Ok(BootFile {
            file,
            part,
            shown: shown.to_string(),
            key: part.key(),
        })
    }

    /// Compares it with the digest that it is to have.
    fn verify(&mut self, named: &HostFile) -> Result<()> {
        let Some(expected) = named.sha256 else {
            return Ok(());
        };
        let found = digest::of_open(&mut self.file, &named.path);
        let found = found.map_err(|error| error.about(self.key))?;
        match found == expected {
            true => Ok(()),
            false => Err(self.bad(&format!("has the SHA-256 {found} now, expected {expected}"))),
        }
    }

    /// A file that was read from a disk of the VM, as `shown`.
    pub(super) fn from_disk(part: Part, shown: String, file: File) -> BootFile {
        BootFile {
            file,
            part,
            shown,
            key: "boot.from_block",
        }
    }

    /// Size in bytes.
    pub(super) fn size(&self) -> Result<u64> {
        let metadata = self.file.metadata();
        metadata
            .map(|metadata| metadata.len())
            .map_err(|error| self.failed(&error))
    }

    /// Size in bytes of a file that has something in it.
    pub(super) fn filled(&self) -> Result<u64> {
        match self.size()? {
            0 => Err(self.bad("is empty")),
            size => Ok(size),
        }
    }

    /// An error about this file: `what` completes "the kernel PATH …".
    pub(super) fn bad(&self, what: &str) -> Error {
        let BootFile {
            part, shown, key, ..
        } = self;
        Error::usage(format!("the {} {shown} {what}", part.name())).about(*key)
    }

    /// The host could not read it.
    pub(super) fn failed(&self, error: &dyn std::fmt::Display) -> Error {
        let BootFile {
            part, shown, key, ..
        } = self;
        Error::failed(format!("cannot read the {} {shown}: {error}", part.name())).about(*key)
    }
}
