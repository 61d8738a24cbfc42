//! The image that is filled.

use std::any::Any;
use std::io;
use std::mem;

use super::Conversion;
use super::blocks::BLOCK;
use super::raw::is_raw;
use super::scan::{Slot, Unit, reclaim};
use crate::qcow2::{Compression, Packer};
use crate::{Buffer, Disk, Format, Image, OpenError, Ring, Segments};

/// Largest unit of a format of which nothing is known but its [`crate::Limits`].
const MAX_UNIT: u32 = 2 << 20;

/// A new image, open.
pub(super) enum Target {
    /// A qcow2 image that is written from its first byte to its last.
    Packed(Box<Packer>),
    /// Any other.
    Disk(Box<dyn Disk>),
}

impl Target {
    /// Creates the image, and opens it.
    pub(super) fn make(
        ring: &Ring,
        conversion: &Conversion<'_>,
        image: &Image,
    ) -> Result<Target, OpenError> {
        let format = conversion.to;
        (format.create)(image)?;
        if format.name == "qcow2" && Packer::fits(image)? {
            let packer = ring.block_on(Packer::open(ring, image), || {})?;
            return Ok(Target::Packed(Box::new(packer)));
        }
        let disk = ring.block_on((format.open)(ring, image), || {})?;
        Ok(Target::Disk(disk))
    }

    /// The unit that is written or not, in bytes: a power of two.
    pub(super) fn unit(&self) -> u64 {
        match self {
            Target::Packed(packer) => packer.cluster_size(),
            Target::Disk(disk) => {
                let limits = disk.limits();
                let unit = limits.optimal_io.max(limits.alignment).min(MAX_UNIT);
                unit.next_power_of_two().max(BLOCK as u32).into()
            }
        }
    }

    /// How clusters are to be compressed; `None` if they cannot be.
    pub(super) fn compression(&self) -> Option<Compression> {
        match self {
            Target::Packed(packer) => Some(packer.compression()),
            Target::Disk(_) => None,
        }
    }

    /// Whether zeroes over a backing file need not be written as data.
    pub(super) fn has_zeroes(&self) -> bool {
        match self {
            Target::Packed(packer) => packer.has_zeroes(),
            Target::Disk(_) => true,
        }
    }

    /// Stores what is to be stored of a span. Returns how many bytes that were.
    pub(super) async fn store(&mut self, slot: &mut Slot) -> io::Result<u64> {
        let unit = self.unit() as usize;
        match self {
            Target::Packed(packer) => store_packed(packer, slot),
            Target::Disk(disk) => store_on_disk(&**disk, unit, slot).await,
        }
    }

    /// Gives all that is not written yet to the host, not always durably. What is returned holds
    /// the image's lock, if it is still held.
    pub(super) async fn finish(self, format: &Format) -> io::Result<Option<Box<dyn Any>>> {
        match self {
            Target::Packed(mut packer) => {
                packer.finish()?;
                Ok(Some(packer))
            }
            // A raw image is nothing but its file, which has it all.
            Target::Disk(disk) if is_raw(format) => Ok(Some(Box::new(disk))),
            Target::Disk(disk) => {
                disk.close().await?;
                Ok(None)
            }
        }
    }
}

fn store_packed(packer: &mut Packer, slot: &Slot) -> io::Result<u64> {
    let unit = packer.cluster_size() as usize;
    let mut packed = &slot.packed[..];
    let (mut at, mut stored) = (0, packed.len() as u64);
    let alike = |one: &Unit, other: &Unit| one == other && !is_packed(*one);
    for run in slot.units.chunk_by(alike) {
        let len = run.len() * unit;
        let offset = slot.offset + at as u64;
        match run[0] {
            Unit::Same => {}
            Unit::Zero => {
                for at in (0..len as u64).step_by(unit) {
                    packer.zeroes(offset + at)?;
                }
            }
            Unit::Data => {
                stored += len as u64;
                packer.data(offset, &slot.memory[0][at..at + len])?;
            }
            Unit::Packed(count) => {
                let (bytes, rest) = packed.split_at(count as usize);
                packed = rest;
                packer.compressed(offset, bytes)?;
            }
        }
        at += len;
    }
    Ok(stored)
}

async fn store_on_disk(disk: &dyn Disk, unit: usize, slot: &mut Slot) -> io::Result<u64> {
    let buffer = mem::replace(&mut slot.memory[0], Buffer::zeroed(0, 1)?);
    let memory = Segments::from_buffer(buffer);
    let (mut at, mut stored) = (0, 0);
    for run in slot.units.chunk_by(|one, other| one == other) {
        let offset = slot.offset + at as u64;
        let left = disk.size().saturating_sub(offset);
        let len = left.min((run.len() * unit) as u64);
        match run[0] {
            Unit::Zero => disk.write_zeroes(offset, len, true).await?,
            Unit::Data => {
                stored += len;
                disk.write(offset, memory.slice(at, len as usize)).await?;
            }
            // Only a qcow2 image that is packed takes what is compressed.
            Unit::Same | Unit::Packed(_) => {}
        }
        at += run.len() * unit;
    }
    slot.memory[0] = reclaim(memory)?;
    Ok(stored)
}

fn is_packed(unit: Unit) -> bool {
    matches!(unit, Unit::Packed(_))
}
