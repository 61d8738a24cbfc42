//! The suite that every engine of the format is put through, on what this one supports.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;

use formats::Format;
use formats::conformance::{Backing, Cuts, DataFile, Fit, Point, Suite};
use formats::conformance::{differential, power_cuts, seeds};
use formats_qcow2_rs as _;
use tempfile::TempDir;

fn format() -> &'static Format {
    formats::find("qcow2-rs").expect("the format is registered")
}

/// A directory on a disk, unlike maybe that for temporary files.
fn directory() -> TempDir {
    let program = std::env::current_exe().unwrap();
    tempfile::tempdir_in(program.parent().unwrap()).unwrap()
}

fn again(test: &str, seed: u64) -> String {
    format!("QCOW2_RS_SEED={seed} cargo test -p formats-qcow2-rs --test conformance {test}")
}

/// The point of those that this engine supports that is the most like another.
fn admit(mut point: Point) -> Option<Point> {
    point.cluster_size = point.cluster_size.clamp(4096, 1 << 20);
    point.extended_l2 = false;
    point.compressed = false;
    point.compression = "zlib";
    point.snapshots = 0;
    point.data_file = DataFile::None;
    point.cache_clusters = 0;
    point.sparse = true;
    point.shrinks = false;
    if matches!(point.refcount_bits, 2 | 4) {
        point.refcount_bits = 8;
    }
    if point.refcount_bits == 1 && point.cluster_size > 256 << 10 {
        point.refcount_bits = 16;
    }
    // A base in the format itself, and no shorter.
    point.backing = match point.backing {
        Backing::None => Backing::None,
        Backing::Qcow2(Fit::Equal) | Backing::Chain(Fit::Equal) => {
            point.size = point.size.next_multiple_of(point.cluster_size);
            Backing::Qcow2(Fit::Equal)
        }
        _ if point.huge => Backing::None,
        _ => Backing::Qcow2(Fit::Longer),
    };
    if point.backing != Backing::None {
        point.version = 3;
        point.preallocation = "off";
    }
    // Its refcount table is not made larger, and its tables are all in memory.
    let table = point.cluster_size / 8 * (point.cluster_size * 8 / u64::from(point.refcount_bits));
    let fits = point.size < table / 2 * point.cluster_size
        && point.size / point.cluster_size * 18 < 48 << 20;
    fits.then_some(point)
}

/// Asserts that each of these values was met, unless only a few seeds were asked for.
fn all_met(met: &BTreeSet<String>, seeds: &[u64], least: usize, values: &[&str]) {
    let missing = values.iter().filter(|value| !met.contains(**value));
    let missing: Vec<_> = missing.collect();
    assert!(seeds.len() < least || missing.is_empty(), "{missing:?}");
}

#[test]
fn differential_runs_agree_with_a_flat_model_and_with_qemu() {
    let directory = directory();
    let seeds = seeds("QCOW2_RS_SEED", "QCOW2_RS_SEEDS", 100).unwrap();
    let suite = Suite {
        format: format(),
        directory: directory.path(),
        admit: &admit,
        again: &|seed| again("differential", seed),
    };
    match differential(&suite, &seeds) {
        Ok(met) => all_met(
            &met,
            &seeds,
            100,
            &[
                "version 2",
                "version 3",
                "cluster_size 4096",
                "cluster_size 65536",
                "cluster_size 1048576",
                "refcount_bits 1",
                "refcount_bits 8",
                "refcount_bits 16",
                "refcount_bits 32",
                "refcount_bits 64",
                "backing none",
                "backing qcow2 Equal",
                "backing qcow2 Longer",
                "ours true",
                "overlap true",
                "in_flight 32",
            ],
        ),
        Err(failures) => {
            let kept = directory.keep();
            panic!("{failures}\nthe images are in {}", kept.display());
        }
    }
}

fn cuts<'a>(
    directory: &'a TempDir,
    again: &'a (dyn Fn(u64) -> String + Sync),
    barriers: bool,
) -> Cuts<'a> {
    Cuts {
        format: format(),
        directory: directory.path(),
        admit: &admit,
        again,
        sample: 4,
        states: 25,
        barriers,
    }
}

fn cut_again(seed: u64) -> String {
    again("power_cut", seed).replace("_SEED", "_CUT")
}

#[test]
fn a_power_cut_leaves_a_valid_image_and_all_that_was_flushed() {
    let directory = directory();
    let seeds = seeds("QCOW2_RS_CUT", "QCOW2_RS_CUTS", 20).unwrap();
    match power_cuts(&cuts(&directory, &cut_again, true), &seeds) {
        Ok((_, met)) => all_met(
            &met,
            &seeds,
            20,
            &[
                "cluster_size 4096",
                "cluster_size 65536",
                "backing none",
                "backing qcow2 Longer",
            ],
        ),
        Err(failures) => panic!("{failures}\nleft in {}", directory.keep().display()),
    }
}

#[test]
fn without_barriers_a_power_cut_does_harm_and_is_found_out() {
    let directory = directory();
    let seeds: Vec<_> = (1..=20).collect();
    let failures = power_cuts(&cuts(&directory, &cut_again, false), &seeds);
    let failures = failures.expect_err("barriers seem to be of no use");
    assert!(failures.contains("expected one of"), "{failures}");
}
