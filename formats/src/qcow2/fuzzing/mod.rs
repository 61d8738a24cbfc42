//! Hostile images: sound ones are spoiled, checked, repaired and used.
//!
//! What comes of it must be a clean error or right data. What is right is found out by a reader
//! of its own (`view`), which takes the spoiled image at its word: where refcounts and references
//! contradict each other, nothing is expected; everywhere else every byte is. What a write to the
//! disk must not change (snapshots, clusters that are not known to be free) is compared as well,
//! as is the number of operations, the memory held, where in the file is written, and that no
//! other file is opened.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, built for a fuzzer too"
)]

mod files;
mod input;
mod mutate;
mod seed;
mod session;
#[cfg(test)]
mod tests;
mod trial;
mod view;

use std::ops::AddAssign;

use self::trial::Bench;

/// What has come of images.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub images: u64,
    /// Those that opened.
    pub opened: u64,
    /// Those that were found to be damaged later.
    pub condemned: u64,
    /// Those that were checked and repaired before they were opened.
    pub repaired: u64,
    /// Those of them that were sound then.
    pub sound: u64,
    pub requests: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Sectors that were compared with what they should hold.
    pub judged: u64,
    /// Sectors of which nothing could be expected.
    pub unjudged: u64,
    /// The most memory that was held, in bytes.
    pub memory: u64,
    /// The most operations on the host for one image.
    pub operations: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.images += other.images;
        self.opened += other.opened;
        self.condemned += other.condemned;
        self.repaired += other.repaired;
        self.sound += other.sound;
        self.requests += other.requests;
        self.failed += other.failed;
        self.judged += other.judged;
        self.unjudged += other.unjudged;
        self.memory = self.memory.max(other.memory);
        self.operations = self.operations.max(other.operations);
    }
}

/// Shows what was done when the test fails.
struct Story(Vec<String>);

impl Drop for Story {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for line in &self.0 {
                eprintln!("{line}");
            }
        }
    }
}

thread_local! {
    static BENCH: Bench = Bench::new();
}

/// Spoils an image and uses it, as `data` says. Panics if it does what it must not.
pub fn run(data: &[u8]) -> Tally {
    BENCH.with(|bench| bench.run(data, true))
}

/// Uses a sound image of each kind, as `data` says: nothing may fail, and everything is judged.
#[cfg(test)]
fn run_sound(kind: usize, data: &[u8]) -> Option<Tally> {
    BENCH.with(|bench| {
        (kind < bench.seeds.len())
            .then(|| bench.run(&[&[kind as u8, 0, 0][..], data].concat(), false))
    })
}

/// Writes the sound images that are one file into a directory.
#[cfg(test)]
fn save(directory: &std::path::Path) -> Vec<(&'static str, std::path::PathBuf)> {
    BENCH.with(|bench| {
        let save = |(at, seed): (usize, &seed::Seed)| {
            let path = directory.join(format!("{at}.qcow2"));
            std::fs::write(&path, &seed.image).unwrap();
            (seed.name, path)
        };
        let alone = |seed: &&seed::Seed| seed.backing.is_none() && seed.data.is_none();
        let seeds = bench.seeds.iter().filter(alone);
        seeds.enumerate().map(save).collect()
    })
}
