//! How long the disk's thread looks for more to do before it sleeps.
//!
//! Sleep is ended by an interrupt of another processor, which costs more than most requests take
//! to serve. So the thread looks for a while, as long as that has been worth it: a window that
//! follows from how long it has waited lately, up to a limit. What comes rarely is slept for at
//! once, and so an idle disk costs nothing.

use std::time::{Duration, Instant};

use super::worker::{Serving, Worker};

/// The longest window where the configuration does not say: somewhat more than another processor
/// takes to be woken and to answer.
pub(super) const LONGEST: Duration = Duration::from_micros(50);

/// By how much a window is longer than the waits that it is to cover.
const MARGIN: u32 = 4;

/// How long to look, learned from the waits for the driver.
#[derive(Clone, Copy, Debug)]
pub(super) struct Polling {
    longest: Duration,
    window: Duration,
    /// Windows of the greatest length in a row in which nothing came.
    misses: u32,
    /// Waits for which the thread sleeps at once, because of those.
    rest: u32,
    /// When the thread last came here, requests were in flight, and none was complete.
    waited: bool,
}

/// A wait in which the thread sleeps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sleep {
    /// When the wait began.
    since: Instant,
    /// Whether there was a window before it.
    polled: bool,
}

impl Polling {
    pub(super) fn new(longest: Duration) -> Polling {
        Polling {
            longest,
            window: Duration::ZERO,
            misses: 0,
            rest: 0,
            waited: false,
        }
    }

    /// How long to look before the next sleep; 0 is not at all.
    pub(super) fn window(&self) -> Duration {
        match self.rest {
            0 => self.window,
            _ => Duration::ZERO,
        }
    }

    /// Something came in the window, `after` that long.
    pub(super) fn found(&mut self, after: Duration) {
        if self.is_long(after) {
            // Others had the processor meanwhile, and need it.
            self.window = Duration::ZERO;
        } else if !after.is_zero() {
            self.misses = 0;
            let faded = self.window - self.window / 8;
            self.window = faded.max(after * MARGIN).min(self.longest);
        }
    }

    /// Something came while the thread slept, after a wait of `total`, the window included.
    pub(super) fn slept(&mut self, total: Duration, polled: bool) {
        if self.is_long(total) {
            self.window = Duration::ZERO;
            return;
        }
        if !polled {
            self.rest = self.rest.saturating_sub(1);
        }
        if polled && self.window == self.longest {
            // It comes just too late, again and again: ever fewer windows are spent on it.
            self.misses = (self.misses + 1).min(6);
            self.rest = (1 << self.misses) - 1;
        }
        self.window = (total * MARGIN).max(self.window).min(self.longest);
    }

    /// Whether no window would have covered a wait. Half of one in which the thread has slept may
    /// be what it took to wake it.
    fn is_long(&self, wait: Duration) -> bool {
        wait > self.longest * 2
    }
}

impl Worker {
    /// Looks for more as long as that is likely to be worth it; whether there is. Meanwhile the
    /// driver is not asked for notifications.
    ///
    /// While requests are in flight, and after one that had to be waited for, the thread sleeps at
    /// once: what a disk takes is long, and looking kept a processor busy and made O_DIRECT a
    /// quarter slower, one request at a time.
    pub(super) fn linger(&self, serving: &Serving) -> bool {
        let look = || serving.has_available();
        let polling = &mut self.polling.borrow_mut();
        if self.in_flight.get() > 0 {
            // What the page cache has is complete as soon as it is submitted: that is no wait.
            let more = self.ring.linger(Duration::ZERO, look).is_some();
            polling.waited = !more;
            return more;
        }
        if std::mem::take(&mut polling.waited) {
            return self.ring.linger(Duration::ZERO, look).is_some();
        }
        let (since, window) = (Instant::now(), polling.window());
        let after = self.ring.linger(window, look);
        match after {
            Some(after) => polling.found(after),
            None => self.asleep.set(Some(Sleep {
                since,
                polled: !window.is_zero(),
            })),
        }
        after.is_some()
    }

    /// Something has come.
    pub(super) fn woken(&self, now: Instant) {
        if let Some(sleep) = self.asleep.take() {
            let total = now.saturating_duration_since(sleep.since);
            self.polling.borrow_mut().slept(total, sleep.polled);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    #[test]
    fn nothing_is_polled_for_before_something_has_come_soon() {
        let mut polling = Polling::new(us(50));
        assert!(polling.window().is_zero());
        polling.slept(us(100_000), false);
        polling.slept(us(101), false);
        assert!(polling.window().is_zero());
        polling.slept(us(5), false);
        assert_eq!(polling.window(), us(20));
    }

    #[test]
    fn a_window_covers_waits_up_to_twice_the_limit_for_half_may_be_the_waking() {
        let mut polling = Polling::new(us(50));
        polling.slept(us(100), false);
        assert_eq!(polling.window(), us(50));
    }

    #[test]
    fn a_window_follows_what_it_earns() {
        let mut polling = Polling::new(us(50));
        polling.slept(us(100), false);
        for _ in 0..100 {
            polling.found(us(2));
        }
        let window = polling.window();
        assert!((us(8)..us(9)).contains(&window), "{window:?}");
        polling.found(us(4));
        assert_eq!(polling.window(), us(16));
        polling.found(us(40));
        assert_eq!(polling.window(), us(50));
    }

    #[test]
    fn one_long_wait_ends_it() {
        let mut polling = Polling::new(us(50));
        polling.slept(us(100), false);
        polling.slept(us(101), true);
        assert!(polling.window().is_zero());
    }

    #[test]
    fn a_processor_that_others_need_is_left_to_them() {
        let mut polling = Polling::new(us(50));
        polling.slept(us(100), false);
        polling.found(us(3000));
        assert!(polling.window().is_zero());
    }

    #[test]
    fn what_comes_just_too_late_is_polled_for_ever_more_rarely() {
        let mut polling = Polling::new(us(50));
        let mut spent = 0;
        for _ in 0..6400 {
            let window = polling.window();
            spent += u32::from(!window.is_zero());
            polling.slept(us(90), !window.is_zero());
        }
        assert!((100..=110).contains(&spent), "{spent}");
        // And at once again when it earns.
        polling.rest = 0;
        polling.found(us(30));
        polling.slept(us(90), true);
        assert_eq!(polling.rest, 1);
    }

    #[test]
    fn a_limit_of_zero_is_never() {
        let mut polling = Polling::new(Duration::ZERO);
        for _ in 0..3 {
            polling.slept(Duration::ZERO, false);
            polling.slept(us(1), false);
            assert!(polling.window().is_zero());
        }
    }
}
