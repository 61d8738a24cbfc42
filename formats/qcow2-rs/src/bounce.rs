//! Memory that guest data passes through: the crate takes slices, which guest memory is not.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use formats::{Buffer, Segments};

/// O_DIRECT takes chunks that begin at multiples of this.
const ALIGN: usize = 4096;
/// Bytes in all chunks together.
const TOTAL: usize = 8 << 20;
/// The least and the most chunks.
const FEWEST: usize = 8;
const MOST: usize = 128;

/// A fixed number of chunks, each as long as a cluster, allocated once.
pub(crate) struct Bounce {
    /// All chunks, one after the other.
    memory: Segments,
    chunk: usize,
    free: RefCell<Vec<usize>>,
    lent: RefCell<Vec<Weak<Lent>>>,
    waiting: RefCell<Vec<Waker>>,
}

/// A chunk is lent to whoever holds one of these: its user, and every operation of the ring on
/// its memory.
struct Lent {
    bounce: Rc<Bounce>,
    index: usize,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.bounce.free.borrow_mut().push(self.index);
        let waiting = std::mem::take(&mut *self.bounce.waiting.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// A chunk in use.
pub(crate) struct Chunk(Rc<Lent>);

impl Bounce {
    /// Chunks of `chunk` bytes each, a multiple of 4096.
    pub(crate) fn new(chunk: usize) -> io::Result<Rc<Bounce>> {
        let count = (TOTAL / chunk).clamp(FEWEST, MOST);
        let memory = Buffer::zeroed(count * chunk, ALIGN)?;
        Ok(Rc::new(Bounce {
            memory: Segments::from_buffer(memory),
            chunk,
            free: RefCell::new((0..count).rev().collect()),
            lent: RefCell::new((0..count).map(|_| Weak::new()).collect()),
            waiting: RefCell::default(),
        }))
    }

    /// A chunk, as soon as one is free. Whoever holds one waits for nothing but the host.
    pub(crate) async fn take(self: &Rc<Self>) -> Chunk {
        let index = poll_fn(|cx| match self.free.borrow_mut().pop() {
            Some(index) => Poll::Ready(index),
            None => {
                self.waiting.borrow_mut().push(cx.waker().clone());
                Poll::Pending
            }
        })
        .await;
        let lent = Rc::new(Lent {
            bounce: Rc::clone(self),
            index,
        });
        self.lent.borrow_mut()[index] = Rc::downgrade(&lent);
        Chunk(lent)
    }

    fn base(&self) -> *mut u8 {
        let piece = self.memory.iovecs().first();
        piece.map_or(std::ptr::null_mut(), |piece| piece.iov_base.cast())
    }

    /// The `len` bytes at `bytes` as segments, if they lie in a chunk that is lent: then the
    /// kernel may work on them where they are, and keeps the chunk for as long as it does.
    pub(crate) fn segments(&self, bytes: *mut u8, len: usize) -> Option<Segments> {
        let at = bytes.addr().checked_sub(self.base().addr())?;
        let within = at % self.chunk + len <= self.chunk;
        let lent = self.lent.borrow().get(at / self.chunk)?.upgrade();
        let lent = lent.filter(|_| within)?;
        // SAFETY: the bytes lie in a chunk, whose memory is not freed before `lent` is, nor lent
        // again; its user has passed them on for this operation and keeps away until it ends.
        Some(unsafe { Segments::new([(bytes, len)], lent) })
    }
}

impl Chunk {
    /// The first `len` bytes, at most all.
    pub(crate) fn bytes(&mut self, len: usize) -> &mut [u8] {
        let bounce = &self.0.bounce;
        let len = len.min(bounce.chunk);
        let base = bounce.base().wrapping_add(self.0.index * bounce.chunk);
        // SAFETY: initialised memory of this chunk, which nobody else has a reference to: it is
        // lent once at a time, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(base, len) }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    fn take(bounce: &Rc<Bounce>) -> Option<Chunk> {
        match pin!(bounce.take()).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(chunk) => Some(chunk),
            Poll::Pending => None,
        }
    }

    #[test]
    fn chunks_are_lent_once_and_come_back() {
        let bounce = Bounce::new(1 << 20).unwrap();
        let mut chunks: Vec<_> = (0..FEWEST).map(|_| take(&bounce).unwrap()).collect();
        for (value, chunk) in chunks.iter_mut().enumerate() {
            chunk.bytes(1 << 20).fill(value as u8);
        }
        for (value, chunk) in chunks.iter_mut().enumerate() {
            assert!(chunk.bytes(usize::MAX).iter().all(|it| *it == value as u8));
        }
        assert!(take(&bounce).is_none());
        chunks.pop();
        assert!(take(&bounce).is_some());
    }

    #[test]
    fn an_operation_on_a_chunk_keeps_it_from_being_lent_again() {
        let bounce = Bounce::new(1 << 20).unwrap();
        let mut chunks: Vec<_> = (0..FEWEST).map(|_| take(&bounce).unwrap()).collect();
        let bytes = chunks[0].bytes(4096)[512..].as_mut_ptr();
        let operation = bounce.segments(bytes, 512).unwrap();
        chunks.remove(0);
        assert!(take(&bounce).is_none());
        drop(operation);
        assert!(take(&bounce).is_some());
    }

    #[test]
    fn only_memory_of_one_lent_chunk_is_known() {
        let bounce = Bounce::new(4096).unwrap();
        let mut chunk = take(&bounce).unwrap();
        let base = chunk.bytes(4096).as_mut_ptr();
        assert!(bounce.segments(base, 4096).is_some());
        assert!(bounce.segments(base.wrapping_add(1), 4096).is_none());
        assert!(bounce.segments(base.wrapping_add(4096), 1).is_none());
        assert!(bounce.segments(base.wrapping_sub(1), 1).is_none());
        assert!(bounce.segments([0u8; 1].as_mut_ptr(), 1).is_none());
        drop(chunk);
        assert!(bounce.segments(base, 4096).is_none());
    }
}
