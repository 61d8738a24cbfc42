//! A table of the first level, held in memory as a whole: the L1 table or the refcount table.

use std::collections::BTreeSet;
use std::io;
use std::rc::Rc;

use crate::Buffer;

/// The entries, and which of them have changed.
pub(super) struct Table {
    entries: Vec<u64>,
    /// How many of them have a place in the file; the others wait for the table to move.
    placed: usize,
    /// Where the table lies in the file.
    offset: u64,
    /// What is written at once, in bytes.
    unit: usize,
    /// Units that have changed since they were last given out to be written.
    dirty: BTreeSet<usize>,
    /// The header does not know of `offset` and the number of entries yet.
    moved: bool,
}

/// What of a table is to be written.
pub(super) struct Changes {
    /// Offset in the file, and bytes.
    pub(super) units: Vec<(u64, Rc<Buffer>)>,
    /// The header is to be told of the table's place, and its number of entries.
    pub(super) moved: Option<(u64, usize)>,
    numbers: Vec<usize>,
}

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.units.is_empty() && self.moved.is_none()
    }
}

impl Table {
    pub(super) fn new(entries: Vec<u64>, offset: u64, unit: usize) -> Self {
        Table {
            placed: entries.len(),
            entries,
            offset,
            unit,
            dirty: BTreeSet::new(),
            moved: false,
        }
    }

    /// An entry; 0 past the table's end.
    pub(super) fn at(&self, index: u64) -> u64 {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.entries.get(index).copied().unwrap_or(0)
    }

    /// Number of entries that have a place in the file.
    pub(super) fn len(&self) -> u64 {
        self.placed as u64
    }

    /// Where it lies, and its length in bytes.
    pub(super) fn place(&self) -> (u64, u64) {
        (self.offset, self.len() * 8)
    }

    /// Changes an entry, which must be there.
    pub(super) fn set(&mut self, index: u64, value: u64) {
        let Some(entry) = self.entries.get_mut(index as usize) else {
            return;
        };
        if *entry != value {
            *entry = value;
            if index < self.placed as u64 {
                self.dirty.insert(index as usize * 8 / self.unit);
            }
        }
    }

    /// Makes room for at least `len` entries, ahead of the table's move to where they have a
    /// place; returns how many there are.
    pub(super) fn extend_ahead(&mut self, len: u64) -> u64 {
        let len = self.entries.len().max(len as usize);
        self.entries.resize(len, 0);
        len as u64
    }

    /// Moves the table to another place, where it has `len` entries.
    pub(super) fn relocate(&mut self, offset: u64, len: u64) {
        self.entries.resize(len as usize, 0);
        self.placed = self.entries.len();
        self.offset = offset;
        self.moved = true;
        self.dirty = (0..(self.entries.len() * 8).div_ceil(self.unit)).collect();
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.moved || !self.dirty.is_empty()
    }

    /// Gives out all that has changed.
    pub(super) fn take_changes(&mut self) -> io::Result<Changes> {
        let mut units = Vec::new();
        for number in &self.dirty {
            let mut bytes = Buffer::zeroed(self.unit, self.unit)?;
            let first = number * self.unit / 8;
            let entries = self.entries.get(first..).unwrap_or_default();
            for (to, entry) in bytes.chunks_exact_mut(8).zip(entries) {
                to.copy_from_slice(&entry.to_be_bytes());
            }
            let offset = self.offset + (number * self.unit) as u64;
            units.push((offset, Rc::new(bytes)));
        }
        let numbers = std::mem::take(&mut self.dirty).into_iter().collect();
        let moved = std::mem::take(&mut self.moved).then_some((self.offset, self.placed));
        Ok(Changes {
            units,
            moved,
            numbers,
        })
    }

    /// What was given out could not be written.
    pub(super) fn restore(&mut self, changes: &Changes) {
        self.dirty.extend(&changes.numbers);
        self.moved |= changes.moved.is_some();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_units_that_changed_are_written() {
        let mut table = Table::new(vec![7; 200], 0x10000, 512);
        table.set(64, 7);
        assert!(!table.is_dirty());
        table.set(64, 8);
        table.set(199, 9);
        let changes = table.take_changes().unwrap();
        let offsets: Vec<_> = changes.units.iter().map(|(offset, _)| *offset).collect();
        assert_eq!(offsets, [0x10200, 0x10600]);
        assert_eq!(changes.units[0].1[7], 8);
        assert_eq!(changes.units[1].1[63], 9);
        assert_eq!(changes.units[1].1[64..], [0; 448]);
        assert!(!table.is_dirty());
        table.restore(&changes);
        assert_eq!(table.take_changes().unwrap().units.len(), 2);
    }

    #[test]
    fn a_table_that_moves_is_written_as_a_whole_and_told_to_the_header() {
        let mut table = Table::new(vec![7; 64], 0x10000, 512);
        table.relocate(0x20000, 65);
        let changes = table.take_changes().unwrap();
        assert_eq!(changes.units.len(), 2);
        assert_eq!(changes.moved, Some((0x20000, 65)));
        assert_eq!((table.at(63), table.at(64), table.at(65)), (7, 0, 0));
    }
}
