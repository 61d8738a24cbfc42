//! Comparing the target with what was read of the source.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use super::Conversion;
use super::blocks::{self, Sums};
use super::images::read_only;
use super::scan::{Opener, Scan, Slot, failure};
use crate::{Image, OpenError, Ring};

/// Reads the target through its format, and compares its sums with those of the source.
pub(super) fn verify(
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
