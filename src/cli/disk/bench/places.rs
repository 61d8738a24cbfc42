//! Where requests go to.

use std::io;

use formats::Disk;

/// Most pieces of a disk that are told apart; what lies after them all counts as data.
const MOST_PIECES: usize = 1 << 16;

/// The pieces of a disk that requests go to.
#[derive(Clone, Debug)]
pub(super) struct Places {
    /// Offset, length, and the bytes of all pieces before.
    pieces: Vec<(u64, u64, u64)>,
    /// Bytes of the disk.
    size: u64,
    /// Bytes of all pieces.
    total: u64,
    /// Bytes of those that hold data: 0 if the disk has none, and the one piece is all of it.
    data: u64,
}

impl Places {
    /// Where a disk holds data; all of it if it holds none.
    pub(super) async fn of(disk: &dyn Disk) -> io::Result<Places> {
        let size = disk.size();
        let mut places = Places {
            pieces: Vec::new(),
            size,
            total: 0,
            data: 0,
        };
        let mut at = 0;
        while at < size {
            let left = size - at;
            if places.pieces.len() == MOST_PIECES {
                places.add(at, left);
                break;
            }
            let extent = disk.extent(at, left).await?;
            let len = extent.len.clamp(1, left);
            if extent.data {
                places.add(at, len);
            }
            at += len;
        }
        places.data = places.total;
        match places.data {
            0 => Ok(Places {
                data: 0,
                ..Places::all(size)
            }),
            _ => Ok(places),
        }
    }

    /// All of a disk of this size.
    pub(super) fn all(size: u64) -> Places {
        let mut places = Places {
            pieces: Vec::new(),
            size,
            total: 0,
            data: size,
        };
        places.add(0, size);
        places
    }

    fn add(&mut self, at: u64, len: u64) {
        match self.pieces.last_mut() {
            Some((offset, before, _)) if *offset + *before == at => *before += len,
            _ => self.pieces.push((at, len, self.total)),
        }
        self.total += len;
    }

    /// Bytes that hold data.
    pub(super) fn data(&self) -> u64 {
        self.data
    }

    /// Random ones, for requests of `len` bytes, which the disk has; multiples of it.
    pub(super) fn random(&self, len: u64) -> impl Iterator<Item = u64> + use<> {
        let places = self.clone();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        std::iter::from_fn(move || {
            // Marsaglia's xorshift.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            Some(places.request(state % places.total.max(1), len))
        })
    }

    /// One after the other, and again from the start.
    pub(super) fn sequential(&self, len: u64) -> impl Iterator<Item = u64> + use<> {
        let places = self.clone();
        let steps = (places.total / len).max(1);
        (0..steps)
            .cycle()
            .map(move |step| places.request(step * len, len))
    }

    /// Every multiple of `len` once, in an order that leaps far.
    pub(super) fn once(&self, len: u64) -> impl Iterator<Item = u64> + use<> {
        let count = self.size / len;
        let mut step = (count as f64 * 0.381_966) as u64 | 1;
        while common_divisor(step, count) > 1 {
            step += 2;
        }
        (0..count)
            .map(move |at| (u128::from(at) * u128::from(step) % u128::from(count)) as u64 * len)
    }

    /// The request at so many bytes into the data.
    fn request(&self, at: u64, len: u64) -> u64 {
        let next = self.pieces.partition_point(|(.., before)| *before <= at);
        let piece = next.checked_sub(1).and_then(|index| self.pieces.get(index));
        let (offset, _, before) = piece.copied().unwrap_or_default();
        let aligned = (offset + (at - before)) / len * len;
        aligned.min((self.size - len.min(self.size)) / len * len)
    }
}

fn common_divisor(mut one: u64, mut other: u64) -> u64 {
    while other > 0 {
        (one, other) = (other, one % other);
    }
    one
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn some() -> Places {
        let mut places = Places {
            pieces: Vec::new(),
            size: 1 << 20,
            total: 0,
            data: 0,
        };
        places.add(65536, 65536);
        places.add(131072, 4096);
        places.add(524288, 8192);
        places
    }

    #[test]
    fn requests_go_to_every_piece_and_nowhere_else() {
        let places = some();
        assert_eq!(places.pieces.len(), 2);
        let met: HashSet<_> = places.random(4096).take(10_000).collect();
        let data = (16..33).chain(128..130).map(|block| block * 4096);
        assert_eq!(met, data.collect());
    }

    #[test]
    fn what_is_sequential_goes_through_the_pieces_in_order_and_again() {
        let offsets: Vec<_> = some().sequential(4096).take(20).collect();
        assert_eq!(offsets[..2], [65536, 69632]);
        assert_eq!(offsets[16..], [131072, 524288, 528384, 65536]);
    }

    #[test]
    fn a_request_never_reaches_past_the_end() {
        for size in [512, 4096, 5120, 1 << 20, (1 << 20) + 512] {
            let places = Places::all(size);
            for len in [512, 4096, 65536] {
                let mut offsets = places
                    .random(len)
                    .take(500)
                    .chain(places.sequential(len).take(500));
                assert!(
                    len > size || offsets.all(|offset| offset % len == 0 && offset + len <= size),
                    "{size} {len}"
                );
            }
        }
    }

    #[test]
    fn new_places_are_met_once() {
        for size in [4096, 12288, 61440, 1 << 20] {
            let offsets: Vec<_> = Places::all(size).once(4096).collect();
            let met: HashSet<_> = offsets.iter().copied().collect();
            assert_eq!(
                (offsets.len() as u64, met.len() as u64),
                (size / 4096, size / 4096)
            );
            assert!(
                met.iter()
                    .all(|offset| offset % 4096 == 0 && *offset < size)
            );
        }
    }
}
