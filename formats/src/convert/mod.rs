//! Copying a disk into a new image of any format.
//!
//! Only data is read, by several threads (`scan`); blocks of zeroes are not written (`sort`). The
//! target is made under another name beside its own (`place`), filled in the disk's order
//! (`target`) or by each of the threads (`raw`), made durable, and meanwhile read back and
//! compared (`verify`) by sums of its blocks (`blocks`). Then it gets its name.

mod blocks;
mod durable;
mod images;
mod place;
mod raw;
mod scan;
mod sort;
mod target;
#[cfg(test)]
mod tests;
mod verify;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::host_file::text;
use crate::qcow2::Encoder;
use crate::{Engine, Format, Image, OpenError, Progress, Ring};
use blocks::Sums;
use durable::Durable;
use images::{backing, check_names, data_file, no_compression, read_only, too_small};
use place::Place;
use raw::Raw;
use scan::{Opener, Scan, Slot, failure, no_memory};
use sort::sort;
use target::Target;
use verify::verify;

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
    let unwritten = |error| failure("write", &conversion.target.path, &error);
    let raw = Raw::of(&target, conversion.to, &image)?;
    let worker = || {
        let mut encoder = compression.map(Encoder::new).transpose()?;
        let (sums, raw) = (sums.as_ref(), raw.as_ref());
        Ok(move |slot: &mut Slot| {
            if let Some(sums) = sums {
                sums.add(slot.offset, &slot.memory[0][..slot.len]);
            }
            sort(slot, unit, has_zeroes, encoder.as_mut()).map_err(no_memory)?;
            match raw {
                Some(raw) => raw.write(slot, unit).map_err(unwritten),
                None => Ok(()),
            }
        })
    };
    let started = Instant::now();
    scan.run(worker, |slot| {
        let stored = ring.block_on(target.store(slot), || {});
        let stored = stored.map_err(unwritten)?;
        if let Some(durable) = &mut durable {
            durable.written(stored + slot.written);
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
