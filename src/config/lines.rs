//! A text by its lines.

use std::ops::Range;

/// A text with an index of its lines: a file may be one line of a megabyte, with a mistake at
/// every other byte.
pub(super) struct Lines<'t> {
    pub(super) text: &'t str,
    /// Where each line starts.
    starts: Vec<usize>,
}

impl<'t> Lines<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        let newlines = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let starts = [0]
            .into_iter()
            .chain(newlines.map(|(at, _)| at + 1))
            .collect();
        Lines { text, starts }
    }

    /// Number of the line that `offset` lies on, from 1.
    pub(super) fn number(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset)
    }

    /// The line that `offset` lies on, without its newline.
    pub(super) fn line(&self, offset: usize) -> Range<usize> {
        let next = self.number(offset);
        let end = match self.starts.get(next) {
            Some(next) => next - 1,
            None => self.text.len(),
        };
        self.starts[next - 1]..end
    }

    /// The part of `at` on its first line, in whole characters.
    pub(super) fn first_line(&self, at: &Range<usize>) -> Range<usize> {
        let inside = |at: &usize| !self.text.is_char_boundary(*at);
        let mut start = at.start.min(self.text.len());
        while inside(&start) {
            start -= 1;
        }
        let mut end = at.end.min(self.line(start).end).max(start);
        while inside(&end) {
            end += 1;
        }
        start..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_offset_lies_on_a_line() {
        let lines = Lines::new("ab\n\nc");
        let found: Vec<_> = (0..=5)
            .map(|at| (lines.number(at), lines.line(at)))
            .collect();
        assert_eq!(
            found,
            [
                (1, 0..2),
                (1, 0..2),
                (1, 0..2),
                (2, 3..3),
                (3, 4..5),
                (3, 4..5)
            ]
        );
        assert_eq!(Lines::new("").line(0), 0..0);
        assert_eq!(Lines::new("a\n").line(2), 2..2);
    }

    #[test]
    fn a_range_of_several_lines_is_cut_at_its_first() {
        let lines = Lines::new("ab\ncd\n");
        assert_eq!(lines.first_line(&(1..5)), 1..2);
        assert_eq!(lines.first_line(&(1..1)), 1..1);
        assert_eq!(lines.first_line(&(2..3)), 2..2);
        assert_eq!(Lines::new("aäb").first_line(&(2..2)), 1..3);
        assert_eq!(Lines::new("aäb").first_line(&(0..2)), 0..3);
        assert_eq!(lines.first_line(&(90..99)), 6..6);
    }
}
