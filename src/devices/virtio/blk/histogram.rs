//! How long requests took: a histogram with buckets that grow with what they count.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets a power of two, as a power of two: a percentile is at most a sixteenth too high.
const STEP_BITS: u32 = 4;
const STEPS: usize = 1 << STEP_BITS;
/// Times of 2^40 ns, 18 minutes, and longer are in the last bucket.
const TOP_BITS: u32 = 40;
const BUCKETS: usize = (TOP_BITS - STEP_BITS + 1) as usize * STEPS;

/// Counts times by their length. One thread writes, any may read.
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    /// Nanoseconds.
    max: AtomicU64,
}

/// Times that so many of the requests did not exceed; zeroes if there were none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Percentiles {
    /// Half of them.
    pub p50: Duration,
    /// Nine of ten.
    pub p90: Duration,
    /// Ninety-nine of a hundred.
    pub p99: Duration,
    /// 999 of a thousand.
    pub p999: Duration,
    /// All.
    pub max: Duration,
}

impl Histogram {
    /// Counts a time. There is one writer, so no instruction is a locked one.
    pub fn record(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let bucket = &self.buckets[bucket_of(nanos)];
        bucket.store(
            bucket.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
        if nanos > self.max.load(Ordering::Relaxed) {
            self.max.store(nanos, Ordering::Relaxed);
        }
    }

    /// How long the requests took so far.
    pub fn percentiles(&self) -> Percentiles {
        let mut counts = [0; BUCKETS];
        for (count, bucket) in counts.iter_mut().zip(&self.buckets) {
            *count = bucket.load(Ordering::Relaxed);
        }
        let all: u64 = counts.iter().sum();
        let max = self.max.load(Ordering::Relaxed);
        let at = |thousandths: u64| {
            // As a share of one more than all there can be: no product overflows.
            let rank = (u128::from(all) * u128::from(thousandths)).div_ceil(1000) as u64;
            let mut below = 0;
            let bucket = counts.iter().position(|count| {
                below += count;
                below >= rank.max(1)
            });
            Duration::from_nanos(bucket.map_or(0, top_of).min(max))
        };
        Percentiles {
            p50: at(500),
            p90: at(900),
            p99: at(990),
            p999: at(999),
            max: Duration::from_nanos(max),
        }
    }
}

/// The bucket of a time: below `STEPS` each has its own, above each power of two has `STEPS`.
fn bucket_of(nanos: u64) -> usize {
    let power = nanos.checked_ilog2().unwrap_or(0);
    if power < STEP_BITS {
        return nanos as usize;
    }
    let step = (nanos >> (power - STEP_BITS)) as usize - STEPS;
    let bucket = (power - STEP_BITS + 1) as usize * STEPS + step;
    bucket.min(BUCKETS - 1)
}

/// The longest time of a bucket in nanoseconds.
fn top_of(bucket: usize) -> u64 {
    let (power, step) = (bucket / STEPS, bucket % STEPS);
    match power {
        0 => step as u64,
        _ => (((STEPS + step + 1) as u64) << (power - 1)) - 1,
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            max: AtomicU64::new(0),
        }
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.percentiles().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_has_a_bucket_that_ends_at_most_a_sixteenth_above_it() {
        let powers = (0..u64::BITS).map(|power| 1_u64 << power);
        let times = powers.flat_map(|power| [power - 1, power, power + power / 3]);
        let mut last = 0;
        for nanos in times.filter(|nanos| *nanos < 1 << TOP_BITS) {
            let bucket = bucket_of(nanos);
            let top = top_of(bucket);
            assert!(bucket >= last || nanos < 2, "{nanos}");
            assert!((nanos..=nanos + nanos / 16).contains(&top), "{nanos} {top}");
            last = bucket;
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_of_what_was_counted() {
        let histogram = Histogram::default();
        assert_eq!(histogram.percentiles(), Percentiles::default());
        for micros in 1..=1000 {
            histogram.record(Duration::from_micros(micros));
        }
        let found = histogram.percentiles();
        for (found, micros) in [
            (found.p50, 500),
            (found.p90, 900),
            (found.p99, 990),
            (found.p999, 999),
        ] {
            let exact = Duration::from_micros(micros);
            assert!(found >= exact && found <= exact * 17 / 16, "{found:?}");
        }
        assert_eq!(found.max, Duration::from_millis(1));
    }

    #[test]
    fn one_time_is_every_percentile() {
        let histogram = Histogram::default();
        let hour = Duration::from_secs(3600);
        histogram.record(hour);
        let found = histogram.percentiles();
        assert_eq!((found.p50.as_nanos() + 1).ilog2(), TOP_BITS);
        assert_eq!(found.max, hour);
    }
}
