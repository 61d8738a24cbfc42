//! Raw targets, which whoever has the bytes may write to.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::scan::{Slot, Unit, failure};
use super::target::Target;
use crate::{Format, Image, OpenError, raw_for};

/// A raw image that is filled by whoever has the bytes, in any order.
///
/// What goes to the page cache is written with plain calls: an engine would have another thread
/// make each, and a thread that has nothing else to do may as well wait for the file system.
pub(super) struct Raw {
    file: File,
    size: u64,
}

impl Raw {
    /// For a target, if that can be filled so; it goes on to hold the image's lock.
    pub(super) fn of(
        target: &Target,
        format: &Format,
        image: &Image,
    ) -> Result<Option<Raw>, OpenError> {
        let Target::Disk(disk) = target else {
            return Ok(None);
        };
        if !is_raw(format) || !image.backing.is_empty() {
            return Ok(None);
        }
        let file = File::options().write(true).open(&image.path);
        Ok(Some(Raw {
            file: file.map_err(|error| failure("open", &image.path, &error))?,
            size: disk.size(),
        }))
    }

    /// Writes the data of a span, of which nothing is left to be stored.
    pub(super) fn write(&self, slot: &mut Slot, unit: usize) -> io::Result<()> {
        let mut at = 0;
        for run in slot.units.chunk_by(|one, other| one == other) {
            let len = run.len() * unit;
            if run[0] == Unit::Data {
                let offset = slot.offset + at as u64;
                let len = self.size.saturating_sub(offset).min(len as u64);
                let bytes = &slot.memory[0][at..at + len as usize];
                self.file.write_all_at(bytes, offset)?;
                slot.written += len;
            }
            at += len;
        }
        slot.units.clear();
        Ok(())
    }
}

/// Whether an image of the format is nothing but the bytes of the disk.
pub(super) fn is_raw(format: &Format) -> bool {
    [true, false].map(raw_for).contains(&format.name)
}
