use std::fs;
use std::path::Path;

use super::super::entry::OFFSET_MASK;
use super::super::header::{be64, incompatible};
use super::super::testing::{qemu_check, qemu_create, qemu_img, qemu_io};
use super::*;
use crate::testing::{Random, directory};

/// What images are made with: every kind of entry is in each.
const KINDS: &[&str] = &[
    "cluster_size=4k",
    "cluster_size=512,refcount_bits=8",
    "cluster_size=64k,refcount_bits=64",
    "cluster_size=16k,extended_l2=on,compression_type=zstd",
    "cluster_size=4k,compat=v2",
];

/// An image that QEMU made and used: data, zeroes, compressed clusters, an internal snapshot
/// and, where there can be, a bitmap.
fn used(options: &str, path: &Path) -> Vec<u8> {
    let _ = fs::remove_file(path);
    qemu_create(options, path, "1M");
    qemu_io(
        &[
            "write -P 1 0 300k",
            "write -z 320k 64k",
            "discard 64k 64k",
            "write -c -P 4 512k 64k",
        ],
        path,
    );
    qemu_img("snapshot -c one", path);
    if !options.contains("compat=v2") {
        qemu_img("bitmap --add IMAGE b", path);
    }
    qemu_io(&["write -P 2 0 70k", "write -P 3 900k 40k"], path);
    fs::read(path).unwrap()
}

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

/// Where the tables of an image are.
struct Places {
    header: Header,
    refcount_table: usize,
    refcount_block: usize,
    l1: usize,
    l2: usize,
    snapshot_l1: usize,
    /// Of the bitmap's directory.
    bitmaps: Option<usize>,
}

impl Places {
    fn of(image: &[u8]) -> Places {
        let header = Header::parse(&image[..image.len().min(MAX_HEADER)]).unwrap();
        let (refcount_table, l1) = (header.refcount_table_offset, header.l1_table_offset);
        let at = |offset: u64| (be64(image, offset as usize) & OFFSET_MASK) as usize;
        let bitmaps = header.bitmaps.map(|it| it.directory_offset as usize);
        Places {
            refcount_table: refcount_table as usize,
            refcount_block: at(refcount_table),
            l1: l1 as usize,
            l2: at(l1),
            snapshot_l1: at(header.snapshots_offset),
            bitmaps,
            header,
        }
    }

    /// Parts of the metadata, each with its length.
    fn parts(&self) -> Vec<(usize, usize)> {
        let mut parts = vec![
            (self.refcount_table, 16),
            (self.refcount_block, 64),
            (self.l1, self.header.l1_size as usize * 8),
            (self.snapshot_l1, 8),
            (self.l2, 256),
            (self.l2, 512),
        ];
        parts.extend(self.bitmaps.map(|at| (at, 16)));
        parts
    }
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

/// A change to an image: name, where, the 8 bytes that are there then.
type Damage = (&'static str, usize, u64);

/// One of every kind that is told apart.
fn damages(image: &[u8]) -> Vec<Damage> {
    let places = Places::of(image);
    let cluster_size = places.header.cluster_size();
    let word = |at: usize| be64(image, at);
    let (l1, l2) = (places.l1, places.l2);
    let entry = if places.header.has(incompatible::EXTENDED_L2) {
        16
    } else {
        8
    };
    let table = places.refcount_table;
    let tables = (0..places.header.l1_size as usize).map(|index| word(l1 + index * 8));
    let entries = tables.flat_map(|table| {
        let table = (table & OFFSET_MASK) as usize;
        (table..table + cluster_size as usize).step_by(entry)
    });
    // Neither COPIED nor compressed, but somewhere.
    let mut entries = entries.filter(|at| word(*at) >> 62 == 0 && word(*at) & OFFSET_MASK > 0);
    let shared = entries.next().unwrap();
    let end = (image.len() as u64).next_multiple_of(cluster_size);
    let mut damages = vec![
        ("an L1 entry lacks COPIED", l1, word(l1) & !COPIED),
        ("an L1 entry has reserved bits set", l1, word(l1) | 1 << 60),
        (
            "an L1 entry is unaligned",
            l1,
            word(l1) | 1 << 10 & (cluster_size - 1),
        ),
        ("an L1 entry is outside", l1, COPIED | (end + cluster_size)),
        (
            "an L1 entry points to the refcount block",
            l1,
            COPIED | places.refcount_block as u64,
        ),
        ("an L1 entry is gone", l1, 0),
        ("an L2 entry lacks COPIED", l2, word(l2) & !COPIED),
        (
            "an L2 entry has COPIED though it is shared",
            shared,
            word(shared) | COPIED,
        ),
        ("an L2 entry has reserved bits set", l2, word(l2) | 2),
        (
            "an L2 entry is unaligned",
            l2,
            word(l2) | 512 & (cluster_size - 1),
        ),
        (
            "an L2 entry for zeroes is unaligned",
            l2,
            word(l2) | 1 | 512 & (cluster_size - 1),
        ),
        ("an L2 entry is outside", l2, COPIED | 0xff_0000_0000_0000),
        ("an L2 entry is just past the end", l2, COPIED | end),
        ("two L2 entries are one", l2, word(l2 + entry)),
        (
            "an L2 entry points to its own table",
            l2,
            COPIED | l2 as u64,
        ),
        ("an L2 entry points to the L1 table", l2, COPIED | l1 as u64),
        ("an L2 entry is gone", l2, 0),
        (
            "a compressed cluster has COPIED",
            l2,
            3 << 62 | word(l2 + entry) & OFFSET_MASK,
        ),
        (
            "a compressed cluster is past the end",
            l2,
            1 << 62 | (end + cluster_size),
        ),
        (
            "a refcount block is unaligned",
            table,
            word(table) | 512 & (cluster_size - 1),
        ),
        (
            "a refcount block has reserved bits set",
            table,
            word(table) | 4,
        ),
        ("a refcount block is outside", table, end + cluster_size),
        ("a refcount block is past all files", table, 1 << 63),
        ("a refcount block is an L2 table too", table, l2 as u64),
        ("a refcount block is gone", table, 0),
        (
            "a refcount block is there twice",
            table + 8,
            places.refcount_block as u64,
        ),
        ("refcounts are 0", places.refcount_block, 0),
        ("refcounts are too high", places.refcount_block, u64::MAX),
        ("a snapshot's L1 entry is gone", places.snapshot_l1, 0),
        (
            "a snapshot's L1 entry is the active one",
            places.snapshot_l1,
            word(l1),
        ),
        (
            "a snapshot's L1 table is unaligned",
            places.header.snapshots_offset as usize,
            places.snapshot_l1 as u64 | 1 << 8,
        ),
        (
            "a snapshot's L1 table is too large",
            places.header.snapshots_offset as usize + 8,
            word(places.header.snapshots_offset as usize + 8) | 1 << 63,
        ),
    ];
    if entry == 16 {
        damages.extend([
            ("subclusters are data and zero", l2 + 8, u64::MAX),
            ("subclusters without a place", l2 + 62 * 16 + 8, 0xff),
            (
                "a compressed cluster has subclusters",
                l2,
                1 << 62 | word(l2),
            ),
        ]);
    }
    if let Some(directory) = places.bitmaps {
        let table = word(directory) as usize;
        damages.extend([
            ("a bitmap's table is outside", directory, end + cluster_size),
            ("a bitmap's table is elsewhere", directory, l2 as u64),
            ("a bitmap's entry has reserved bits set", table, 4),
            (
                "a bitmap's entry is unaligned",
                table,
                1 << 9 & (cluster_size - 1),
            ),
            ("bitmaps are no longer valid", 88, 0),
        ]);
    }
    damages
}

const COPIED: u64 = 1 << 63;

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
            let found = report.corruptions + report.leaks + report.check_errors;
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

/// Changes one or two words of the metadata.
fn mutate(image: &[u8], random: &mut Random) -> Vec<u8> {
    let parts = Places::of(image).parts();
    let mut bad = image.to_vec();
    for _ in 0..1 + random.below(2) {
        let any = |random: &mut Random| {
            let (at, len) = random.of(&parts);
            at + random.below(len as u64 / 8) as usize * 8
        };
        let at = any(random);
        let value = match random.below(5) {
            0 => random.below(u64::MAX),
            1 => 0,
            2 => be64(image, at) ^ 1 << random.below(64),
            3 => be64(image, at) ^ 1 << random.below(20),
            _ => be64(image, any(random)),
        };
        bad[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    bad
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
