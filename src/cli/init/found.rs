//! What a folder has that a VM can be made of.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use formats::Image;
use formats::qcow2::Header;
use formats::qcow2::header::MAX_HEADER;
use rustix::fs::{Access, access};

use crate::cli::{disk, up};
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

const KERNELS: [&str; 3] = ["vmlinuz", "vmlinux", "bzImage"];
const INITRDS: [&str; 2] = ["initrd", "initramfs"];

/// Finds what is not named in a folder.
///
/// # Errors
///
/// What is named cannot be used; the folder cannot be read, or has nothing that boots.
pub(super) fn find(dir: &Path, named: Named, running: &Running) -> Result<Found> {
    let names = names(dir)?;
    let format = named.format.as_deref();
    let disks = match named.disks.is_empty() {
        false => each(&named.disks, format)?,
        true => images(dir, &names, format)?,
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
        let text = error.to_string();
        let (text, _) = text.split_once(" (os error").unwrap_or((&text, ""));
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

fn starts_with(name: &str, any: &[&str]) -> bool {
    any.iter().any(|start| name.starts_with(start))
}

/// The path of a file in a folder, as a user writes it.
pub(super) fn inside(dir: &Path, name: &str) -> PathBuf {
    match dir == Path::new(".") {
        true => PathBuf::from(name),
        false => dir.join(name),
    }
}

/// The kernel of a folder: the one without a version, or else the latest.
fn kernel_of(
    dir: &Path,
    names: &[String],
    passed_over: &mut Vec<(PathBuf, String)>,
) -> Option<PathBuf> {
    let mut kernels: Vec<_> = names
        .iter()
        .filter(|name| starts_with(name, &KERNELS))
        .collect();
    kernels.sort_by_key(|name| {
        let rank = KERNELS.iter().position(|kernel| kernel == name);
        (rank.unwrap_or(KERNELS.len()), Reverse(natural(name)))
    });
    for name in kernels {
        let path = inside(dir, name);
        match bootable(&path) {
            Ok(()) => return Some(path),
            Err(error) => {
                let message = error.message();
                let shown = format!("the kernel {} ", path.display());
                let why = message.strip_prefix(&shown).unwrap_or(message).to_owned();
                passed_over.push((path, why));
            }
        }
    }
    None
}

/// The initrd that belongs to a kernel: that of its version, or else one without.
fn initrd_of(dir: &Path, names: &[String], kernel: &Path) -> Option<PathBuf> {
    let kernel = kernel.file_name().unwrap_or_default().to_string_lossy();
    let version = KERNELS
        .iter()
        .find_map(|start| kernel.strip_prefix(start))
        .unwrap_or_default();
    let mut initrds: Vec<_> = names
        .iter()
        .filter(|name| starts_with(name, &INITRDS))
        .collect();
    initrds.sort_by_key(|name| Reverse(natural(name)));
    let of_version = |name: &&&String| !version.is_empty() && name.contains(version);
    let without = |name: &&&String| !name.contains(|c: char| c.is_ascii_digit());
    let found = initrds
        .iter()
        .find(of_version)
        .or_else(|| initrds.iter().find(without))
        .or_else(|| initrds.first().filter(|_| version.is_empty()));
    found.map(|name| inside(dir, name))
}

/// A name with its numbers as numbers: 6.10 is after 6.9.
fn natural(name: &str) -> Vec<(u64, &[u8])> {
    let digits = |a: &u8, b: &u8| a.is_ascii_digit() == b.is_ascii_digit();
    let parts = name.as_bytes().chunk_by(digits);
    let number = |part: &[u8]| std::str::from_utf8(part).ok()?.parse().ok();
    parts
        .map(|part| (number(part).unwrap_or(0), part))
        .collect()
}

/// The images of a folder: what has the extension of a format, and is no backing file of another.
fn images(dir: &Path, names: &[String], format: Option<&str>) -> Result<Vec<Disk>> {
    let image = |name: &&String| {
        let extension = Path::new(name).extension().and_then(|it| it.to_str());
        let others = starts_with(name, &KERNELS) || starts_with(name, &INITRDS);
        !others && extension.is_some_and(|it| formats::for_extension(it).is_some())
    };
    let mut images: Vec<_> = names.iter().filter(image).collect();
    // A root disk, if one is called so, is the first.
    images.sort_by_key(|name| !name.starts_with("root"));
    let paths: Vec<_> = images.iter().map(|name| inside(dir, name)).collect();
    let mut disks = each(&paths, format)?;
    let below: Vec<_> = disks.iter().flat_map(|disk| disk.backing.clone()).collect();
    disks.retain(|disk| !below.iter().any(|path| same(path, &disk.path)));
    Ok(disks)
}

fn same(one: &Path, other: &Path) -> bool {
    one == other || matches!((one.canonicalize(), other.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn each(paths: &[PathBuf], format: Option<&str>) -> Result<Vec<Disk>> {
    paths.iter().map(|path| disk(path, format)).collect()
}

fn disk(path: &Path, named: Option<&str>) -> Result<Disk> {
    let unopenable =
        |error: std::io::Error| Error::unopenable(&format!("the image {}", path.display()), &error);
    let meta = fs::metadata(path).map_err(unopenable)?;
    if meta.is_dir() {
        let message = format!("the image {} is a directory", path.display());
        return Err(Error::usage(message));
    }
    // Opening a FIFO would wait for whoever writes to it.
    if !meta.is_file() && !meta.file_type().is_block_device() {
        let shown = path.display();
        let message =
            format!("the image {shown} is a special file, expected a file or a block device");
        return Err(Error::usage(message));
    }
    let format = disk::format_of(path, named, Some("format"))?;
    let raw = disk::raw_name(format.name);
    if raw && named.is_none() && meta.is_file() {
        not_another_format(path)?;
    }
    let format_name = match raw {
        true => formats::raw_for(false),
        false => format.name,
    };
    let extension = path.extension().and_then(|it| it.to_str());
    let stands_for = extension.and_then(formats::for_extension);
    Ok(Disk {
        path: path.to_owned(),
        format: format_name,
        format_named: stands_for.is_none_or(|it| it.name != format_name),
        ro: access(path, Access::WRITE_OK).is_err(),
        backing: backing(path, format.name),
    })
}

/// A raw image that begins like another is not taken for either: a guest can write such bytes.
fn not_another_format(path: &Path) -> Result<()> {
    let found = File::open(path).and_then(|file| formats::sniff(&file));
    let other = found.ok().flatten().filter(|other| *other != "luks");
    let Some(other) = other else {
        return Ok(());
    };
    let path = path.display();
    let message = format!("`{path}` begins like a {other} image, but its name makes it a raw one");
    let help = match formats::find(other) {
        Some(_) => format!(
            "say which it is: `--disk {path} --format {other}`, or `--format raw` if these bytes \
             are the disk's own"
        ),
        None => format!("convert it: `qemu-img convert -O qcow2 {path} disk.qcow2`"),
    };
    Err(Error::usage(message).help(help))
}

/// The chain of backing files of an image, as far as they lie in its own folder: a name that
/// leads elsewhere is for the user to approve.
fn backing(path: &Path, format: &str) -> Vec<PathBuf> {
    const LONGEST: usize = 64;
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    let mut chain: Vec<PathBuf> = Vec::new();
    let mut format = format.to_owned();
    while format.starts_with("qcow2") && chain.len() < LONGEST {
        let image = chain.last().map_or(path, |last| last);
        let Some(header) = header(image) else { break };
        let name = header.backing_file.as_deref().map(PathBuf::from);
        let is_file = |name: &PathBuf| name.components().count() == 1 && !name.has_root();
        let Some(name) = name.filter(is_file) else {
            break;
        };
        let next = folder.join(&name);
        if !next.is_file() || chain.contains(&next) || next == path {
            break;
        }
        let extension = next.extension().and_then(|it| it.to_str());
        let by_name = extension.and_then(formats::for_extension);
        format = header
            .backing_format
            .or(by_name.map(|format| format.name.to_owned()))
            .unwrap_or_default();
        chain.push(next);
    }
    chain
}

fn header(image: &Path) -> Option<Header> {
    let mut bytes = Vec::new();
    let file = File::open(image).ok()?;
    file.take(MAX_HEADER as u64).read_to_end(&mut bytes).ok()?;
    Header::parse(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(names: [&str; 3]) -> Vec<String> {
        let mut names = names.map(str::to_owned).to_vec();
        names.sort_by(|a, b| natural(a).cmp(&natural(b)));
        names
    }

    #[test]
    fn versions_are_ordered_by_their_numbers() {
        assert_eq!(
            order(["vmlinuz-6.10.0", "vmlinuz-6.9.1", "vmlinuz-6.9"]),
            ["vmlinuz-6.9", "vmlinuz-6.9.1", "vmlinuz-6.10.0"]
        );
    }

    fn initrd(names: &[&str], kernel: &str) -> Option<String> {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let found = initrd_of(Path::new("."), &names, Path::new(kernel))?;
        Some(found.to_str().unwrap().to_owned())
    }

    #[test]
    fn an_initrd_is_that_of_the_kernels_version_or_one_without() {
        let both = ["initrd.img-6.1.0-9", "initrd.img-6.1.0-13"];
        let found = |names: &[&str], kernel| initrd(names, kernel).unwrap_or_default();
        assert_eq!(found(&both, "vmlinuz-6.1.0-9"), "initrd.img-6.1.0-9");
        assert_eq!(found(&both, "vmlinuz"), "initrd.img-6.1.0-13");
        assert_eq!(found(&both, "vmlinuz-5.10"), "");
        let plain = ["initramfs-6.1.img", "initrd.img"];
        assert_eq!(found(&plain, "vmlinuz"), "initrd.img");
        assert_eq!(found(&plain, "vmlinuz-6.1"), "initramfs-6.1.img");
        assert_eq!(found(&plain, "vmlinuz-6.2"), "initrd.img");
    }

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
