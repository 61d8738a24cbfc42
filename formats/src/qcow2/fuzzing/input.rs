//! A fuzzer's bytes as a series of decisions.

/// Bytes that decide; after the last one all decisions are 0.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl Input<'_> {
    pub(super) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub(super) fn number(&mut self) -> u64 {
        (0..8).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    /// A number below `end`; of no more bytes than that needs.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        let mut number = 0;
        let mut left = end.saturating_sub(1);
        while left > 0 {
            number = number << 8 | u64::from(self.byte());
            left >>= 8;
        }
        number % end.max(1)
    }

    /// One of `items`.
    pub(super) fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }
}
