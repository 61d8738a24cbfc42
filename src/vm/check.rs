//! What `launcher up` would refuse of the host's files, found without starting anything: nothing
//! is created, written, fetched or executed.

use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use formats::{Engine, Format, HostFile, Image, OpenError, Ring};
use rustix::fs::{Access, access};
use rustix::io::Errno;

use super::boot::{self, BootFiles};
use super::console::log_file;
use super::devices::{at_disk, open_served};
use super::trial;
use crate::config::{self, Block, Vm, size};
use crate::devices::virtio::blk::Blk;
use crate::error::text;
use crate::{Error, Result};

/// All that is wrong with the host's files of a VM, each error at its place in the VM's file.
///
/// `runs` says that the VM runs: then it holds the locks of its disks, and what it writes is not
/// read.
///
/// # Errors
///
/// The host does not let anything be looked at.
pub fn check(config: &Vm, engine: Engine, runs: bool) -> Result<Vec<Error>> {
    let mut problems = boot(config, engine, runs)?;
    let ring =
        Ring::new(engine).map_err(|error| Error::failed(format!("cannot set up I/O: {error}")))?;
    for (index, block) in config.block.iter().enumerate() {
        let checked = match block.is_served() {
            // While the VM runs, it has the server, which has one front end at a time.
            true if runs => Ok(()),
            true => open_served(block).map(drop),
            false => ring.block_on(disk(&ring, block, runs), || {}),
        };
        if let Err(error) = checked {
            problems.push(at_disk(index, block, error));
        }
    }
    problems.extend(log(config).err());
    Ok(problems
        .into_iter()
        .map(|error| error.at(&config.places))
        .collect())
}

/// Whether `launcher up` would fetch or build the file first.
fn comes_later(file: &config::HostFile) -> bool {
    !file.path.exists() && file.has_source()
}

/// Loads the kernel and the initrd as for a start, into memory that no guest sees.
fn boot(config: &Vm, engine: Engine, runs: bool) -> Result<Vec<Error>> {
    let files = config.boot.kernel.iter().chain(&config.boot.initrd);
    if files.into_iter().any(comes_later) {
        return Ok(Vec::new());
    }
    let disk = config.boot_disk().and_then(|index| config.block.get(index));
    let files = match disk.map(|block| on_disk(block, engine, runs)) {
        // What is wrong with the disk itself is found where all of them are looked at.
        Some(None) => return Ok(Vec::new()),
        Some(Some(files)) => files,
        None => BootFiles::named(&config.boot),
    };
    let files = match files {
        Ok(files) => files,
        Err(error) => return Ok(with_initrd(config, error)),
    };
    let cmdline = boot::cmdline(config, files.root_partition);
    Ok(match trial::loads(&files, config.memory, &cmdline) {
        Ok(()) => Vec::new(),
        Err(error) => with_initrd(config, error),
    })
}

/// An error, and what is wrong with the initrd: a kernel that is wrong hides one that is not there.
fn with_initrd(config: &Vm, error: Error) -> Vec<Error> {
    let initrd = config.boot.initrd.as_ref();
    let initrd = initrd.filter(|_| error.key().unwrap_or_default() != "boot.initrd");
    let also = initrd.and_then(|file| boot::check_initrd(&file.path).err());
    std::iter::once(error).chain(also).collect()
}

/// Kernel and initrd of a disk; `None` where it cannot be opened now, or what is on it is not what
/// will be booted.
fn on_disk(block: &Block, engine: Engine, runs: bool) -> Option<Result<BootFiles>> {
    if runs && !block.ro && !block.ephemeral {
        return None;
    }
    let format = formats::find(&block.format)?;
    let options = trial::read_only(block.image(), format, engine);
    let disk = Blk::open(options).ok()?;
    Some(boot::image::read(&disk.handle(), block))
}

/// Opens a disk's image as `up` does, but only to read it.
async fn disk(ring: &Ring, block: &Block, runs: bool) -> Result<(), OpenError> {
    let Some(format) = formats::find(&block.format) else {
        return Ok(());
    };
    let image = block.image();
    let mut files = std::iter::once(block.file()).chain(block.backing.iter().cloned());
    if files.any(|file| comes_later(&file)) {
        return Ok(());
    }
    let reads_only = block.ro || block.ephemeral;
    if !reads_only && is_created(&image, format) {
        return creatable(ring, &image, format);
    }
    // Who may use it, and who does.
    let used = Image {
        ro: reads_only,
        lock: image.lock && !runs,
        ..image.clone()
    };
    drop(HostFile::open(ring, &used)?);
    if runs && !reads_only {
        return Ok(());
    }
    let seen = Image {
        ro: true,
        lock: false,
        size: None,
        // What it grows to has whole blocks, whatever it has now.
        block_size: if image.size.is_some() {
            1
        } else {
            image.block_size
        },
        o_direct: image.o_direct && image.size.is_none(),
        ..image.clone()
    };
    let disk = (format.open)(ring, &seen).await?;
    let has = disk.size();
    let closed = disk.close().await;
    drop(closed);
    fits(block, format, has)
}

/// Whether opening the image creates it.
fn is_created(image: &Image, format: &Format) -> bool {
    let missing =
        fs::metadata(&image.path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    let overlay = !image.backing.is_empty() && format.abilities.contains(&"backing");
    missing && (image.size.is_some() || overlay)
}

/// Whether the image can be created, as far as that can be told without doing so.
fn creatable(ring: &Ring, image: &Image, format: &Format) -> Result<(), OpenError> {
    if let Err(error) = writable_folder(&image.path) {
        return Err(OpenError {
            message: format!("cannot create `{}`: {}", image.path.display(), text(&error)),
            help: match error.kind() {
                io::ErrorKind::NotFound => Some("create its directory first".into()),
                _ => None,
            },
            key: "path",
        });
    }
    for path in &image.backing {
        let backing = Image {
            ro: true,
            lock: false,
            ..Image::new(path)
        };
        HostFile::open(ring, &backing).map_err(|error| OpenError {
            key: "backing",
            ..error
        })?;
    }
    if format.name == "qcow2" {
        formats::qcow2::CreateOptions::from_image(image)?.check()?;
    }
    Ok(())
}

/// Whether `size` is what the image can become.
fn fits(block: &Block, format: &Format, has: u64) -> Result<(), OpenError> {
    let Some(wanted) = block.size else {
        return Ok(());
    };
    let raw = [true, false].map(formats::raw_for).contains(&format.name);
    let device = fs::metadata(&block.path).is_ok_and(|meta| !meta.is_file());
    let (why, help) = if wanted < has {
        (
            "",
            "leave `size` out to use all of it; an image is never shrunk by opening it",
        )
    } else if wanted > has && block.ro {
        (
            ", and a read-only image does not grow",
            "leave `size` out, or set `ro = false`",
        )
    } else if wanted > has && device && raw && !block.ephemeral {
        (
            ", and a block device does not grow",
            "leave `size` out to use all of it",
        )
    } else {
        return Ok(());
    };
    let path = block.path.display();
    let (wanted, has) = (size::show(wanted), size::show(has));
    Err(OpenError {
        message: format!("`size` is {wanted}, but `{path}` has {has}{why}"),
        help: Some(help.into()),
        key: "size",
    })
}

/// Whether the console's log can be appended to.
fn log(config: &Vm) -> Result<()> {
    let Some(path) = &config.console.log else {
        return Ok(());
    };
    let opened = match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Err(Errno::ISDIR.into()),
        Ok(meta) => {
            if let Some(other) = log_file::same_file(&meta, config) {
                return Err(log_file::is_same(other));
            }
            access(path, Access::WRITE_OK).map_err(io::Error::from)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => writable_folder(path),
        Err(error) => Err(error),
    };
    opened.map_err(|error| log_file::unopenable(path, &error))
}

/// Whether a file may be created at this path.
fn writable_folder(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    let meta: Metadata = fs::metadata(&folder)?;
    if !meta.is_dir() {
        return Err(Errno::NOTDIR.into());
    }
    Ok(access(&folder, Access::WRITE_OK | Access::EXEC_OK)?)
}
