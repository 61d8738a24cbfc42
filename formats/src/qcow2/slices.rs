//! A cache of pieces of tables: L2 tables and refcount blocks.
//!
//! A slice is what is read and written at once: 4 KiB, or a cluster that is smaller. One that is
//! being written may be changed meanwhile: the change goes to a copy.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::rc::Rc;

use rustix::io::Errno;

use crate::{Buffer, Segments};

/// Where nothing can be written, so many slices and twice as many as are kept may change.
const SPARE: usize = 64;

/// Slices by number.
pub(super) struct Slices {
    /// Length of a slice in bytes.
    len: usize,
    /// How many are kept.
    most: usize,
    slices: HashMap<u64, Slice, BuildHasherDefault<Spread>>,
    /// All numbers; the first is the next to be looked at when one must go.
    clock: VecDeque<u64>,
    dirty: usize,
}

struct Slice {
    bytes: Rc<Buffer>,
    /// Changed since it was last given out to be written.
    dirty: bool,
    /// Given out to be written.
    writing: bool,
    used: Cell<bool>,
}

/// A slice to be written.
pub(super) struct Dirty {
    pub(super) number: u64,
    pub(super) bytes: Rc<Buffer>,
}

/// Numbers of slices are small and dense: all that is needed is to spread them.
#[derive(Default)]
pub(super) struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0 ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        // The golden ratio, whose multiples lie as far apart as can be. The table looks at the
        // highest bits and the lowest.
        let spread = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = spread ^ spread >> 32;
    }
}

impl Slices {
    pub(super) fn new(len: usize, most: usize) -> Self {
        Slices {
            len,
            most: most.max(2),
            slices: HashMap::default(),
            clock: VecDeque::new(),
            dirty: 0,
        }
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        self.slices.contains_key(&number)
    }

    /// The bytes of a slice, if it is here.
    pub(super) fn bytes(&self, number: u64) -> Option<&[u8]> {
        let slice = self.slices.get(&number)?;
        slice.used.set(true);
        Some(&slice.bytes)
    }

    /// The bytes of a slice, to be changed; `None` if it is not here. ENOMEM if too many have
    /// changed and could not be written.
    pub(super) fn bytes_mut(&mut self, number: u64) -> io::Result<Option<&mut [u8]>> {
        let Some(slice) = self.slices.get_mut(&number) else {
            return Ok(None);
        };
        if !slice.dirty && self.dirty >= 2 * self.most + SPARE {
            return Err(Errno::NOMEM.into());
        }
        if Rc::get_mut(&mut slice.bytes).is_none() {
            let mut copy = Buffer::zeroed(self.len, self.len)?;
            copy.copy_from_slice(&slice.bytes);
            slice.bytes = Rc::new(copy);
        }
        slice.used.set(true);
        if !slice.dirty {
            slice.dirty = true;
            self.dirty += 1;
        }
        Ok(Rc::get_mut(&mut slice.bytes).map(|bytes| &mut bytes[..]))
    }

    /// Adds a slice as it was read.
    pub(super) fn insert(&mut self, number: u64, bytes: Buffer) {
        let slice = Slice {
            bytes: Rc::new(bytes),
            dirty: false,
            writing: false,
            used: Cell::new(true),
        };
        if self.slices.insert(number, slice).is_none() {
            self.clock.push_back(number);
        }
    }

    /// Makes room for one more slice; false if all are dirty or being written.
    pub(super) fn make_room(&mut self) -> bool {
        // Twice around: the first time everything may have been used lately.
        let mut looks = 2 * self.clock.len();
        while self.slices.len() >= self.most && looks > 0 {
            looks -= 1;
            let Some(number) = self.clock.pop_front() else {
                break;
            };
            let Some(slice) = self.slices.get(&number) else {
                continue;
            };
            if slice.dirty || slice.writing || slice.used.replace(false) {
                self.clock.push_back(number);
            } else {
                self.slices.remove(&number);
            }
        }
        self.slices.len() < self.most
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.dirty > 0
    }

    /// Gives out all that is dirty, in the order of the numbers.
    pub(super) fn take_dirty(&mut self) -> Vec<Dirty> {
        if self.dirty == 0 {
            return Vec::new();
        }
        let mut all = Vec::with_capacity(self.dirty);
        for (number, slice) in &mut self.slices {
            if slice.dirty {
                slice.dirty = false;
                slice.writing = true;
                all.push(Dirty {
                    number: *number,
                    bytes: Rc::clone(&slice.bytes),
                });
            }
        }
        self.dirty = 0;
        all.sort_unstable_by_key(|dirty| dirty.number);
        all
    }

    /// What was given out has been written, or else it is dirty again.
    pub(super) fn settle(&mut self, numbers: impl IntoIterator<Item = u64>, written: bool) {
        for number in numbers {
            let Some(slice) = self.slices.get_mut(&number) else {
                continue;
            };
            slice.writing = false;
            if !written && !slice.dirty {
                slice.dirty = true;
                self.dirty += 1;
            }
        }
    }
}

/// Memory of slices that lie one after the other in the file, for one write.
pub(super) fn to_write(buffers: Vec<Rc<Buffer>>) -> Segments {
    let pieces: Vec<_> = buffers
        .iter()
        .map(|buffer| (buffer.as_ptr(), buffer.len()))
        .collect();
    // SAFETY: the buffers are kept. The segments are only ever written from, and a buffer that
    // is shared is only read (see `Slices::bytes_mut`).
    unsafe { Segments::new(pieces, Rc::new(buffers)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slices(most: usize, numbers: std::ops::Range<u64>) -> Slices {
        let mut slices = Slices::new(512, most);
        for number in numbers {
            slices.insert(number, Buffer::zeroed(512, 512).unwrap());
        }
        slices
    }

    #[test]
    fn what_has_not_been_used_lately_makes_room_and_what_is_dirty_does_not() {
        let mut slices = slices(4, 0..4);
        slices.bytes_mut(0).unwrap().unwrap()[0] = 1;
        assert!(slices.make_room());
        assert!(slices.contains(0));
        slices.insert(9, Buffer::zeroed(512, 512).unwrap());
        for number in 0..10 {
            let _ = slices.bytes_mut(number).unwrap();
        }
        assert!(!slices.make_room());
        let dirty = slices.take_dirty();
        assert!(!slices.make_room());
        slices.settle(dirty.iter().map(|dirty| dirty.number), true);
        assert!(slices.make_room());
    }

    #[test]
    fn a_change_while_a_slice_is_written_goes_to_a_copy() {
        let mut slices = slices(4, 3..4);
        slices.bytes_mut(3).unwrap().unwrap()[0] = 1;
        let written = slices.take_dirty();
        assert!(!slices.is_dirty());
        slices.bytes_mut(3).unwrap().unwrap()[0] = 2;
        assert_eq!((written[0].number, written[0].bytes[0]), (3, 1));
        assert_eq!(slices.bytes(3).unwrap()[0], 2);
        slices.settle([3], true);
        assert!(slices.is_dirty());
    }

    #[test]
    fn no_more_change_than_there_is_memory_for_though_nothing_can_be_written() {
        let most = 2 * 4 + SPARE as u64;
        let mut slices = slices(4, 0..most + 1);
        for number in 0..most {
            slices.bytes_mut(number).unwrap().unwrap()[0] = 1;
        }
        assert!(slices.bytes_mut(most).is_err());
        assert!(slices.bytes(most).is_some());
        slices.bytes_mut(0).unwrap().unwrap()[0] = 2;
    }

    #[test]
    fn what_could_not_be_written_is_dirty_again() {
        let mut slices = slices(4, 3..4);
        slices.bytes_mut(3).unwrap().unwrap()[0] = 1;
        slices.take_dirty();
        slices.settle([3], false);
        assert_eq!(slices.take_dirty().len(), 1);
    }
}
