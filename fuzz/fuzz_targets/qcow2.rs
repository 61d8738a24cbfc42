//! Hostile images: see `formats::qcow2::fuzzing`.

#![no_main]

use std::sync::Mutex;

use formats::Counting;
use formats::qcow2::fuzzing::{Tally, run};
use libfuzzer_sys::fuzz_target;

#[global_allocator]
static COUNTING: Counting = Counting;

static TALLY: Mutex<Option<Tally>> = Mutex::new(None);

extern "C" fn report() {
    if let Ok(tally) = TALLY.lock() {
        eprintln!("{:?}", tally.unwrap_or_default());
    }
}

fuzz_target!(
    init: {
        // SAFETY: `report` only reads the tally and writes to standard error.
        unsafe { libc::atexit(report) };
    },
    |data: &[u8]| {
        let tally = run(data);
        if let Ok(mut all) = TALLY.lock() {
            *all.get_or_insert_default() += tally;
        }
    }
);
