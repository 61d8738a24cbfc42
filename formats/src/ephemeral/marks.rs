//! One bit for each block of a disk, kept only where some are set.

use std::collections::BTreeMap;

/// Words in a page of marks; a page stands for 32768 blocks.
const WORDS: usize = 512;
const PAGE: u64 = WORDS as u64 * 64;

/// Marks on blocks.
pub(super) struct Marks {
    block: u64,
    pages: BTreeMap<u64, Box<[u64; WORDS]>>,
}

impl Marks {
    /// No marks on blocks of so many bytes.
    pub(super) fn new(block: u32) -> Self {
        Marks {
            block: u64::from(block).max(1),
            pages: BTreeMap::new(),
        }
    }

    /// Whether a number of bytes is a number of blocks.
    pub(super) fn is_whole(&self, len: u64) -> bool {
        len.is_multiple_of(self.block)
    }

    /// Marks the blocks of a range of bytes.
    pub(super) fn set(&mut self, offset: u64, len: u64) {
        let mut at = offset / self.block;
        let end = (offset + len).div_ceil(self.block);
        while at < end {
            let page = self.pages.entry(at / PAGE);
            let words = page.or_insert_with(|| Box::new([0; WORDS]));
            let bit = at % 64;
            let count = (64 - bit).min(end - at);
            words[word(at)] |= u64::MAX >> (64 - count) << bit;
            at += count;
        }
    }

    /// Whether the block at `offset` is marked, and for how many of `len` bytes it stays so.
    pub(super) fn run(&self, offset: u64, len: u64) -> (bool, u64) {
        let end = offset + len;
        let mut at = offset / self.block;
        let marked = self.bits(at) & 1 != 0;
        while at * self.block < end {
            let bits = self.bits(at);
            let same = match marked {
                true => bits.trailing_ones(),
                false => bits.trailing_zeros(),
            };
            let left = 64 - at % 64;
            let same = u64::from(same).min(left);
            at += same;
            if same < left {
                break;
            }
        }
        (marked, (at * self.block).min(end).saturating_sub(offset))
    }

    /// The marks of `block` and of those after it in the same word, lowest first.
    fn bits(&self, block: u64) -> u64 {
        let page = self.pages.get(&(block / PAGE));
        page.map_or(0, |words| words[word(block)] >> (block % 64))
    }
}

/// The index in its page of the word that a block's mark is in.
fn word(block: u64) -> usize {
    (block % PAGE / 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn runs_are_those_of_a_flat_list_of_marks() {
        let mut random = Random::new(7);
        for _ in 0..50 {
            let mut marks = Marks::new(512);
            let mut flat = vec![false; 3 * PAGE as usize];
            for _ in 0..20 {
                let start = random.below(flat.len() as u64);
                let most = random.of(&[1, 10, 100, PAGE]);
                let len = random.below(most) % (flat.len() as u64 - start);
                marks.set(start * 512, len * 512);
                flat[start as usize..][..len as usize].fill(true);
            }
            for _ in 0..200 {
                let start = random.below(flat.len() as u64) as usize;
                let len = random.below((flat.len() - start) as u64) + 1;
                let same = flat[start..][..len as usize]
                    .iter()
                    .take_while(|mark| **mark == flat[start]);
                let want = (flat[start], same.count() as u64 * 512);
                assert_eq!(marks.run(start as u64 * 512, len * 512), want);
            }
        }
    }
}
