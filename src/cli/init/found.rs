//! What a folder has that a VM can be made of.

mod images;
mod kernel;

use std::fs;
use std::path::{Path, PathBuf};

use formats::Image;
use rustix::fs::{Access, access};

use self::kernel::{initrd_of, kernel_of};
use crate::cli::{disk, up};
use crate::error::text;
use crate::{Error, Result, vm};

/// What the command line names.
#[derive(Default)]
pub(super) struct Named {
    pub(super) kernel: Option<PathBuf>,
    pub(super) initrd: Option<PathBuf>,
    pub(super) disks: Vec<PathBuf>,
    pub(super) format: Option<String>,
}

/// Where the kernel is.
#[derive(Debug)]
pub(super) enum Kernel {
    /// A file.
    File(PathBuf),
    /// The file that this host runs.
    Hosts(PathBuf),
    /// The file system of this disk, by its index.
    Disk(usize),
}

/// What the VM is made of.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) kernel: Kernel,
    pub(super) initrd: Option<PathBuf>,
    pub(super) disks: Vec<Disk>,
    /// What looks like a kernel, and why it was not taken.
    pub(super) passed_over: Vec<(PathBuf, String)>,
}

/// A disk of the VM.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) format: &'static str,
    /// Whether the extension does not stand for the format.
    pub(super) format_named: bool,
    /// Whether this user may not write it.
    pub(super) ro: bool,
    /// Its backing files, as far as they lie in the same folder.
    pub(super) backing: Vec<PathBuf>,
}

/// The kernel that this host runs, and the initrds that may belong to it.
pub(super) struct Running {
    pub(super) kernel: PathBuf,
    pub(super) initrds: Vec<PathBuf>,
}

/// Where distributions put the kernel that runs.
pub(super) fn running_kernel() -> Running {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    Running {
        kernel: format!("/boot/vmlinuz-{release}").into(),
        initrds: vec![
            format!("/boot/initrd.img-{release}").into(),
            format!("/boot/initramfs-{release}.img").into(),
        ],
    }
}

/// Finds what is not named in a folder.
///
/// # Errors
///
/// What is named cannot be used; the folder cannot be read, or has nothing that boots.
pub(super) fn find(dir: &Path, named: Named, running: &Running) -> Result<Found> {
    let names = names(dir)?;
    let format = named.format.as_deref();
    let disks = match named.disks.is_empty() {
        false => images::each(&named.disks, format)?,
        true => images::all(dir, &names, format)?,
    };
    let mut passed_over = Vec::new();
    let kernel = match named.kernel {
        Some(kernel) => {
            bootable(&kernel)?;
            Kernel::File(kernel)
        }
        None => match kernel_of(dir, &names, &mut passed_over) {
            Some(kernel) => Kernel::File(kernel),
            None => elsewhere(&disks, named.initrd.is_some(), running)
                .map_err(|why| no_kernel(dir, &passed_over, &disks, why))?,
        },
    };
    let readable = |path: &&PathBuf| access(*path, Access::READ_OK).is_ok();
    let initrd = match (named.initrd, &kernel) {
        (Some(initrd), _) => Some(initrd),
        (None, Kernel::Disk(_)) => None,
        (None, Kernel::Hosts(_)) => running.initrds.iter().find(readable).cloned(),
        (None, Kernel::File(kernel)) => initrd_of(dir, &names, kernel),
    };
    if disks.is_empty() && initrd.is_none() {
        let message = format!("{} has a kernel, but no disk image or initrd", folder(dir));
        return Err(Error::usage(message).help(
            "put an image there (`*.qcow2`, `*.img`, `*.raw`) or an `initrd.img`, or name one with \
             `--disk IMAGE` or `--initrd FILE`",
        ));
    }
    Ok(Found {
        kernel,
        initrd,
        disks,
        passed_over,
    })
}

/// As much memory as any kernel takes.
const MEMORY: u64 = 2 << 30;

fn bootable(kernel: &Path) -> Result<()> {
    vm::check_kernel(kernel, None, MEMORY)
}

/// The kernel for a folder that has none: that of a disk, or else that of this host. The error is
/// why the first disk has none.
fn elsewhere(
    disks: &[Disk],
    with_initrd: bool,
    running: &Running,
) -> Result<Kernel, Option<Error>> {
    let mut first = None;
    for (index, disk) in disks.iter().enumerate().filter(|_| !with_initrd) {
        match disk.boots(MEMORY) {
            Ok(()) => return Ok(Kernel::Disk(index)),
            Err(error) => first = first.or(Some(error)),
        }
    }
    match !disks.is_empty() && bootable(&running.kernel).is_ok() {
        true => Ok(Kernel::Hosts(running.kernel.clone())),
        false => Err(first),
    }
}

impl Disk {
    /// Whether kernel and initrd of its file system boot in this much memory.
    pub(super) fn boots(&self, memory: u64) -> Result<()> {
        let format = disk::format_of(&self.path, Some(self.format), None)?;
        vm::check_disk(&self.image(), format, memory, up::engine()?)
    }

    /// The kernel parameter for a root file system in a partition of it, as disk `index`. One that
    /// cannot be read has none: `launcher check` says why.
    pub(super) fn root_parameter(&self, index: usize) -> Option<String> {
        let format = disk::format_of(&self.path, Some(self.format), None).ok()?;
        let engine = up::engine().ok()?;
        vm::root_parameter(&self.image(), format, index, engine).ok()?
    }

    fn image(&self) -> Image {
        Image {
            backing: self.backing.clone(),
            format_written: self.format_named,
            ..Image::new(&self.path)
        }
    }
}

fn no_kernel(
    dir: &Path,
    passed_over: &[(PathBuf, String)],
    disks: &[Disk],
    why: Option<Error>,
) -> Error {
    let dir = folder(dir);
    let message = match (passed_over, disks, why) {
        ([(path, why), ..], ..) => {
            format!("{dir} has no kernel that boots: {} {why}", path.display())
        }
        ([], [], _) => format!("{dir} has neither a kernel nor a disk image"),
        ([], _, Some(why)) => format!("{dir} has no kernel: {}", why.message()),
        ([], _, None) => format!("{dir} has no kernel, and this host's cannot be read"),
    };
    Error::usage(message).help(
        "put a `vmlinuz` there (a distribution's /boot/vmlinuz-…, a bzImage or vmlinux of your \
         own) and an image or an `initrd.img`, or name them with `--kernel FILE`, `--disk IMAGE` \
         and `--initrd FILE`",
    )
}

/// The names of the files in a folder, those that are UTF-8, sorted.
fn names(dir: &Path) -> Result<Vec<String>> {
    let unreadable = |error: std::io::Error| {
        let text = text(&error);
        Error::usage(format!("cannot read the folder {}: {text}", dir.display()))
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name().into_string();
        names.extend(name.ok().filter(|_| entry.path().is_file()));
    }
    names.sort();
    Ok(names)
}

/// What to call a folder.
fn folder(dir: &Path) -> String {
    match dir == Path::new(".") {
        true => "this folder".to_owned(),
        false => dir.display().to_string(),
    }
}

/// The path of a file in a folder, as a user writes it.
pub(super) fn inside(dir: &Path, name: &str) -> PathBuf {
    match dir == Path::new(".") {
        true => PathBuf::from(name),
        false => dir.join(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_of_this_host_is_for_a_folder_with_images_and_no_kernel() {
        let host = tempfile::tempdir().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let running = Running {
            kernel: host.path().join("vmlinuz-1"),
            initrds: vec![
                host.path().join("none"),
                host.path().join("initramfs-1.img"),
            ],
        };
        let found = || find(folder.path(), Named::default(), &running);
        let error = found().unwrap_err().to_string();
        assert!(
            error.contains("has neither a kernel nor a disk image"),
            "{error}"
        );
        fs::write(folder.path().join("a.img"), [0; 512]).unwrap();
        let error = found().unwrap_err().to_string();
        assert!(error.contains("has no kernel: "), "{error}");
        fs::write(&running.kernel, vm::bare_kernel()).unwrap();
        fs::write(&running.initrds[1], "x").unwrap();
        let found = found().unwrap();
        assert!(matches!(found.kernel, Kernel::Hosts(kernel) if kernel == running.kernel));
        assert_eq!(found.initrd.as_ref(), Some(&running.initrds[1]));
    }
}
