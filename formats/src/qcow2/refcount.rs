//! Refcounts as they lie in a refcount block (qcow2 specification, "Refcount blocks"): 2 to the
//! power of `order` bits each, big-endian; those smaller than a byte begin at its low bits.

/// The largest refcount of this order.
pub(super) const fn max(order: u32) -> u64 {
    u64::MAX >> (64 - (1 << order))
}

/// Where in the bytes the refcount begins, and by how many bits it is shifted there.
const fn place(order: u32, index: usize) -> (usize, u32) {
    match order {
        0..3 => {
            let in_byte = index & ((8 >> order) - 1);
            (index >> (3 - order), (in_byte << order) as u32)
        }
        _ => (index << (order - 3), 0),
    }
}

/// The refcount at `index`; 0 past the end.
pub(super) fn load(bytes: &[u8], order: u32, index: usize) -> u64 {
    let (at, shift) = place(order, index);
    let len = (1usize << order).div_ceil(8);
    let Some(found) = bytes.get(at..at + len) else {
        return 0;
    };
    let value = found
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte));
    value >> shift & max(order)
}

/// Sets the refcount at `index`, which must be in the bytes, to `value`: at most [`max`].
pub(super) fn store(bytes: &mut [u8], order: u32, index: usize, value: u64) {
    let (at, shift) = place(order, index);
    let len = (1usize << order).div_ceil(8);
    let Some(to) = bytes.get_mut(at..at + len) else {
        return;
    };
    match to {
        [byte] if order < 3 => {
            let mask = (max(order) as u8) << shift;
            *byte = *byte & !mask | (value as u8) << shift & mask;
        }
        to => to.copy_from_slice(&value.to_be_bytes()[8 - len..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_refcounts_begin_at_the_low_bits_of_a_byte() {
        let bytes = [0b1110_0100, 0x21];
        let two_bits: Vec<u64> = (0..6).map(|index| load(&bytes, 1, index)).collect();
        assert_eq!(two_bits, [0, 1, 2, 3, 1, 0]);
        assert_eq!([load(&bytes, 0, 2), load(&bytes, 0, 3)], [1, 0]);
        assert_eq!([load(&bytes, 2, 2), load(&bytes, 2, 3)], [1, 2]);
    }

    #[test]
    fn large_refcounts_are_big_endian() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!(load(&bytes, 3, 1), 2);
        assert_eq!(load(&bytes, 4, 1), 0x0304);
        assert_eq!(load(&bytes, 5, 1), 0x0506_0708);
        assert_eq!(load(&bytes, 6, 0), 0x0102_0304_0506_0708);
        assert_eq!(load(&bytes, 6, 1), 0);
    }

    #[test]
    fn what_is_stored_is_loaded_and_its_neighbours_stay() {
        for order in 0..=6 {
            let mut bytes = [0xff; 64];
            for index in 0..(64 * 8) >> order {
                let mut expected = bytes;
                for value in [0, 1, max(order), max(order) / 2] {
                    store(&mut bytes, order, index, value);
                    assert_eq!(load(&bytes, order, index), value);
                }
                store(&mut bytes, order, index, max(order));
                expected.fill(0xff);
                assert_eq!(bytes, expected);
            }
            store(&mut bytes, order, 64 * 8, 0);
            assert_eq!(bytes, [0xff; 64]);
        }
    }
}
