//! Which files of a folder are images, and what a VM's file must say of each.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use formats::qcow2::Header;
use formats::qcow2::header::MAX_HEADER;
use rustix::fs::{Access, access};

use super::kernel::is_kernel_or_initrd;
use super::{Disk, inside};
use crate::cli::disk;
use crate::{Error, Result};

/// The images of a folder: what has the extension of a format, and is no backing file of another.
pub(super) fn all(dir: &Path, names: &[String], format: Option<&str>) -> Result<Vec<Disk>> {
    let image = |name: &&String| {
        let extension = Path::new(name).extension().and_then(|it| it.to_str());
        !is_kernel_or_initrd(name)
            && extension.is_some_and(|it| formats::for_extension(it).is_some())
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

/// The images with these paths.
pub(super) fn each(paths: &[PathBuf], format: Option<&str>) -> Result<Vec<Disk>> {
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
