//! What is done to an image: one number of it takes another value.

use super::files::Names;
use super::input::Input;
use super::seed::{Number, Part, Seed};
use super::view;

const COPIED: u64 = 1 << 63;

/// Parts by how often one of their numbers is chosen: not often those of which nearly any other
/// value makes the image one that is refused.
const OFTEN: [Part; 24] = [
    Part::L2,
    Part::Refcounts,
    Part::L2,
    Part::Compressed,
    Part::L2,
    Part::SnapshotL2,
    Part::Refcounts,
    Part::L2,
    Part::L1,
    Part::Compressed,
    Part::L2,
    Part::Refcounts,
    Part::L2,
    Part::SnapshotL2,
    Part::RefcountTable,
    Part::Refcounts,
    Part::L2,
    Part::Snapshots,
    Part::L1,
    Part::Refcounts,
    Part::L2,
    Part::Extensions,
    Part::SnapshotL1,
    Part::Header,
];

/// Makes an image hostile. Returns what was done, to be shown.
pub(super) fn mutate(
    seed: &Seed,
    names: &Names,
    image: &mut Vec<u8>,
    input: &mut Input<'_>,
) -> Vec<String> {
    let mut done = Vec::new();
    for _ in 0..input.of(&[1, 0, 2, 1, 3, 1, 2, 5]) {
        done.push(match input.below(40) {
            0 => resize(image, input),
            1 => copy(seed, image, input),
            2 => bait(names, image, input),
            3 => any(image, input),
            _ => number(seed, image, input),
        });
    }
    done
}

fn number(seed: &Seed, image: &mut [u8], input: &mut Input<'_>) -> String {
    let part = input.of(&OFTEN);
    let Some(numbers) = seed.numbers.get(&part) else {
        return number_of(Part::L2, seed, image, input);
    };
    match numbers.is_empty() {
        true => number_of(Part::L2, seed, image, input),
        false => number_of(part, seed, image, input),
    }
}

fn number_of(part: Part, seed: &Seed, image: &mut [u8], input: &mut Input<'_>) -> String {
    let number = input.of(&seed.numbers[&part]);
    let Number { offset, width } = number;
    let old = load(image, number);
    let cluster = 1u64 << seed.cluster_bits;
    let flags = old & (COPIED | 1);
    let end = (image.len() as u64).next_multiple_of(cluster);
    let place = input.of(&seed.places);
    let new = match input.below(24) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => old.wrapping_add(cluster),
        4 => old.wrapping_sub(cluster),
        5 => old.wrapping_add(512),
        6 => old.wrapping_add(1),
        7 => old.wrapping_sub(1),
        8 => old ^ COPIED,
        9 => old ^ 1 << 62,
        10 => old ^ 1,
        11 | 12 => place | flags,
        13 => place | COPIED,
        // Its own place.
        14 => offset & !(cluster - 1) | flags,
        15 => end | COPIED,
        16 => (end + (cluster << input.below(30))) | flags,
        17 => 1 << 55 | flags,
        18 => 1 << 55 | COPIED | 1,
        // As another one.
        19 | 20 => load(image, input.of(&seed.numbers[&part])),
        21 => old ^ 1 << input.below(width as u64 * 8),
        22 => u64::from(input.byte()),
        _ => input.number(),
    };
    let at = offset as usize;
    // It may have been cut off.
    if let Some(to) = image.get_mut(at..at + width) {
        to.copy_from_slice(&new.to_be_bytes()[8 - width..]);
    }
    format!("{part:?} at {offset:#x}: {old:#x} becomes {new:#x}")
}

fn load(image: &[u8], number: Number) -> u64 {
    view::be64(image, number.offset) >> (64 - 8 * number.width)
}

/// The file is cut off, or longer.
fn resize(image: &mut Vec<u8>, input: &mut Input<'_>) -> String {
    let len = match input.below(3) {
        0 => input.below(image.len() as u64 + 1) as usize,
        1 => image.len() - input.below(4096).min(image.len() as u64) as usize,
        _ => image.len() + input.below(1 << 17) as usize,
    };
    image.resize(len.max(512), 0);
    format!("the file has {} bytes", image.len())
}

/// One structure is replaced with another.
fn copy(seed: &Seed, image: &mut [u8], input: &mut Input<'_>) -> String {
    let cluster = 1 << seed.cluster_bits;
    let [from, to] = [(); 2].map(|()| input.of(&seed.places) as usize);
    if from.max(to) + cluster <= image.len() {
        image.copy_within(from..from + cluster, to);
    }
    format!("the cluster at {to:#x} becomes that at {from:#x}")
}

/// The header names another file.
fn bait(names: &Names, image: &mut [u8], input: &mut Input<'_>) -> String {
    let (at, len) = (400, names.bait.len());
    let data_file = input.byte() & 1 != 0;
    if image.len() > 512 {
        match data_file {
            false => {
                image[8..16].copy_from_slice(&(at as u64).to_be_bytes());
                image[16..20].copy_from_slice(&(len as u32).to_be_bytes());
                image[at..at + len].copy_from_slice(names.bait.as_bytes());
            }
            true => {
                image[79] |= 4;
                image[112..116].copy_from_slice(b"DATA");
                image[116..120].copy_from_slice(&(len as u32).to_be_bytes());
                image[120..120 + len].copy_from_slice(names.bait.as_bytes());
                image[120 + len..160].fill(0);
            }
        }
    }
    format!("another file is named: its data file: {data_file}")
}

/// Some byte anywhere.
fn any(image: &mut [u8], input: &mut Input<'_>) -> String {
    let (at, byte) = (input.below(image.len() as u64) as usize, input.byte());
    image[at] ^= byte;
    format!("the byte at {at:#x} is XORed with {byte:#x}")
}
