//! What each unit of a span is for the target.

use std::io;

use super::blocks;
use super::scan::{Slot, Unit};
use crate::qcow2::Encoder;

/// Finds out what each unit of a span is for the target.
pub(super) fn sort(
    slot: &mut Slot,
    unit: usize,
    has_zeroes: bool,
    mut encoder: Option<&mut Encoder>,
) -> io::Result<()> {
    slot.units.clear();
    slot.packed.clear();
    slot.written = 0;
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
