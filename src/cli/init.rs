//! `launcher init`.

mod found;
mod text;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;

use self::found::{Found, Kernel, Named};
use super::output::{complain, print, table};
use super::up;
use crate::config::{Choice, size};
use crate::{Error, Result, config, durable, exit, vm};

/// Write a vm.toml that boots the kernel and the images of a folder
///
/// The kernel, its initrd and the disk images are those that are named, or else those found in
/// the folder: a kernel is a `vmlinuz*`, `vmlinux*` or `bzImage*` that boots, an initrd an
/// `initrd*` or `initramfs*`, an image has the extension of a format. Without a kernel, that of a
/// disk's own file system is booted, or else the one that this host runs, if it may be read. Each
/// line of the file is explained, and what is left at its default is there in a comment.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher init\n  launcher init web --disk root.qcow2 --memory 2GiB\n  launcher init --kernel arch/x86/boot/bzImage --initrd rootfs.cpio.gz"
)]
pub(super) struct Init {
    /// The folder [default: the current one]
    dir: Option<PathBuf>,
    /// The kernel
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// An image; may be given again
    #[arg(long, value_name = "IMAGE")]
    disk: Vec<PathBuf>,
    /// Format of the images [default: the one that each one's extension stands for]
    #[arg(long)]
    format: Option<String>,
    /// Size of guest memory, such as 2GiB
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,
    /// Number of vCPUs
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=254))]
    cpus: Option<u32>,
    /// Replace a vm.toml that is there
    #[arg(long)]
    force: bool,
}

impl Init {
    pub(super) fn run(self) -> Result<u8> {
        let dir = self.dir.clone().unwrap_or_else(|| PathBuf::from("."));
        let file = found::inside(&dir, "vm.toml");
        if fs::symlink_metadata(&file).is_ok() && !self.force {
            let message = format!("{} is there already", file.display());
            return Err(Error::usage(message).help("`--force` replaces it"));
        }
        let named = Named {
            kernel: self.kernel,
            initrd: self.initrd,
            disks: self.disk,
            format: self.format,
        };
        let found = found::find(&dir, named, &found::running_kernel())?;
        let settings = text::Settings {
            cpus: self.cpus,
            memory: match self.memory {
                Some(memory) => Some(memory),
                None => enough(&found)?,
            },
        };
        let text = text::text(&dir, &found, &settings)?;
        write(&file, &text, self.force)
            .map_err(|error| Error::failed(format!("cannot write {}: {error}", file.display())))?;
        print(&said(&dir, &file, &found))?;
        let problems = vm::check(
            &config::load(&file, &Choice::default())?,
            up::engine()?,
            false,
        )?;
        for problem in &problems {
            complain(problem);
        }
        match problems.is_empty() {
            true => Ok(exit::DONE),
            false => Ok(exit::USAGE),
        }
    }
}

/// The memory that kernel and initrd need, if the default does not do.
fn enough(found: &Found) -> Result<Option<u64>> {
    let boots = |memory| match &found.kernel {
        Kernel::File(kernel) | Kernel::Hosts(kernel) => {
            vm::check_kernel(kernel, found.initrd.as_deref(), memory)
        }
        Kernel::Disk(index) => found.disks[*index].boots(memory),
    };
    for memory in [None, Some(1 << 30), Some(2 << 30)] {
        if boots(memory.unwrap_or(512 << 20)).is_ok() {
            return Ok(memory);
        }
    }
    boots(4 << 30).map(|()| Some(4 << 30))
}

/// Writes the file whole, or not at all.
fn write(file: &Path, text: &str, force: bool) -> io::Result<()> {
    if force {
        return durable::replace(file, text);
    }
    let mut new = File::options().write(true).create_new(true).open(file)?;
    let written = new.write_all(text.as_bytes());
    if written.is_err() {
        // What is there of it is of no use.
        let _ = fs::remove_file(file);
    }
    written
}

/// What was found, and what to do next.
fn said(dir: &Path, file: &Path, found: &Found) -> String {
    let kernel = match &found.kernel {
        Kernel::File(kernel) => kernel.display().to_string(),
        Kernel::Hosts(kernel) => {
            format!(
                "{} (that of this host: the folder has none)",
                kernel.display()
            )
        }
        Kernel::Disk(index) => {
            let disk = found.disks[*index].path.display();
            format!("that of {disk}, with its initrd")
        }
    };
    let mut rows = vec![["kernel".to_owned(), kernel]];
    if let Some(initrd) = &found.initrd {
        rows.push(["initrd".to_owned(), initrd.display().to_string()]);
    }
    let root = root(found);
    for (index, disk) in found.disks.iter().enumerate() {
        let mut said = format!("{} ({}", disk.path.display(), disk.format);
        if root == Some(index) {
            said += ", root file system";
        }
        if disk.ro {
            said += ", read-only: it may not be written";
        }
        rows.push(["disk".to_owned(), said + ")"]);
    }
    for (path, why) in &found.passed_over {
        rows.push(["not".to_owned(), format!("{} ({why})", path.display())]);
    }
    let next = match dir == Path::new(".") {
        true => "launcher up".to_owned(),
        false => format!("launcher up {}", dir.display()),
    };
    format!(
        "wrote {}\n\n{}\nnext: {next}\n",
        file.display(),
        table(&rows)
    )
}

/// The disk with the root file system: the one that is booted from, or else the first; one that
/// can be written.
fn root(found: &Found) -> Option<usize> {
    let writable = |index: &usize| found.disks.get(*index).is_some_and(|disk| !disk.ro);
    match found.kernel {
        Kernel::Disk(index) => Some(index).filter(writable),
        _ => (0..found.disks.len()).find(writable),
    }
}
