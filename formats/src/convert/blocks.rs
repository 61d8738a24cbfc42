//! Blocks of 4 KiB: whether they are zeroes, and sums that tell two disks apart.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes in a block.
pub(super) const BLOCK: usize = 4096;
/// Bytes that share one sum, unless the disk is huge.
const REGION: u64 = 64 << 20;
/// No disk has more sums.
const MAX_REGIONS: u64 = 1 << 20;

/// Whether all bytes are 0.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Most data is told apart by its first bytes; the rest is compared many bytes at a time.
    let (first, rest) = bytes.split_at(bytes.len().min(16));
    let zero = |part: &[u8]| part.iter().fold(0, |all, byte| all | byte) == 0;
    zero(first) && rest.chunks(512).all(zero)
}

/// The sums of a disk's regions. That of a region adds up numbers of its blocks, which depend on
/// their bytes and their places; blocks of zeroes count nothing. So it is the same in whatever
/// order and pieces the disk is read, with or without its holes.
pub(super) struct Sums {
    region: u64,
    sums: Vec<AtomicU64>,
}

impl Sums {
    /// For a disk of `size` bytes of which nothing has been added.
    pub(super) fn new(size: u64) -> Sums {
        let region = REGION.max(size.div_ceil(MAX_REGIONS).next_multiple_of(REGION));
        Sums {
            region,
            sums: (0..size.div_ceil(region))
                .map(|_| AtomicU64::new(0))
                .collect(),
        }
    }

    /// Adds what the disk holds at `offset`, the beginning of a block. Only at the end of the
    /// disk a block may be cut short: it counts as if zeroes followed.
    pub(super) fn add(&self, offset: u64, bytes: &[u8]) {
        let first = offset / BLOCK as u64;
        for (index, block) in (first..).zip(bytes.chunks(BLOCK)) {
            if !is_zero(block) {
                let number = match block.len() {
                    BLOCK => number(index, block),
                    len => {
                        let mut whole = [0; BLOCK];
                        whole[..len].copy_from_slice(block);
                        number(index, &whole)
                    }
                };
                let region = index * BLOCK as u64 / self.region;
                if let Some(sum) = self.sums.get(region as usize) {
                    sum.fetch_add(number, Ordering::Relaxed);
                }
            }
        }
    }

    /// The first region, as a range of bytes, in which another disk of the size differs.
    pub(super) fn difference(&self, other: &Sums) -> Option<std::ops::Range<u64>> {
        let mut pairs = self.sums.iter().zip(&other.sums);
        let differ = |(one, other): (&AtomicU64, &AtomicU64)| {
            one.load(Ordering::Relaxed) != other.load(Ordering::Relaxed)
        };
        let at = pairs.position(differ)? as u64;
        Some(at * self.region..(at + 1) * self.region)
    }
}

/// A number for the bytes of a block at its place: eight lanes, for which a processor has time
/// while it waits for memory. It guards against errors, not against somebody's intent.
fn number(index: u64, block: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let seed = (index + 1).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let mut lanes: [u64; 8] =
        std::array::from_fn(|lane| seed.rotate_left(lane as u32 * 8) ^ lane as u64);
    for row in block.chunks_exact(64) {
        for (lane, word) in lanes.iter_mut().zip(row.chunks_exact(8)) {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(word);
            // The rotation brings the upper bits to where the next product spreads them.
            *lane = (*lane ^ u64::from_le_bytes(bytes))
                .wrapping_mul(ODD)
                .rotate_left(29);
        }
    }
    lanes.iter().fold(seed, |all, lane| {
        let mixed = (all ^ lane).wrapping_mul(ODD);
        mixed ^ mixed >> 32
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut random = Random::new(seed);
        (0..len).map(|_| random.below(256) as u8).collect()
    }

    #[test]
    fn one_bit_anywhere_makes_bytes_no_zeroes() {
        for len in [0, 1, 15, 16, 17, 511, 512, 4096] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 0x10;
                assert!(!is_zero(&bytes), "{len} {at}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn sums_are_the_same_whatever_the_order_and_the_holes() {
        let mut disk = noise(1 << 20, 3);
        disk[200 << 10..300 << 10].fill(0);
        let whole = Sums::new(1 << 20);
        whole.add(0, &disk);
        let pieces = Sums::new(1 << 20);
        for at in [300 << 10, 0, 100 << 10] {
            pieces.add(at, &disk[at as usize..][..100 << 10]);
        }
        pieces.add(400 << 10, &disk[400 << 10..]);
        assert_eq!(whole.difference(&pieces), None);
    }

    #[test]
    fn a_short_last_block_counts_as_one_with_zeroes() {
        let bytes = noise(5000, 8);
        let mut padded = bytes.clone();
        padded.resize(8192, 0);
        let (short, long) = (Sums::new(5000), Sums::new(5000));
        short.add(0, &bytes);
        long.add(0, &padded);
        assert_eq!(short.difference(&long), None);
    }

    #[test]
    fn every_bit_and_every_place_matters() {
        let disk = noise(64 << 10, 5);
        let good = Sums::new(256 << 20);
        good.add(128 << 20, &disk);
        let differs = |at: u64, disk: &[u8]| {
            let other = Sums::new(256 << 20);
            other.add(at, disk);
            good.difference(&other)
        };
        assert_eq!(differs(128 << 20, &disk), None);
        let there = Some(128 << 20..192 << 20);
        for bit in (0..disk.len() * 8).step_by(4099) {
            let mut bad = disk.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(differs(128 << 20, &bad), there, "bit {bit}");
        }
        // Two blocks, or two words of a block, that changed places.
        let mut bad = disk.clone();
        bad[..8192].rotate_left(4096);
        assert_eq!(differs(128 << 20, &bad), there);
        let mut bad = disk.clone();
        bad[..128].rotate_left(64);
        assert_eq!(differs(128 << 20, &bad), there);
        // Two upper bits in one lane.
        let mut bad = disk.clone();
        bad[7] ^= 0x80;
        bad[71] ^= 0x80;
        assert_eq!(differs(128 << 20, &bad), there);
        assert_eq!(differs(132 << 20, &disk), there);
        assert_eq!(differs(0, &disk), Some(0..64 << 20));
    }

    #[test]
    fn a_huge_disk_has_no_more_sums_than_a_large_one() {
        let sums = Sums::new(1 << 61);
        assert!(sums.sums.len() as u64 <= MAX_REGIONS);
        sums.add((1 << 61) - 4096, &[1; 4096]);
        assert!(sums.difference(&Sums::new(1 << 61)).is_some());
    }
}
