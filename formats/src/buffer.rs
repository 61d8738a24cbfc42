//! Memory of our own that the kernel reads into or writes from.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// An owned, aligned piece of memory, for metadata and for bouncing what O_DIRECT cannot take
/// where it lies.
#[derive(Debug)]
pub struct Buffer {
    base: NonNull<u8>,
    len: usize,
    layout: Layout,
}

impl Buffer {
    /// `len` zero bytes at an address that is a multiple of `align`, a power of two.
    ///
    /// Fails with [`io::ErrorKind::OutOfMemory`], or `InvalidInput` for an impossible alignment.
    pub fn zeroed(len: usize, align: usize) -> io::Result<Buffer> {
        let layout =
            Layout::from_size_align(len.max(1), align).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        let base = NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Buffer { base, len, layout })
    }

    /// Address of the first byte, for [`crate::Segments`].
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }
}

// SAFETY: a buffer owns its memory alone, and reaches it only as `&self` and `&mut self` allow.
unsafe impl Send for Buffer {}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes of ours. While segments refer to them the buffer is
        // inside their `Rc`, out of reach of safe code.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout, and freed only here.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_zeroed_and_aligned() {
        for (len, align) in [(0, 1), (1, 1), (512, 512), (5000, 4096), (0, 4096)] {
            let mut buffer = Buffer::zeroed(len, align).unwrap();
            assert_eq!(buffer.as_ptr().addr() % align, 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer.fill(1);
            assert_eq!(buffer.len(), len);
        }
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(Buffer::zeroed(1, 3).is_err());
        assert!(Buffer::zeroed(usize::MAX, 1).is_err());
        assert!(Buffer::zeroed(isize::MAX as usize - 4095, 1).is_err());
    }
}
