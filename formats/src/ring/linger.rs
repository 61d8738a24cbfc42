//! Waiting without sleeping: a thread that sleeps is woken in several times what a transfer from
//! the page cache takes.

use std::time::{Duration, Instant};

use super::inner::{Backend, Inner};
use super::pool::Pool;

impl Inner {
    /// Submits what is queued, and waits for something to do, for at most `limit`. Returns after
    /// how long there was something: a task, a completion, or what `look` says.
    pub(super) fn linger(
        &self,
        limit: Duration,
        mut look: impl FnMut() -> bool,
    ) -> Option<Duration> {
        if self.has_work() || look() {
            return Some(Duration::ZERO);
        }
        if let Backend::Uring(uring) = &mut *self.backend.borrow_mut() {
            uring.submit_queued();
        }
        if self.has_work() {
            return Some(Duration::ZERO);
        }
        if limit.is_zero() {
            return None;
        }
        let start = Instant::now();
        loop {
            if self.has_work() || look() {
                return Some(start.elapsed());
            }
            if start.elapsed() >= limit {
                return None;
            }
            // Whoever else wants this processor, the one waited for maybe, has it first.
            rustix::thread::sched_yield();
        }
    }

    /// Whether a turn would find something without waiting.
    fn has_work(&self) -> bool {
        let reported = match &mut *self.backend.borrow_mut() {
            Backend::Uring(uring) => uring.has_completions(),
            Backend::Threads(waits) => {
                waits.enter(&self.ready, false, &mut self.done.borrow_mut());
                false
            }
        };
        reported
            || self.ready.any()
            || !self.done.borrow().is_empty()
            || self.pool.borrow().as_ref().is_some_and(Pool::has_results)
    }
}
