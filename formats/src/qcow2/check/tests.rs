use std::fs;
use std::path::Path;

use super::super::entry::OFFSET_MASK;
use super::super::header::be64;
use super::super::testing::damage::{KINDS, Places, damages, mutate, used};
use super::super::testing::{qemu_check, qemu_create, qemu_img, qemu_io};
use super::*;
use crate::testing::{Random, directory};

fn check_file(path: &Path) -> Result<Report, CheckError> {
    check(&File::open(path).unwrap(), &mut |_, _| {})
}

/// Our counts, as QEMU says them: but for a few, only those that are not 0.
fn said(report: &Report) -> Vec<(String, u64)> {
    let all = [
        ("allocated-clusters", report.allocated_clusters),
        ("check-errors", report.check_errors),
        ("compressed-clusters", report.compressed_clusters),
        ("corruptions", report.corruptions),
        ("fragmented-clusters", report.fragmented_clusters),
        ("image-end-offset", report.image_end_offset),
        ("leaks", report.leaks),
        ("total-clusters", report.total_clusters),
    ];
    all.into_iter()
        .filter(|(name, count)| *count > 0 || *name == "check-errors")
        .map(|(name, count)| (name.to_owned(), count))
        .collect()
}

fn assert_same_counts(path: &Path, what: &str) -> Report {
    let ours = check_file(path).unwrap_or_else(|error| panic!("{what}: {error}"));
    let theirs: Vec<_> = qemu_check(path).into_iter().collect();
    if theirs.is_empty() {
        // It does not even open the image.
        assert!(!ours.is_clean(), "{what}");
        return ours;
    }
    assert_eq!(said(&ours), theirs, "{what}\n{ours}");
    ours
}

#[test]
fn images_that_qemu_made_and_used_are_clean_and_counted_alike() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for options in KINDS {
        used(options, &path);
        let report = assert_same_counts(&path, options);
        assert!(report.is_clean(), "{options}: {report}");
        assert!(report.compressed_clusters > 0 && report.allocated_clusters > 60 / 64);
        // The bitmaps' clusters were counted, or were no leak.
        qemu_img("snapshot -d one", &path);
        assert!(assert_same_counts(&path, options).is_clean());
    }
}

#[test]
fn images_of_every_refcount_width_are_counted_alike() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        for size in ["512", "4k", "2M"] {
            let _ = fs::remove_file(&path);
            qemu_create(
                &format!("refcount_bits={bits},cluster_size={size}"),
                &path,
                "8M",
            );
            qemu_io(&["write 0 300k", "write 5M 1M"], &path);
            assert!(assert_same_counts(&path, &format!("{bits} {size}")).is_clean());
        }
    }
}

#[test]
fn an_external_data_file_is_not_counted() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let data = directory.path().join("a.data");
    for raw in ["on", "off"] {
        let _ = fs::remove_file(&path);
        let options = format!("data_file={},data_file_raw={raw}", data.display());
        qemu_create(&options, &path, "1M");
        qemu_io(&["write 0 300k", "write -z 64k 64k"], &path);
        assert!(assert_same_counts(&path, raw).is_clean());
        // The flag COPIED is always set there.
        let mut image = fs::read(&path).unwrap();
        let places = Places::of(&image);
        image[places.l2] &= 0x7f;
        image[places.l2 + 8 + 7] |= 2;
        fs::write(&path, &image).unwrap();
        assert_same_counts(&path, raw);
    }
}

#[test]
fn every_kind_of_damage_is_counted_as_qemu_does() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for options in KINDS {
        let image = used(options, &path);
        for (what, at, value) in damages(&image) {
            let mut bad = image.clone();
            bad[at..at + 8].copy_from_slice(&value.to_be_bytes());
            fs::write(&path, &bad).unwrap();
            let what = format!("{options}: {what}");
            let report = assert_same_counts(&path, &what);
            let harmless = what.contains("a snapshot's L1 entry is the active one")
                // Clusters of 512 bytes: no offset is unaligned.
                || options.contains("=512") && what.contains("unaligned");
            assert!(!report.is_clean() || harmless, "{what}: {report}");
            let found = report.corruptions + report.leaks + report.check_errors + report.overlaps;
            assert!(report.problems.len() as u64 <= found);
            assert_eq!(report.problems.is_empty(), report.is_clean());
        }
    }
}

#[test]
fn a_problem_says_where_it_is() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let mut image = used(KINDS[0], &path);
    let places = Places::of(&image);
    image[places.l2 + 6] |= 2;
    fs::write(&path, &image).unwrap();
    let report = check_file(&path).unwrap();
    let entry = be64(&image, places.l2);
    let want = format!(
        "corruption: entry 0 of the L2 table at {:#x}, {entry:#x}, (data) is no cluster's start",
        places.l2
    );
    assert!(report.to_string().contains(&want), "{report}");
}

#[test]
fn random_damage_is_counted_as_qemu_does() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for options in KINDS {
        let image = used(options, &path);
        for seed in 0..60 {
            let bad = mutate(&image, &mut Random::new(seed * 7919 + 13));
            // An L1 entry of flags alone is unallocated for us, and the header for QEMU.
            let places = Places::of(&image);
            let flags_alone = |at: usize| {
                let entry = be64(&bad, at);
                entry != 0 && entry & OFFSET_MASK == 0
            };
            let count = places.header.l1_size as usize;
            let l1s = [places.l1, places.snapshot_l1];
            if l1s
                .iter()
                .any(|l1| (0..count).any(|index| flags_alone(l1 + index * 8)))
            {
                continue;
            }
            fs::write(&path, &bad).unwrap();
            assert_same_counts(&path, &format!("{options}, seed {seed}"));
        }
    }
}

#[test]
fn no_damage_makes_it_panic_or_hang() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for options in KINDS {
        let image = used(options, &path);
        let places = Places::of(&image);
        let mut parts = places.parts();
        parts.extend([(0, 512), (places.header.snapshots_offset as usize, 64)]);
        for seed in 0..400 {
            let mut random = Random::new(seed * 104_729 + 7);
            let mut bad = mutate(&image, &mut random);
            for _ in 0..random.below(8) {
                let (at, len) = random.of(&parts);
                let at = at + random.below(len as u64) as usize;
                let any = random.below(256) as u8;
                bad[at] = random.of(&[0, 1, 0x7f, 0x80, 0xff, any]);
            }
            let short = random.below(bad.len() as u64) as usize;
            let len = random.of(&[bad.len(), bad.len(), short]);
            fs::write(&path, &bad[..len]).unwrap();
            if let Ok(report) = check_file(&path) {
                let _ = report.to_string();
            }
        }
    }
}

#[test]
fn a_file_of_holes_is_checked_at_once() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("cluster_size=2M", &path, "1T");
    let mut image = fs::read(&path).unwrap();
    // Every entry of a large L1 table has its own L2 table, in an enormous hole.
    let places = Places::of(&image);
    image.resize(places.l1 + (4 << 20), 0);
    image[36..40].copy_from_slice(&(512u32 << 10).to_be_bytes());
    for (index, entry) in image[places.l1..].chunks_mut(8).enumerate() {
        entry.copy_from_slice(&((index as u64 + 100) << 21).to_be_bytes());
    }
    fs::write(&path, &image).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(10 << 40).unwrap();
    let start = std::time::Instant::now();
    let report = check_file(&path).unwrap();
    assert!(start.elapsed().as_secs() < 60);
    assert!(report.corruptions > 512 << 10);
}

#[test]
fn what_is_no_image_is_refused() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for contents in [&b""[..], b"QFI\xfb", &[0; 1024]] {
        fs::write(&path, contents).unwrap();
        let error = check_file(&path).unwrap_err();
        assert!(matches!(error, CheckError::Refused(_)), "{error}");
    }
}
