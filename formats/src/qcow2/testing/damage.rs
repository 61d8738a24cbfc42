//! Images with everything in them, and what can be wrong with them.

use std::fs;
use std::path::Path;

use super::super::Header;
use super::super::entry::{COPIED, OFFSET_MASK};
use super::super::header::{MAX_HEADER, be64, incompatible};
use super::{qemu_create, qemu_img, qemu_io};
use crate::testing::Random;

/// What images are made with: every kind of entry is in each.
pub(in super::super) const KINDS: &[&str] = &[
    "cluster_size=4k",
    "cluster_size=512,refcount_bits=8",
    "cluster_size=64k,refcount_bits=64",
    "cluster_size=16k,extended_l2=on,compression_type=zstd",
    "cluster_size=4k,compat=v2",
];

/// An image that QEMU made and used: data, zeroes, compressed clusters, an internal snapshot
/// and, where there can be, a bitmap.
pub(in super::super) fn used(options: &str, path: &Path) -> Vec<u8> {
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

/// Where the tables of an image are.
pub(in super::super) struct Places {
    pub(in super::super) header: Header,
    pub(in super::super) refcount_table: usize,
    pub(in super::super) refcount_block: usize,
    pub(in super::super) l1: usize,
    pub(in super::super) l2: usize,
    pub(in super::super) snapshot_l1: usize,
    /// Of the bitmap's directory.
    pub(in super::super) bitmaps: Option<usize>,
}

impl Places {
    pub(in super::super) fn of(image: &[u8]) -> Places {
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
    pub(in super::super) fn parts(&self) -> Vec<(usize, usize)> {
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

/// A change to an image: name, where, the 8 bytes that are there then.
pub(in super::super) type Damage = (&'static str, usize, u64);

/// One of every kind that is told apart.
pub(in super::super) fn damages(image: &[u8]) -> Vec<Damage> {
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

/// Changes one or two words of the metadata.
pub(in super::super) fn mutate(image: &[u8], random: &mut Random) -> Vec<u8> {
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
