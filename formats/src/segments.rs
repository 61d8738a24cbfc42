//! Scattered memory that an I/O operation reads from or writes to.

use std::any::Any;
use std::fmt;
use std::rc::Rc;

use smallvec::SmallVec;

use crate::Buffer;

/// A list of pieces of memory and what keeps them alive.
///
/// Guest memory is shared with the guest, which may change it at any time: its bytes are only
/// ever copied through raw pointers, no reference to them exists.
#[derive(Clone)]
pub struct Segments {
    iov: SmallVec<[libc::iovec; 4]>,
    len: usize,
    keep: Rc<dyn Any>,
}

/// A buffer that segments refer to: private, so that nobody reaches its bytes through
/// [`Segments::keep`] while the kernel writes them.
struct Kept(Buffer);

impl Segments {
    /// Segments over memory that `keep` keeps mapped. Empty pieces are left out.
    ///
    /// # Safety
    ///
    /// Every piece is readable and writable memory (for a segment that is only written from:
    /// readable) for as long as `keep` or a clone of it lives, and nothing but raw copies, the
    /// kernel or a guest accesses it meanwhile.
    pub unsafe fn new(
        pieces: impl IntoIterator<Item = (*mut u8, usize)>,
        keep: Rc<dyn Any>,
    ) -> Self {
        let mut segments = Segments {
            iov: SmallVec::new(),
            len: 0,
            keep,
        };
        for (base, len) in pieces {
            segments.push(base.cast(), len);
        }
        segments
    }

    /// Segments over a whole buffer; [`Segments::into_buffer`] gives it back.
    pub fn from_buffer(buffer: Buffer) -> Self {
        let (base, len) = (buffer.as_ptr(), buffer.len());
        let mut segments = Segments {
            iov: SmallVec::new(),
            len: 0,
            keep: Rc::new(Kept(buffer)),
        };
        segments.push(base.cast(), len);
        segments
    }

    /// The buffer that [`Segments::from_buffer`] took, once no clone, slice or operation in
    /// flight refers to it any more.
    pub fn into_buffer(self) -> Option<Buffer> {
        let kept = self.keep.downcast::<Kept>().ok()?;
        Rc::try_unwrap(kept).ok().map(|Kept(buffer)| buffer)
    }

    fn push(&mut self, base: *mut libc::c_void, len: usize) {
        if len > 0 {
            self.iov.push(libc::iovec {
                iov_base: base,
                iov_len: len,
            });
            self.len += len;
        }
    }

    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is not a byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, in the form that `preadv(2)` and io_uring take.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iov
    }

    /// What keeps the memory alive.
    pub fn keep(&self) -> Rc<dyn Any> {
        Rc::clone(&self.keep)
    }

    /// The pieces of several, one after the other.
    pub fn chain(parts: impl IntoIterator<Item = Segments>) -> Segments {
        let mut parts = parts.into_iter();
        let Some(mut all) = parts.next() else {
            return Segments::from_pieces(Rc::new(()));
        };
        for part in parts {
            for piece in &part.iov {
                all.push(piece.iov_base, piece.iov_len);
            }
            all.keep = Rc::new((all.keep, part.keep));
        }
        all
    }

    fn from_pieces(keep: Rc<dyn Any>) -> Segments {
        Segments {
            iov: SmallVec::new(),
            len: 0,
            keep,
        }
    }

    /// Takes the first `len` bytes away, at most all.
    pub fn split_to(&mut self, len: usize) -> Segments {
        let front = self.slice(0, len);
        self.advance(len);
        front
    }

    /// Drops the first `len` bytes, at most all.
    pub fn advance(&mut self, len: usize) {
        let mut left = len.min(self.len);
        self.len -= left;
        let mut gone = 0;
        for piece in &mut self.iov {
            if left < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(left);
                piece.iov_len -= left;
                break;
            }
            left -= piece.iov_len;
            gone += 1;
        }
        if gone > 0 {
            self.iov.drain(..gone);
        }
    }

    /// The `len` bytes at `offset`, cut off at the end.
    pub fn slice(&self, offset: usize, len: usize) -> Segments {
        let mut slice = Segments {
            iov: SmallVec::new(),
            len: 0,
            keep: self.keep(),
        };
        let (mut skip, mut left) = (offset, len);
        for piece in &self.iov {
            if left == 0 {
                break;
            }
            let start = skip.min(piece.iov_len);
            skip -= start;
            let take = left.min(piece.iov_len - start);
            left -= take;
            slice.push(piece.iov_base.wrapping_byte_add(start), take);
        }
        slice
    }

    /// Copies the first bytes into `to`; returns how many: the shorter of the two lengths.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.iov {
            let len = piece.iov_len.min(to.len() - done);
            // SAFETY: `piece` is mapped (promised to `new`), `to` has `len` bytes left, and the
            // two do not overlap, for nobody has a reference into a piece. A guest that writes
            // meanwhile only makes the copied bytes arbitrary.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    piece.iov_base.cast(),
                    to.as_mut_ptr().add(done),
                    len,
                );
            }
            done += len;
        }
        done
    }

    /// Copies `from` into the first bytes; returns how many: the shorter of the two lengths.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in &self.iov {
            let len = piece.iov_len.min(from.len() - done);
            // SAFETY: as in `copy_to`, the other way round.
            unsafe {
                std::ptr::copy_nonoverlapping(from.as_ptr().add(done), piece.iov_base.cast(), len);
            }
            done += len;
        }
        done
    }

    /// Copies `from` into the first bytes; returns how many: the shorter of the two lengths. If
    /// the two overlap, what the overlap holds afterwards is undefined.
    pub fn copy_segments(&self, from: &Segments) -> usize {
        let len = self.len.min(from.len);
        let (mut to, mut from) = (Cursor::new(self), Cursor::new(from));
        let mut done = 0;
        while done < len {
            let count = to.left().min(from.left()).min(len - done);
            // SAFETY: as in `copy_to`, for both sides: each has `count` bytes left in its piece.
            unsafe { std::ptr::copy(from.base(), to.base(), count) };
            to.advance(count);
            from.advance(count);
            done += count;
        }
        done
    }

    /// Sets every byte to `value`.
    pub fn fill(&self, value: u8) {
        for piece in &self.iov {
            // SAFETY: `piece` is mapped and writable (promised to `new`).
            unsafe { std::ptr::write_bytes(piece.iov_base.cast::<u8>(), value, piece.iov_len) };
        }
    }

    /// Whether the address of every piece is a multiple of `memory` and its length one of `len`.
    pub fn is_aligned(&self, memory: usize, len: usize) -> bool {
        self.iov.iter().all(|piece| {
            piece.iov_base.addr().is_multiple_of(memory) && piece.iov_len.is_multiple_of(len)
        })
    }
}

/// A place in segments, at the start of or inside a piece.
struct Cursor<'a> {
    pieces: &'a [libc::iovec],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn new(segments: &'a Segments) -> Self {
        Cursor {
            pieces: &segments.iov,
            at: 0,
        }
    }

    /// Bytes to the end of the piece.
    fn left(&self) -> usize {
        self.pieces
            .first()
            .map_or(0, |piece| piece.iov_len - self.at)
    }

    fn base(&self) -> *mut u8 {
        let base = self.pieces.first().map(|piece| piece.iov_base.cast::<u8>());
        base.map_or(std::ptr::null_mut(), |base| base.wrapping_add(self.at))
    }

    /// Goes on by no more than what is left of the piece.
    fn advance(&mut self, len: usize) {
        self.at += len;
        if self.left() == 0 {
            self.pieces = self.pieces.split_first().map_or(&[], |(_, rest)| rest);
            self.at = 0;
        }
    }
}

impl fmt::Debug for Segments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Segments({} bytes in {})", self.len, self.iov.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Segments over `lens` bytes each, taken from one buffer that holds 0, 1, 2, ….
    fn counting(lens: &[usize]) -> Segments {
        let total = lens.iter().sum();
        let mut buffer = Buffer::zeroed(total, 1).unwrap();
        for (i, byte) in buffer.iter_mut().enumerate() {
            *byte = i as u8;
        }
        let base = buffer.as_ptr();
        let mut at = 0;
        let pieces: Vec<_> = lens
            .iter()
            .map(|len| {
                at += len;
                (base.wrapping_add(at - len), *len)
            })
            .collect();
        // SAFETY: the pieces lie within the buffer, which is kept.
        unsafe { Segments::new(pieces, Rc::new(buffer)) }
    }

    fn bytes(segments: &Segments) -> Vec<u8> {
        let mut all = vec![0; segments.len()];
        assert_eq!(segments.copy_to(&mut all), all.len());
        all
    }

    #[test]
    fn empty_pieces_are_left_out() {
        let segments = counting(&[0, 3, 0, 2]);
        assert_eq!(segments.iovecs().len(), 2);
        assert_eq!(bytes(&segments), [0, 1, 2, 3, 4]);
        assert!(counting(&[0]).is_empty());
    }

    #[test]
    fn slice_is_cut_off_at_the_end() {
        let segments = counting(&[3, 3, 3]);
        for offset in 0..12 {
            for len in 0..12 {
                let want: Vec<u8> = (0..9).skip(offset).take(len).collect();
                let slice = segments.slice(offset, len);
                assert_eq!(bytes(&slice), want);
                assert!(slice.iovecs().iter().all(|piece| piece.iov_len > 0));
            }
        }
    }

    #[test]
    fn split_to_takes_the_front_and_leaves_the_rest() {
        for len in 0..12 {
            let mut rest = counting(&[3, 3, 3]);
            let front = rest.split_to(len);
            assert_eq!(bytes(&front), (0..9).take(len).collect::<Vec<u8>>());
            assert_eq!(bytes(&rest), (0..9).skip(len).collect::<Vec<u8>>());
            assert_eq!(front.len() + rest.len(), 9);
        }
    }

    #[test]
    fn copies_stop_at_the_shorter_end() {
        let segments = counting(&[2, 2]);
        assert_eq!(segments.copy_from(&[9; 3]), 3);
        assert_eq!(bytes(&segments), [9, 9, 9, 3]);
        assert_eq!(segments.copy_from(&[7; 9]), 4);
        assert_eq!(segments.copy_to(&mut [0; 2]), 2);
        segments.fill(0);
        assert_eq!(bytes(&segments), [0; 4]);
    }

    #[test]
    fn segments_are_copied_across_the_borders_of_their_pieces() {
        for (to, from) in [
            (&[1, 2, 3][..], &[3, 2, 1][..]),
            (&[6], &[2, 2, 2]),
            (&[2, 2], &[9]),
            (&[9], &[4]),
            (&[], &[4]),
        ] {
            let (to, from) = (counting(to), counting(from));
            to.fill(99);
            let want = to.len().min(from.len());
            assert_eq!(to.copy_segments(&from), want);
            assert_eq!(bytes(&to)[..want], bytes(&from)[..want]);
            assert!(bytes(&to)[want..].iter().all(|byte| *byte == 99));
        }
    }

    #[test]
    fn a_buffer_comes_back_when_nothing_else_holds_it() {
        let segments = Segments::from_buffer(Buffer::zeroed(8, 8).unwrap());
        segments.slice(4, 1).fill(5);
        let held = segments.slice(0, 1);
        assert!(segments.clone().into_buffer().is_none());
        drop(held);
        assert_eq!(*segments.into_buffer().unwrap(), [0, 0, 0, 0, 5, 0, 0, 0]);
    }

    #[test]
    fn alignment_is_checked_for_address_and_length_of_each_piece() {
        let segments = Segments::from_buffer(Buffer::zeroed(8192, 4096).unwrap());
        assert!(segments.is_aligned(4096, 8192));
        assert!(segments.slice(512, 1024).is_aligned(512, 512));
        assert!(!segments.slice(512, 1024).is_aligned(4096, 512));
        assert!(!segments.slice(0, 1000).is_aligned(512, 512));
    }
}
