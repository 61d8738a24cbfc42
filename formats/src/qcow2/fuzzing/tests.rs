//! Spoiled images, many of them.

use std::io::{self, Write};
use std::process::abort;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::super::testing::assert_sound;
use super::{Tally, run, run_sound, save};
use crate::testing::{Random, directory};

/// Longest time for one image.
const LIMIT: Duration = Duration::from_secs(60);

fn random_bytes(random: &mut Random) -> Vec<u8> {
    let len = 16 + random.below(120);
    (0..len).map(|_| random.below(256) as u8).collect()
}

/// Ends everything if one image takes too long.
fn watchdog(current: &Arc<AtomicU64>) {
    let current = Arc::downgrade(current);
    std::thread::spawn(move || {
        let mut before = u64::MAX;
        while let Some(now) = current.upgrade().map(|now| now.load(Ordering::Relaxed)) {
            if now == before {
                // Past the test's own capture of its output.
                let _ = writeln!(io::stderr(), "image {now} is not done after {LIMIT:?}");
                abort();
            }
            before = now;
            std::thread::sleep(LIMIT);
        }
    });
}

fn tally(seeds: std::ops::Range<u64>) -> Tally {
    let current = Arc::new(AtomicU64::new(0));
    watchdog(&current);
    let mut tally = Tally::default();
    for seed in seeds {
        current.store(seed, Ordering::Relaxed);
        let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        eprintln!("image {seed}");
        tally += run(&random_bytes(&mut random));
    }
    tally
}

#[test]
fn what_hostile_images_are_made_of_is_sound_in_itself() {
    let directory = directory();
    for (name, path) in save(directory.path()) {
        eprintln!("{name}");
        assert_sound(&path);
    }
    let mut random = Random::new(7);
    let mut kinds = 0;
    while run_sound(kinds, &[]).is_some() {
        let mut tally = Tally::default();
        for _ in 0..20 {
            tally += run_sound(kinds, &random_bytes(&mut random)).unwrap();
        }
        assert!(tally.judged > 500, "{tally:?}");
        kinds += 1;
    }
    assert!(kinds >= 14);
}

/// Which images, and how many: `HOSTILE_FIRST`, `HOSTILE_IMAGES`. What the fuzzer has found:
/// `HOSTILE_FILE`.
#[test]
fn a_hostile_image_is_refused_or_used_and_does_no_harm() {
    if let Some(path) = std::env::var_os("HOSTILE_FILE") {
        run(&std::fs::read(path).unwrap());
        return;
    }
    let number = |name| std::env::var(name).map(|number| number.parse().unwrap());
    let first = number("HOSTILE_FIRST").unwrap_or(0);
    let tally = tally(first..first + number("HOSTILE_IMAGES").unwrap_or(1500));
    println!("{tally:?}");
    assert!(tally.opened * 2 > tally.images, "too few open: {tally:?}");
    assert!(tally.repaired * 12 > tally.images, "{tally:?}");
    assert!(tally.sound * 3 > tally.repaired, "{tally:?}");
    assert!(tally.requests > tally.failed * 4, "{tally:?}");
    assert!(tally.judged > tally.unjudged * 4, "{tally:?}");
}
