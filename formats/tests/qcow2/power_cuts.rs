//! Power cuts at any time, in any way.

use std::path::Path;

use formats::conformance::{Cuts, Point, power_cuts, seeds};

use super::directory;

/// Runs in the usual suite; `QCOW2_STATES` is the number of states of a longer one.
const STATES: u64 = 500;

fn again(seed: u64) -> String {
    format!("QCOW2_CUT={seed} cargo test -p formats --test qcow2 power_cuts")
}

/// Power cuts of our engine, of so many states a run.
fn cuts(directory: &Path, states: u64) -> Cuts<'_> {
    Cuts {
        format: formats::find("qcow2").expect("the format `qcow2` is registered"),
        directory,
        admit: &Some,
        again: &again,
        sample: 4,
        states,
        barriers: true,
    }
}

/// How many runs there are, and how many states of each.
fn extent() -> (u64, u64) {
    let states = std::env::var("QCOW2_STATES").map_or(STATES, |states| states.parse().unwrap());
    let each = (states / 20).clamp(25, 100);
    (states.div_ceil(each), each)
}

#[test]
fn a_power_cut_leaves_a_valid_image_and_all_that_was_flushed() {
    let directory = directory();
    let (runs, states) = extent();
    let seeds = seeds("QCOW2_CUT", "QCOW2_CUTS", runs).unwrap();
    let cuts = cuts(directory.path(), states);
    match power_cuts(&cuts, &seeds) {
        Ok((count, met)) if seeds.len() > 1 => {
            assert!(count >= states * runs, "{count} states");
            let must = Point::matrix().into_iter().filter(|value| {
                let dimensions = [
                    "version",
                    "extended_l2",
                    "cache_clusters",
                    "snapshots",
                    "data_file",
                ];
                let others = [
                    "lazy_refcounts",
                    "shrinks",
                    "ours",
                    "engine",
                    "compressed no",
                ];
                let mut all = dimensions.iter().chain(&others);
                all.any(|name| value.starts_with(name))
            });
            let small = [
                "cluster_size 512",
                "cluster_size 4096",
                "cluster_size 65536",
            ];
            let missing: Vec<_> = must
                .chain(small.map(String::from))
                .filter(|value| !met.contains(value))
                .collect();
            assert!(missing.is_empty(), "not tested: {missing:?}");
            let below = ["backing raw", "backing qcow2", "backing chain"];
            for name in below {
                assert!(met.iter().any(|value| value.starts_with(name)), "{name}");
            }
        }
        Ok(_) => {}
        Err(failures) => panic!("{failures}\nleft in {}", directory.keep().display()),
    }
}

#[test]
fn a_power_cut_after_every_single_event_leaves_a_valid_image() {
    let directory = directory();
    let cuts = cuts(directory.path(), 0);
    // In the first one commits fall between the steps in which refcount blocks are made.
    if let Err(failures) = power_cuts(&cuts, &[12, 1001]) {
        panic!("{failures}\nleft in {}", directory.keep().display());
    }
}

#[test]
fn without_barriers_a_power_cut_does_harm_and_is_found_out() {
    let directory = directory();
    let (runs, states) = extent();
    let cuts = Cuts {
        barriers: false,
        ..cuts(directory.path(), states)
    };
    // A run of which nothing is found wrong was too short, or had nothing to lose.
    let seeds: Vec<_> = (1..=runs.min(20)).collect();
    let failures = power_cuts(&cuts, &seeds).expect_err("barriers seem to be of no use");
    let lost = failures.matches("expected one of").count();
    assert!(lost > 0, "no loss was found: {failures}");
    // An image that really is corrupt is so to our check and to QEMU's.
    assert!(!failures.contains("the checks disagree"), "{failures}");
    assert!(failures.contains("it is corrupt"), "{failures}");
}
