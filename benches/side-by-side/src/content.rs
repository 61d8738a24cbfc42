//! What blocks hold, so that it can be told whether a transfer was right.
//!
//! A block that somebody wrote begins with its own offset and the number of the measurement that
//! wrote it; each further word follows from its place in the block.

use crate::case::BLOCK;

const WORD: usize = size_of::<u64>();

/// Fills memory with blocks whose offset and measurement are not stamped yet.
pub fn fill(memory: &mut [u8]) {
    for block in memory.chunks_exact_mut(BLOCK) {
        for (at, word) in block.chunks_exact_mut(WORD).enumerate() {
            word.copy_from_slice(&filling(at).to_le_bytes());
        }
    }
}

/// Stamps blocks that were filled.
#[inline]
pub fn stamp(blocks: &mut [u8], offset: u64, measurement: u64) {
    for (number, block) in blocks.chunks_exact_mut(BLOCK).enumerate() {
        let at = offset + (number * BLOCK) as u64;
        block[..WORD].copy_from_slice(&at.to_le_bytes());
        block[WORD..2 * WORD].copy_from_slice(&measurement.to_le_bytes());
    }
}

/// The measurements that wrote these blocks, which lie at `offset`; where a block holds what
/// nobody wrote there, its offset.
pub fn written_by(blocks: &[u8], offset: u64) -> Result<Vec<u64>, u64> {
    let mut measurements = Vec::new();
    for (number, block) in blocks.chunks_exact(BLOCK).enumerate() {
        let at = offset + (number * BLOCK) as u64;
        let mut words = block.chunks_exact(WORD).map(word);
        if words.next() != Some(at) {
            return Err(at);
        }
        measurements.push(words.next().unwrap_or_default());
        if !words.eq((2..BLOCK / WORD).map(filling)) {
            return Err(at);
        }
    }
    Ok(measurements)
}

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

fn filling(at: usize) -> u64 {
    (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_tell_who_wrote_them_and_where() {
        let mut blocks = vec![0; 4 * BLOCK];
        fill(&mut blocks);
        stamp(&mut blocks, 8192, 7);
        assert_eq!(written_by(&blocks, 8192), Ok(vec![7; 4]));
        assert_eq!(written_by(&blocks, 4096), Err(4096));
        for wrong in [0, 16, BLOCK - 1] {
            let mut blocks = blocks.clone();
            blocks[2 * BLOCK + wrong] ^= 1;
            assert_eq!(written_by(&blocks, 8192), Err(16384));
        }
    }
}
