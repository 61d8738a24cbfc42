//! Copying a disk into a new image of any format.
//!
//! Only data is read, by several threads (`scan`); blocks of zeroes are not written. The target
//! is made under another name beside its own (`place`), filled in the disk's order (`target`),
//! made durable, and meanwhile read back and compared by sums of its blocks (`blocks`). Then it
//! gets its name.

mod blocks;
mod durable;
mod place;
mod scan;
mod target;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::host_file::text;
use crate::qcow2::Encoder;
use crate::{Engine, Format, Image, OpenError, OptionValue, Progress, Ring};
use blocks::Sums;
use durable::Durable;
use place::Place;
use scan::{Opener, Scan, Slot, Unit, failure};
use target::Target;

/// A disk's size is a multiple of this.
const SECTOR: u64 = 512;

/// What is to be converted to what.
#[derive(Clone, Copy)]
pub struct Conversion<'a> {
    /// Format of the source.
    pub from: &'static Format,
    /// The source, which is only read; `size` and `ro` mean nothing.
    pub source: &'a Image,
    /// Format of the target.
    pub to: &'static Format,
    /// The target, which is made. Its size is that of the source, in whole sectors, if it has
    /// none. What is the same in its `backing` files is not written.
    pub target: &'a Image,
    /// Format of the target's own backing file, if it has one.
    pub backing: Option<&'static Format>,
    /// Compresses clusters.
    pub compress: bool,
    /// Reads the target back, and compares it with what was read of the source.
    pub verify: bool,
    /// Waits until the target is durable before it gets its name. Without that, a power cut soon
    /// afterwards may leave a part of it under that name.
    pub sync: bool,
    /// Replaces a target that exists.
    pub force: bool,
    /// How the threads do their I/O.
    pub engine: Engine,
}

/// What a conversion is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Copying the disk.
    Converting,
    /// Comparing the target.
    Verifying,
}

/// Is told how far a stage of a conversion has come.
pub type OnProgress<'a> = dyn FnMut(Stage, &Progress<'_>) + 'a;

/// Converts. After an error, or once `stop` is set, nothing of the target is left, and what had
/// its name before is as it was. `progress` is told from time to time how far it is.
///
/// Returns the size of the target's disk in bytes. Only a process that is killed leaves a file,
/// `.NAME.partial` beside the target, which the next conversion to that name removes.
pub fn convert(
    conversion: &Conversion<'_>,
    stop: &AtomicBool,
    progress: &mut OnProgress<'_>,
) -> Result<u64, OpenError> {
    let ring = Ring::new(conversion.engine).map_err(|error| OpenError {
        message: format!("cannot begin to convert: {}", text(&error)),
        help: None,
        key: OpenError::HOST,
    })?;
    check_names(conversion)?;
    let source = read_only(conversion.source, true);
    // Its lock is held to the end; the threads that read it need none of their own.
    let held = ring.block_on((conversion.from.open)(&ring, &source), || {})?;
    let source = Image {
        lock: false,
        ..source
    };
    let size = conversion.target.size.unwrap_or(held.size());
    let size = size.next_multiple_of(SECTOR);
    if size < held.size() {
        return Err(too_small(conversion, size, held.size()));
    }
    let mut place = Place::new(&ring, conversion.target, conversion.force)?;
    let image = Image {
        path: place.partial().into(),
        ro: false,
        size: Some(size),
        o_direct: false,
        lock: true,
        format_written: true,
        ..conversion.target.clone()
    };
    if let Some(data_file) = data_file(&image) {
        if std::fs::symlink_metadata(data_file).is_ok() {
            return Err(OpenError {
                message: format!("`data_file` `{}` exists", data_file.display()),
                help: Some("remove it first, or choose another name".into()),
                key: "data_file",
            });
        }
        place.with(data_file);
    }
    let report = |stage, since: Instant, done: u64, progress: &mut OnProgress<'_>| {
        let now = Progress {
            path: &conversion.target.path,
            done: done.min(size),
            total: size,
            elapsed: since.elapsed(),
        };
        progress(stage, &now);
    };
    let mut target = place.make(&ring, &image, || Target::make(&ring, conversion, &image))?;
    // Opened before anything is written: it is told of every error of the host in writing.
    let durable = || File::open(place.partial()).and_then(Durable::new);
    let durable = conversion.sync.then(durable).transpose();
    let mut durable = durable.map_err(|error| failure("open", place.partial(), &error))?;

    let sums = conversion.verify.then(|| Sums::new(size));
    let backing = backing(&image);
    let mut disks = vec![Opener {
        format: conversion.from,
        image: &source,
    }];
    if let (Some(format), Some(image)) = (conversion.backing, &backing) {
        disks.push(Opener { format, image });
    }
    let scan = Scan {
        disks: &disks,
        engine: conversion.engine,
        size,
        unit: target.unit().max(blocks::BLOCK as u64),
        stop,
    };
    let compression = match conversion.compress {
        true => Some(
            target
                .compression()
                .ok_or_else(|| no_compression(conversion))?,
        ),
        false => None,
    };
    let (unit, has_zeroes) = (target.unit() as usize, target.has_zeroes());
    let worker = || {
        let mut encoder = compression.map(Encoder::new).transpose()?;
        let sums = sums.as_ref();
        Ok(move |slot: &mut Slot| {
            if let Some(sums) = sums {
                sums.add(slot.offset, &slot.memory[0][..slot.len]);
            }
            sort(slot, unit, has_zeroes, encoder.as_mut())
        })
    };
    let unwritten = |error| failure("write", &conversion.target.path, &error);
    let started = Instant::now();
    scan.run(worker, |slot| {
        let stored = ring.block_on(target.store(slot), || {});
        let stored = stored.map_err(unwritten)?;
        if let Some(durable) = &mut durable {
            durable.written(stored);
        }
        let done = slot.offset + slot.len as u64;
        report(Stage::Converting, started, done, progress);
        Ok(())
    })?;
    let finished = ring.block_on(target.finish(conversion.to), || {});
    let held_target = finished.map_err(unwritten)?;

    // The host writes what is in its cache while that is compared.
    let syncing = durable.map(Durable::end);
    let started = Instant::now();
    if let Some(sums) = &sums {
        verify(conversion, &image, sums, stop, |done| {
            report(Stage::Verifying, started, done, progress);
        })?;
    }
    if let Some(syncing) = syncing {
        let synced = syncing.join();
        let synced = synced.unwrap_or_else(|_| Err(io::Error::other("a thread ended")));
        synced.map_err(unwritten)?;
    }
    if stop.load(Ordering::Relaxed) {
        return Err(scan::interrupted());
    }
    place.finish()?;
    drop(held_target);
    drop(held);
    Ok(size)
}

/// Finds out what each unit of a span is for the target.
fn sort(
    slot: &mut Slot,
    unit: usize,
    has_zeroes: bool,
    mut encoder: Option<&mut Encoder>,
) -> io::Result<()> {
    slot.units.clear();
    slot.packed.clear();
    let len = slot.len.next_multiple_of(unit);
    let [memory, backing @ ..] = &slot.memory[..] else {
        return Ok(());
    };
    for at in (0..len).step_by(unit) {
        let bytes = &memory[at..at + unit];
        let found = match backing.first().map(|backing| &backing[at..at + unit]) {
            Some(below) if below == bytes => Unit::Same,
            Some(_) if has_zeroes && blocks::is_zero(bytes) => Unit::Zero,
            None if blocks::is_zero(bytes) => Unit::Same,
            _ => match &mut encoder {
                Some(encoder) => pack(encoder, bytes, &mut slot.packed)?,
                None => Unit::Data,
            },
        };
        slot.units.push(found);
    }
    Ok(())
}

/// Compresses a cluster, if it becomes smaller.
fn pack(encoder: &mut Encoder, bytes: &[u8], packed: &mut Vec<u8>) -> io::Result<Unit> {
    let start = packed.len();
    // With room for what becomes larger: after a stream that is cut off, the encoder is made anew.
    packed.resize(start + bytes.len() + bytes.len() / 8 + 256, 0);
    let len = encoder.compress(bytes, &mut packed[start..])?;
    let len = len.filter(|len| *len < bytes.len());
    packed.truncate(start + len.unwrap_or(0));
    Ok(len.map_or(Unit::Data, |len| Unit::Packed(len as u32)))
}

/// Reads the target through its format, and compares its sums with those of the source.
fn verify(
    conversion: &Conversion<'_>,
    image: &Image,
    sums: &Sums,
    stop: &AtomicBool,
    mut progress: impl FnMut(u64),
) -> Result<(), OpenError> {
    let size = image.size.unwrap_or(0);
    let image = read_only(image, false);
    let ring =
        Ring::new(conversion.engine).map_err(|error| failure("read", &image.path, &error))?;
    let opened = ring.block_on((conversion.to.open)(&ring, &image), || {})?;
    if opened.size() != size {
        return Err(differs(
            conversion,
            opened.size().min(size)..opened.size().max(size),
        ));
    }
    drop(opened);
    let scan = Scan {
        disks: &[Opener {
            format: conversion.to,
            image: &image,
        }],
        engine: conversion.engine,
        size,
        unit: blocks::BLOCK as u64,
        stop,
    };
    let found = Sums::new(size);
    let worker = || {
        Ok(|slot: &mut Slot| {
            found.add(slot.offset, &slot.memory[0][..slot.len]);
            Ok(())
        })
    };
    scan.run(worker, |slot| {
        progress(slot.offset + slot.len as u64);
        Ok(())
    })?;
    match sums.difference(&found) {
        None => Ok(()),
        Some(range) => Err(differs(conversion, range.start..range.end.min(size))),
    }
}

fn differs(conversion: &Conversion<'_>, range: Range<u64>) -> OpenError {
    OpenError {
        message: format!(
            "what was written to `{}` reads back differently between {:#x} and {:#x}: it was \
             removed",
            conversion.target.path.display(),
            range.start,
            range.end
        ),
        help: Some("look for errors of the disk or the memory in the kernel's log".into()),
        key: OpenError::HOST,
    }
}

/// An image as it is when it is only read, whatever its size.
fn read_only(image: &Image, lock: bool) -> Image {
    Image {
        ro: true,
        sparse: true,
        size: None,
        block_size: 1,
        lock,
        ..image.clone()
    }
}

/// The target's own backing file.
fn backing(image: &Image) -> Option<Image> {
    let path = image.backing.first()?;
    Some(Image {
        path: path.clone(),
        backing: image.backing[1..].to_vec(),
        format_written: true,
        options: Vec::new(),
        ..read_only(image, true)
    })
}

fn data_file(image: &Image) -> Option<&Path> {
    image.options.iter().find_map(|option| match option {
        ("data_file", OptionValue::Path(path)) => Some(path.as_path()),
        _ => None,
    })
}

/// Refuses to convert a file to itself.
fn check_names(conversion: &Conversion<'_>) -> Result<(), OpenError> {
    let (source, target) = (conversion.source, &conversion.target.path);
    let mut read = [&source.path].into_iter();
    let all = read
        .by_ref()
        .chain(&source.backing)
        .chain(&conversion.target.backing);
    let all = all.map(|path| path.as_path()).chain(data_file(source));
    for path in all {
        if place::is_same_file(path, target) {
            return Err(OpenError {
                message: format!(
                    "`{}` is to be read, and cannot be the target",
                    path.display()
                ),
                help: Some("choose another name for the target".into()),
                key: "path",
            });
        }
    }
    Ok(())
}

fn too_small(conversion: &Conversion<'_>, size: u64, has: u64) -> OpenError {
    OpenError {
        message: format!(
            "the target is to have {size} bytes, but `{}` has {has}",
            conversion.source.path.display()
        ),
        help: Some("leave the size out to have the source's".into()),
        key: "size",
    }
}

fn no_compression(conversion: &Conversion<'_>) -> OpenError {
    let name = conversion.to.name;
    OpenError {
        message: format!("format `{name}` as it is asked for cannot be compressed"),
        help: Some(match name {
            "qcow2" => "leave `data_file` and `preallocation` out".into(),
            _ => "convert to format `qcow2`, or leave the compression out".into(),
        }),
        key: "format",
    }
}
