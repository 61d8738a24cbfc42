//! Where vCPU threads wait while their VM is paused, and learn that it stops.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const OPEN: u8 = 0;
const PAUSED: u8 = 1;
const SHUT: u8 = 2;

/// The gate that each vCPU passes before it enters the guest.
///
/// Who shuts it gets the vCPUs out of the guest afterwards, by their signal.
#[derive(Debug)]
pub(crate) struct Gate {
    state: AtomicU8,
    vcpus: usize,
    outside: Mutex<Outside>,
    /// Signalled when the state changes, and when a vCPU is outside the guest.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Outside {
    /// Threads that wait here.
    parked: usize,
    /// Threads at their end.
    gone: usize,
    /// Processor clocks of the threads.
    clocks: Vec<libc::clockid_t>,
}

/// How a vCPU passed the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parked {
    /// At once.
    Not,
    /// After a pause.
    ForAWhile,
    /// Not at all: it stops.
    ForGood,
}

impl Gate {
    /// The gate of so many vCPUs.
    pub(super) fn new(vcpus: usize, paused: bool) -> Gate {
        Gate {
            state: AtomicU8::new(if paused { PAUSED } else { OPEN }),
            vcpus,
            outside: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Every change of the state is complete in itself, so a poisoned lock is taken all the same.
    fn lock(&self) -> MutexGuard<'_, Outside> {
        self.outside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by a vCPU's thread outside the guest: waits while the VM is paused.
    pub(super) fn pass(&self) -> Parked {
        match self.state.load(Ordering::SeqCst) {
            OPEN => return Parked::Not,
            SHUT => return Parked::ForGood,
            _ => {}
        }
        let mut outside = self.lock();
        outside.parked += 1;
        self.changed.notify_all();
        let mut outside = self
            .changed
            .wait_while(outside, |_| self.state.load(Ordering::SeqCst) == PAUSED)
            .unwrap_or_else(PoisonError::into_inner);
        outside.parked -= 1;
        match self.state.load(Ordering::SeqCst) {
            SHUT => Parked::ForGood,
            _ => Parked::ForAWhile,
        }
    }

    /// Called by a vCPU's thread at its end.
    pub(super) fn leave(&self) {
        self.lock().gone += 1;
        self.changed.notify_all();
    }

    pub(super) fn pause(&self) {
        self.change(PAUSED);
    }

    pub(super) fn open(&self) {
        self.change(OPEN);
    }

    pub(super) fn shut(&self) {
        self.change(SHUT);
    }

    fn change(&self, state: u8) {
        // Under the lock: no thread is between its look at the state and its sleep.
        let _outside = self.lock();
        self.state.store(state, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Waits until no vCPU is in the guest, nor in a device on its behalf. False if that takes
    /// longer than `patience`, or the VM is not paused any more.
    pub(crate) fn wait_until_paused(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut outside = self.lock();
        while self.state.load(Ordering::SeqCst) == PAUSED {
            if outside.parked + outside.gone == self.vcpus {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            outside = match self.changed.wait_timeout(outside, left) {
                Ok((outside, _)) => outside,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        false
    }

    /// Gives the processor clocks of the threads, in the order of the vCPUs.
    pub(super) fn set_clocks(&self, clocks: Vec<libc::clockid_t>) {
        self.lock().clocks = clocks;
    }

    /// Processor time that each vCPU's thread has taken; zero for one that has ended.
    pub(crate) fn times(&self) -> Vec<Duration> {
        let outside = self.lock();
        outside.clocks.iter().map(|clock| time(*clock)).collect()
    }
}

fn time(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is valid for a write; a clock whose thread has ended is refused.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Duration::ZERO;
    }
    Duration::new(
        time.tv_sec.try_into().unwrap_or(0),
        time.tv_nsec.try_into().unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Threads that count as a vCPU would run.
    fn counting(gate: &Arc<Gate>, count: usize) -> (Arc<AtomicU64>, Vec<thread::JoinHandle<u32>>) {
        let counter = Arc::new(AtomicU64::new(0));
        let threads = (0..count).map(|_| {
            let (gate, counter) = (Arc::clone(gate), Arc::clone(&counter));
            thread::spawn(move || {
                let mut pauses = 0;
                loop {
                    match gate.pass() {
                        Parked::ForGood => break,
                        Parked::ForAWhile => pauses += 1,
                        Parked::Not => {}
                    }
                    counter.fetch_add(1, Ordering::SeqCst);
                    thread::yield_now();
                }
                gate.leave();
                pauses
            })
        });
        let threads = threads.collect();
        (counter, threads)
    }

    #[test]
    fn nothing_runs_between_the_answer_to_a_pause_and_the_resume() {
        let gate = Arc::new(Gate::new(3, false));
        let (counter, threads) = counting(&gate, 3);
        for _ in 0..20 {
            gate.pause();
            assert!(gate.wait_until_paused(PATIENCE));
            let before = counter.load(Ordering::SeqCst);
            thread::sleep(Duration::from_millis(1));
            assert_eq!(counter.load(Ordering::SeqCst), before);
            gate.open();
        }
        gate.shut();
        for thread in threads {
            assert!(thread.join().unwrap() <= 20);
        }
        assert!(!gate.wait_until_paused(PATIENCE), "it is no pause any more");
    }

    #[test]
    fn what_is_paused_can_be_stopped() {
        let gate = Arc::new(Gate::new(2, true));
        let (counter, threads) = counting(&gate, 2);
        assert!(gate.wait_until_paused(PATIENCE));
        gate.shut();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), 0);
        }
        assert_eq!(counter.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_vcpu_at_its_end_holds_up_no_pause() {
        let gate = Arc::new(Gate::new(1, true));
        assert!(!gate.wait_until_paused(Duration::from_millis(1)));
        gate.leave();
        assert!(gate.wait_until_paused(PATIENCE));
    }
}
