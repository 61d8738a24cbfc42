use std::fs;
use std::path::Path;

use super::super::header::{be64, compatible};
use super::super::testing::damage::{KINDS, Places, damages, mutate, used};
use super::super::testing::{assert_same_disk, assert_sound, qemu_check, qemu_create, qemu_io};
use super::*;
use crate::testing::{Random, directory};

fn repair_file(path: &Path, what: Repair) -> Result<Report, CheckError> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    repair(&file, what, &mut |_, _| {})
}

fn repaired(path: &Path, what: Repair) -> Report {
    repair_file(path, what).unwrap_or_else(|error| panic!("{error}"))
}

fn checked(path: &Path) -> Report {
    check(&File::open(path).unwrap(), &mut |_, _| {}).unwrap()
}

/// What is about refcounts alone: after a repair nothing is wrong, and all that was there is.
const REFCOUNTS: &[&str] = &[
    "an L1 entry lacks COPIED",
    "an L2 entry lacks COPIED",
    "an L2 entry has COPIED though it is shared",
    "a refcount block is unaligned",
    "a refcount block has reserved bits set",
    "a refcount block is outside",
    "a refcount block is past all files",
    "a refcount block is an L2 table too",
    "a refcount block is gone",
    "a refcount block is there twice",
    "refcounts are 0",
    "refcounts are too high",
    "bitmaps are no longer valid",
];
/// What changed the disk, but can be lived with.
const CONTENTS: &[&str] = &[
    "an L1 entry is gone",
    "an L2 entry is gone",
    "an L2 entry for zeroes is unaligned",
    "two L2 entries are one",
    "a compressed cluster has COPIED",
    "a snapshot's L1 entry is gone",
    "a snapshot's L1 entry is the active one",
];

#[test]
fn every_kind_of_damage_is_mended_or_left_as_it_is() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let good = directory.path().join("good.qcow2");
    for options in KINDS {
        let image = used(options, &path);
        fs::write(&good, &image).unwrap();
        for (what, at, value) in damages(&image) {
            let mut bad = image.clone();
            bad[at..at + 8].copy_from_slice(&value.to_be_bytes());
            fs::write(&path, &bad).unwrap();
            eprintln!("{options}: {what}");
            let before = checked(&path);
            let after = repaired(&path, Repair::All);
            assert_eq!(checked(&path).corruptions, after.corruptions);
            // Version 2 has no entries for zeroes. With subclusters, what the entry says and what
            // the bitmap says no longer fit each other.
            let torn = what.contains(" L2 entry is gone") || what.contains("compressed");
            let data = what.contains("for zeroes") && options.contains("v2")
                || (torn || what.contains("for zeroes")) && options.contains("extended_l2");
            let mendable = CONTENTS.contains(&what) && !data || REFCOUNTS.contains(&what);
            if mendable || before.is_sound() {
                assert!(after.is_clean(), "{after}");
                assert_sound(&path);
                assert_eq!(after.corruptions_fixed, before.corruptions);
                assert_eq!(after.leaks_fixed, before.leaks);
                qemu_io(&["write -P 9 300k 300k", "read -P 9 300k 300k"], &path);
                assert_sound(&path);
            } else {
                assert!(!after.is_sound(), "{after}");
                assert!(after.corruptions <= before.corruptions);
                let theirs = qemu_check(&path);
                assert!(
                    theirs
                        .get("corruptions")
                        .is_none_or(|it| *it == after.corruptions)
                );
            }
            if REFCOUNTS.contains(&what) {
                fs::write(&path, &bad).unwrap();
                repaired(&path, Repair::All);
                assert_same_disk(&path, &good);
            }
        }
    }
}

#[test]
fn refcounts_are_rebuilt_when_their_table_is_lost() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let good = directory.path().join("good.qcow2");
    for options in KINDS {
        let image = used(options, &path);
        fs::write(&good, &image).unwrap();
        let places = Places::of(&image);
        type Loss<'a> = &'a dyn Fn(&mut Vec<u8>);
        let lost: [Loss<'_>; 5] = [
            &|image| image[48..56].fill(0),
            &|image| image[48..56].fill(0x7f),
            &|image| image[56..60].fill(0),
            &|image| image[places.refcount_table..][..512].fill(0x55),
            &|image| image[48..56].copy_from_slice(&(places.l2 as u64).to_be_bytes()),
        ];
        for lose in lost {
            let mut bad = image.clone();
            lose(&mut bad);
            fs::write(&path, &bad).unwrap();
            assert!(!checked(&path).is_clean());
            let after = repaired(&path, Repair::All);
            assert!(after.is_clean(), "{options}: {after}");
            assert_sound(&path);
            assert_same_disk(&path, &good);
        }
    }
}

#[test]
fn leaks_are_freed_and_nothing_else_is_touched() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for options in KINDS {
        let mut image = used(options, &path);
        let places = Places::of(&image);
        // One entry is gone, another one has a wrong flag.
        image[places.l2..places.l2 + 16].fill(0);
        image[places.l1] ^= 0x80;
        fs::write(&path, &image).unwrap();
        let before = checked(&path);
        assert!(before.leaks > 0 && before.corruptions > 0);
        let after = repaired(&path, Repair::Leaks);
        assert_eq!((after.leaks, after.leaks_fixed), (0, before.leaks));
        assert_eq!(after.corruptions, before.corruptions);
        let now = fs::read(&path).unwrap();
        assert!(now[places.l1..] == image[places.l1..] || places.l1 < places.refcount_block);
        assert_eq!(be64(&now, places.l1), be64(&image, places.l1));
    }
}

#[test]
fn leaks_stay_while_something_leads_nowhere() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for options in KINDS {
        let mut image = used(options, &path);
        let places = Places::of(&image);
        let good = be64(&image, places.l1);
        // The L2 table is where it was, but one bit of the L1 entry has changed.
        image[places.l1 + 2] ^= 1;
        fs::write(&path, &image).unwrap();
        for what in [Repair::Leaks, Repair::All] {
            let before = checked(&path);
            let after = repaired(&path, what);
            assert!(after.leaks > 0 && after.corruptions > 0);
            assert_eq!((after.leaks, after.leaks_fixed), (before.leaks, 0));
        }
        // Without its refcounts too.
        let mut image = fs::read(&path).unwrap();
        image[places.refcount_table..][..8].copy_from_slice(&0x1ffu64.to_be_bytes());
        fs::write(&path, &image).unwrap();
        assert!(repaired(&path, Repair::All).leaks > 0);
        let mut image = fs::read(&path).unwrap();
        image[places.l1..][..8].copy_from_slice(&good.to_be_bytes());
        fs::write(&path, &image).unwrap();
        assert!(repaired(&path, Repair::All).corruptions == 0);
        used(options, &directory.path().join("good.qcow2"));
        assert_same_disk(&path, &directory.path().join("good.qcow2"));
    }
}

#[test]
fn an_image_is_marked_as_sound_once_it_is() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let mut image = used(KINDS[0], &path);
    let places = Places::of(&image);
    let bits = |path: &Path| be64(&fs::read(path).unwrap(), 72);
    let wrong = incompatible::DIRTY | incompatible::CORRUPT;
    image[72..80].copy_from_slice(&wrong.to_be_bytes());
    fs::write(&path, &image).unwrap();
    assert!(repaired(&path, Repair::Leaks).is_clean());
    assert_eq!(bits(&path), 0);
    // An entry that leads nowhere cannot be mended.
    image[places.l2 + 1] |= 0x10;
    fs::write(&path, &image).unwrap();
    assert!(repaired(&path, Repair::All).corruptions > 0);
    assert_eq!(bits(&path), wrong);
}

#[test]
fn an_image_with_lazy_refcounts_is_counted_after_a_crash() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("lazy_refcounts=on", &path, "8M");
    let crashed = std::process::Command::new("qemu-io")
        .args([
            "-f",
            "qcow2",
            "-c",
            "write -P 1 0 1M",
            "-c",
            "write -P 2 3M 1M",
        ])
        .args(["-c", "flush", "-c", "abort"])
        .arg(&path)
        .current_dir(directory.path())
        .output()
        .unwrap();
    assert!(!crashed.status.success());
    let before = checked(&path);
    assert!(before.corruptions >= 32, "{before}");
    assert_eq!(
        be64(&fs::read(&path).unwrap(), 80),
        compatible::LAZY_REFCOUNTS
    );
    assert!(repaired(&path, Repair::All).is_clean());
    assert_eq!(be64(&fs::read(&path).unwrap(), 72), 0);
    assert_sound(&path);
    qemu_io(
        &["read -P 1 0 1M", "read -P 2 3M 1M", "read -P 0 4M 4M"],
        &path,
    );
}

#[test]
fn bits_of_others_do_not_survive_a_repair() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let mut image = used(KINDS[0], &path);
    let places = Places::of(&image);
    image[88..96].copy_from_slice(&(1u64 << 40 | autoclear::BITMAPS).to_be_bytes());
    fs::write(&path, &image).unwrap();
    repaired(&path, Repair::All);
    assert_eq!(
        be64(&fs::read(&path).unwrap(), 88),
        1 << 40 | autoclear::BITMAPS
    );
    image[places.l1] ^= 0x80;
    fs::write(&path, &image).unwrap();
    assert!(repaired(&path, Repair::All).is_clean());
    assert_eq!(be64(&fs::read(&path).unwrap(), 88), autoclear::BITMAPS);
}

#[test]
fn a_power_cut_amid_a_repair_makes_nothing_worse() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let good = directory.path().join("good.qcow2");
    for options in KINDS {
        let image = used(options, &path);
        fs::write(&good, &image).unwrap();
        for (what, at, value) in damages(&image) {
            if !REFCOUNTS.contains(&what) {
                continue;
            }
            let mut bad = image.clone();
            bad[at..at + 8].copy_from_slice(&value.to_be_bytes());
            fs::write(&path, &bad).unwrap();
            let before = checked(&path);
            let mut writes = 0;
            loop {
                fs::write(&path, &bad).unwrap();
                write::LEFT.set(writes);
                let result = repair_file(&path, Repair::All);
                write::LEFT.set(u64::MAX);
                let now = checked(&path);
                assert!(
                    now.corruptions <= before.corruptions,
                    "{what}, {writes}: {now}"
                );
                // The file has become longer maybe: there is more that cannot be counted.
                assert!(now.check_errors == 0 || before.check_errors > 0);
                if result.is_ok() {
                    assert!(now.is_clean());
                    break;
                }
                assert!(repaired(&path, Repair::All).is_clean());
                assert_same_disk(&path, &good);
                writes += 1;
            }
            assert!(writes > 0 || before.is_clean(), "{what}");
        }
    }
}

#[test]
fn no_damage_makes_it_panic_or_worse() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for options in KINDS {
        let image = used(options, &path);
        for seed in 0..100 {
            let bad = mutate(&image, &mut Random::new(seed * 31_337 + 5));
            fs::write(&path, &bad).unwrap();
            let before = checked(&path);
            if let Ok(after) = repair_file(&path, Repair::All) {
                assert!(after.corruptions <= before.corruptions, "{before}\n{after}");
                let again = repaired(&path, Repair::All);
                assert_eq!(again.corruptions, after.corruptions, "{options} {seed}");
            }
        }
    }
}
