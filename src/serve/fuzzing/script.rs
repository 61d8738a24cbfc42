//! What the fuzzer's bytes say: one after another, and zeroes after the last.

use super::guest::{MEMORY, USER};

#[derive(Clone)]
pub(super) struct Script<'a>(pub(super) &'a [u8]);

impl Script<'_> {
    pub(super) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((byte, rest)) => {
                self.0 = rest;
                *byte
            }
            None => 0,
        }
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.byte())
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    /// Whether something unusual is to be: a byte that is mostly small says no.
    pub(super) fn rarely(&mut self) -> bool {
        self.byte() >= 0xe8
    }

    pub(super) fn choose<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.byte()) % of.len()]
    }

    /// A number, at an edge or anywhere.
    pub(super) fn number(&mut self) -> u64 {
        let kind = self.byte();
        let low = kind & 0x1f;
        match kind >> 5 {
            0 => u64::from(low),
            1 => u64::from(low) << 12,
            2 => 1 << (self.byte() % 64),
            3 => u64::MAX - u64::from(low),
            4 => USER + u64::from(self.u16()) * 16,
            5 => MEMORY - u64::from(low),
            6 => u64::from(self.u16()),
            _ => u64::from_le_bytes(self.bytes()),
        }
    }

    /// `right`, but now and then another number.
    pub(super) fn often(&mut self, right: u64) -> u64 {
        match self.rarely() {
            true => self.number(),
            false => right,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_the_last_byte_there_are_zeroes() {
        let mut script = Script(&[7, 0x34]);
        assert_eq!((script.byte(), script.u16()), (7, 0x34));
        assert!(script.is_over() && !script.rarely());
        assert_eq!((script.number(), script.often(5)), (0, 5));
    }
}
