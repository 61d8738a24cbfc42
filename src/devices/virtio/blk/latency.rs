//! How long requests take: from a look at the clock when they are taken to one when the driver is
//! told of them.

use std::time::Instant;

use super::worker::Worker;

/// What a request that succeeded counts as, of those whose time is measured.
#[derive(Clone, Copy, Debug)]
pub(super) enum Measured {
    Read,
    Write,
    Flush,
}

/// A request that was given back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Finished {
    pub(super) taken: Instant,
    pub(super) kind: Measured,
}

impl Worker {
    /// Counts how long the requests took of which the driver is told now: one look at the clock
    /// for all of them.
    pub(super) fn measure(&self) {
        let mut finished = self.finished.borrow_mut();
        if finished.is_empty() {
            return;
        }
        let now = Instant::now();
        let counters = &self.shared.counters;
        for Finished { taken, kind } in finished.drain(..) {
            let histogram = match kind {
                Measured::Read => &counters.read_latency,
                Measured::Write => &counters.write_latency,
                Measured::Flush => &counters.flush_latency,
            };
            histogram.record(now.saturating_duration_since(taken));
        }
    }
}
