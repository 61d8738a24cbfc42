//! Front ends and guests that send what they like to a server: see `launcher::serve_fuzzing`.

#![no_main]

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use launcher::serve_fuzzing::run;
use libfuzzer_sys::fuzz_target;

static SESSIONS: AtomicU64 = AtomicU64::new(0);
static REACHED: AtomicU64 = AtomicU64::new(0);
static SERVED: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);

/// Most files that were open at the first looks.
static FILES: AtomicUsize = AtomicUsize::new(0);

/// How many sessions pass between two looks at the open files, and how many looks are the first.
const LOOKS: u64 = 64;
const FIRST: u64 = 4;

/// Files that come and go without a session.
const OTHERS: usize = 4;

extern "C" fn report() {
    let sessions = SESSIONS.load(Ordering::Relaxed);
    let reached = REACHED.load(Ordering::Relaxed);
    let served = SERVED.load(Ordering::Relaxed);
    let refused = REFUSED.load(Ordering::Relaxed);
    let share = 100.0 * reached as f64 / sessions.max(1) as f64;
    eprintln!(
        "{reached} of {sessions} sessions had requests carried out: {share:.1} %; \
         {served} requests, and {refused} that were refused"
    );
}

/// No session leaves a file open.
fn expect_no_files(sessions: u64) {
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    if sessions <= FIRST * LOOKS {
        FILES.fetch_max(open, Ordering::Relaxed);
    }
    let before = FILES.load(Ordering::Relaxed);
    assert!(
        open <= before + OTHERS,
        "{open} files are open, there were {before}"
    );
}

fuzz_target!(
    init: {
        // SAFETY: `report` only reads atomic variables and writes to standard error.
        unsafe { libc::atexit(report) };
    },
    |data: &[u8]| {
        let tally = run(data);
        let sessions = SESSIONS.fetch_add(tally.sessions, Ordering::Relaxed) + tally.sessions;
        REACHED.fetch_add(u64::from(tally.served > 0), Ordering::Relaxed);
        SERVED.fetch_add(tally.served, Ordering::Relaxed);
        REFUSED.fetch_add(tally.refused, Ordering::Relaxed);
        if sessions % LOOKS == 0 {
            expect_no_files(sessions);
        }
    }
);
