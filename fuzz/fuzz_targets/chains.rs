//! Chain → request → image: see `launcher::devices::virtio::blk::fuzzing`.

#![no_main]

use std::sync::atomic::{AtomicU64, Ordering};

use launcher::devices::virtio::blk::fuzzing::run;
use libfuzzer_sys::fuzz_target;

static REQUESTS: AtomicU64 = AtomicU64::new(0);
static REACHED: AtomicU64 = AtomicU64::new(0);

extern "C" fn report() {
    let requests = REQUESTS.load(Ordering::Relaxed);
    let reached = REACHED.load(Ordering::Relaxed);
    let share = 100.0 * reached as f64 / requests.max(1) as f64;
    eprintln!("{reached} of {requests} requests reached the backend: {share:.1} %");
}

fuzz_target!(
    init: {
        // SAFETY: `report` only reads atomic variables and writes to standard error.
        unsafe { libc::atexit(report) };
    },
    |data: &[u8]| {
        let tally = run(data);
        REQUESTS.fetch_add(tally.requests, Ordering::Relaxed);
        REACHED.fetch_add(tally.reached, Ordering::Relaxed);
    }
);
