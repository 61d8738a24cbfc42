//! Which operations may still use what they looked up a while ago.
//!
//! A cluster that the guest no longer refers to may be read or written by a request that found
//! it before. Each request belongs to the epoch in which it began, and a cluster that was
//! unlinked in one epoch is handed out again when no request of that epoch, or an older one, is
//! in flight: requests themselves wait for nothing.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// The epochs in which a request in flight began.
pub(super) struct Epochs {
    /// Requests in flight of each epoch; the last is the current one.
    counts: RefCell<VecDeque<u32>>,
    /// The number of the first one.
    first: Cell<u64>,
    /// Those that wait for epochs to be over.
    waiting: RefCell<Vec<Waker>>,
}

/// A request in flight.
pub(super) struct InFlight<'a> {
    epochs: &'a Epochs,
    epoch: u64,
}

impl Default for Epochs {
    fn default() -> Self {
        Epochs {
            counts: RefCell::new(VecDeque::from([0])),
            first: Cell::new(0),
            waiting: RefCell::default(),
        }
    }
}

impl Epochs {
    /// Begins a request.
    pub(super) fn enter(&self) -> InFlight<'_> {
        let mut counts = self.counts.borrow_mut();
        let last = counts.len() - 1;
        counts[last] += 1;
        InFlight {
            epochs: self,
            epoch: self.first.get() + last as u64,
        }
    }

    /// Begins a new epoch; returns the one that ends.
    pub(super) fn advance(&self) -> u64 {
        let mut counts = self.counts.borrow_mut();
        let ended = self.first.get() + counts.len() as u64 - 1;
        counts.push_back(0);
        drop(counts);
        self.forget();
        ended
    }

    /// Whether all requests that began in `epoch` or before have come to their end.
    pub(super) fn is_over(&self, epoch: u64) -> bool {
        epoch < self.first.get()
    }

    /// Waits until all requests that began in `epoch` or before have come to their end.
    pub(super) async fn over(&self, epoch: u64) {
        poll_fn(|cx| match self.is_over(epoch) {
            true => Poll::Ready(()),
            false => {
                self.waiting.borrow_mut().push(cx.waker().clone());
                Poll::Pending
            }
        })
        .await;
    }

    /// Forgets the oldest epochs, as far as they are over.
    fn forget(&self) {
        let mut counts = self.counts.borrow_mut();
        while counts.len() > 1 && counts.front() == Some(&0) {
            counts.pop_front();
            self.first.set(self.first.get() + 1);
            self.waiting.take().into_iter().for_each(Waker::wake);
        }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let at = (self.epoch - self.epochs.first.get()) as usize;
        let left = {
            let mut counts = self.epochs.counts.borrow_mut();
            counts[at] -= 1;
            counts[at]
        };
        if at == 0 && left == 0 {
            self.epochs.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_over_when_its_requests_and_all_older_ones_are() {
        let epochs = Epochs::default();
        let oldest = epochs.enter();
        let first = epochs.advance();
        let younger = epochs.enter();
        let second = epochs.advance();
        drop(younger);
        assert!(!epochs.is_over(first));
        assert!(!epochs.is_over(second));
        drop(oldest);
        assert!(epochs.is_over(first));
        assert!(epochs.is_over(second));
    }

    #[test]
    fn the_current_epoch_is_never_over() {
        let epochs = Epochs::default();
        drop(epochs.enter());
        assert!(!epochs.is_over(0));
        assert_eq!(epochs.advance(), 0);
        assert!(epochs.is_over(0));
    }
}
