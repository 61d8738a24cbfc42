//! What is transferred, and how, where the device is measured against a plain loop.

use std::time::Duration;

use crate::MIB;

/// What is transferred, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    pub(crate) write: bool,
    pub(crate) random: bool,
    /// Bytes in a request.
    pub(crate) len: usize,
    /// Requests in flight in each virtqueue.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
}

impl Workload {
    /// All of them, for one number of virtqueues.
    pub(crate) fn all(queues: usize) -> impl Iterator<Item = Workload> {
        let work = move |random, write, len, depth| Workload {
            write,
            random,
            len,
            depth,
            queues,
        };
        [1, 32]
            .into_iter()
            .flat_map(move |depth| [false, true].map(|write| work(true, write, 4096, depth)))
            .chain([false, true].map(|write| work(false, write, MIB, 8)))
    }

    /// Its name with the image in some place, for filters too.
    pub(crate) fn name_at(&self, place: &str) -> String {
        format!(
            "{place} {}{} {} qd{} q{}",
            if self.random { "rand" } else { "seq" },
            if self.write { "write" } else { "read" },
            if self.len == MIB { "1m" } else { "4k" },
            self.depth,
            self.queues
        )
    }

    /// What the device must reach, as a share of the plain loop.
    pub(crate) fn bar(&self) -> Option<f64> {
        match (self.random, self.depth) {
            (false, _) => Some(0.95),
            (true, 32) => Some(0.85),
            (true, _) => None,
        }
    }

    /// The offsets of `count` requests; the same for the same seed.
    pub(crate) fn offsets(
        &self,
        seed: u64,
        count: u64,
        image_size: usize,
    ) -> impl Iterator<Item = u64> + use<> {
        let places = (image_size / self.len) as u64;
        let (random, len) = (self.random, self.len as u64);
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..count).map(move |at| {
            if !random {
                return at % places * len;
            }
            // Marsaglia's xorshift.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % places * len
        })
    }

    pub(crate) fn speed(&self, requests: u64, time: Duration) -> f64 {
        let rate = requests as f64 / time.as_secs_f64();
        match self.random {
            true => rate,
            false => rate * self.len as f64 / 1e6,
        }
    }
}
