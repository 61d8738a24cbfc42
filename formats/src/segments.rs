//! Scattered memory that an I/O operation reads from or writes to.

use std::any::Any;
use std::rc::Rc;

use smallvec::SmallVec;

/// A list of pieces of memory and what keeps them alive.
///
/// Guest memory is shared with the guest, which may change it at any time: its bytes are only
/// ever copied through raw pointers, no reference to them exists.
pub struct Segments {
    iov: SmallVec<[libc::iovec; 4]>,
    len: usize,
    keep: Rc<dyn Any>,
}

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
            if len > 0 {
                segments.iov.push(libc::iovec {
                    iov_base: base.cast(),
                    iov_len: len,
                });
                segments.len += len;
            }
        }
        segments
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
}
