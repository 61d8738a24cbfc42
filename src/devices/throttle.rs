//! A limit on log messages that a guest or a failing host disk can cause.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A token bucket for log messages: a few at once, then one a second. Without it a guest could
/// fill the host's disk with our own log.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    tokens: u32,
    refilled: Option<Instant>,
    held_back: u64,
}

impl Default for Bucket {
    fn default() -> Self {
        Bucket {
            tokens: Throttle::BURST,
            refilled: None,
            held_back: 0,
        }
    }
}

impl Throttle {
    /// Messages that pass at once.
    const BURST: u32 = 8;
    /// Time after which one more passes.
    const REFILL: Duration = Duration::from_secs(1);

    /// Whether a message may be logged now; then how many were held back since the last one that
    /// was, to be logged with it.
    pub(crate) fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let refilled = *bucket.refilled.get_or_insert(now);
        let refills = now.saturating_duration_since(refilled).as_secs() / Self::REFILL.as_secs();
        if refills > 0 {
            let refills = u32::try_from(refills).unwrap_or(u32::MAX);
            bucket.tokens = bucket.tokens.saturating_add(refills).min(Self::BURST);
            bucket.refilled = Some(now);
        }
        if bucket.tokens == 0 {
            bucket.held_back += 1;
            return None;
        }
        bucket.tokens -= 1;
        Some(std::mem::take(&mut bucket.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_one_a_second_that_tells_what_was_held_back() {
        let throttle = Throttle::default();
        let start = Instant::now();
        for _ in 0..Throttle::BURST {
            assert_eq!(throttle.pass_at(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(throttle.pass_at(start), None);
        }
        let later = start + Throttle::REFILL;
        assert_eq!(throttle.pass_at(later), Some(1000));
        assert_eq!(throttle.pass_at(later), None);
        let much_later = start + 1000 * Throttle::REFILL;
        assert_eq!(throttle.pass_at(much_later), Some(1));
        for _ in 1..Throttle::BURST {
            assert_eq!(throttle.pass_at(much_later), Some(0));
        }
        assert_eq!(throttle.pass_at(much_later), None);
    }
}
