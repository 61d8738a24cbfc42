//! Sound images to begin with, of each kind, and where everything is in them.

use std::collections::BTreeMap;

use super::super::Compression;
use super::super::compressed::Encoder;
use super::super::refcount;
use super::files::Names;

const COPIED: u64 = 1 << 63;
/// Clusters of the disk that are described in the first L2 table.
const DESCRIBED: u64 = 26;

/// What a number of an image is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Header,
    Extensions,
    L1,
    L2,
    RefcountTable,
    Refcounts,
    Snapshots,
    SnapshotL1,
    SnapshotL2,
    Compressed,
}

/// A number in an image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number {
    pub(super) offset: u64,
    /// Length in bytes: 1, 2, 4 or 8.
    pub(super) width: usize,
}

/// A sound image.
#[derive(Clone, Debug, Default)]
pub(super) struct Seed {
    pub(super) name: &'static str,
    pub(super) image: Vec<u8>,
    pub(super) cluster_bits: u32,
    pub(super) numbers: BTreeMap<Part, Vec<Number>>,
    /// Where structures and data begin.
    pub(super) places: Vec<u64>,
    pub(super) backing: Option<Backing>,
    /// The external data file.
    pub(super) data: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
pub(super) enum Backing {
    Raw(Vec<u8>),
    Qcow2(Box<Seed>),
}

struct Recipe {
    name: &'static str,
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    extended: bool,
    compression: Option<Compression>,
    snapshots: bool,
    external: bool,
    backing: Option<Backing>,
}

const PLAIN: Recipe = Recipe {
    name: "version 3",
    version: 3,
    cluster_bits: 12,
    refcount_order: 4,
    extended: false,
    compression: None,
    snapshots: false,
    external: false,
    backing: None,
};

/// All seeds; the names stand in their headers.
pub(super) fn seeds(names: &Names) -> Vec<Seed> {
    let base = Recipe {
        name: "backing file",
        refcount_order: 3,
        ..PLAIN
    };
    let base = Backing::Qcow2(Box::new(base.build(names, 0xba)));
    let raw = (0..40 * 8).flat_map(|sector| stamp(0xba, sector)).collect();
    let recipes = [
        PLAIN,
        Recipe {
            name: "version 2",
            version: 2,
            ..PLAIN
        },
        Recipe {
            name: "extended L2 entries",
            cluster_bits: 14,
            extended: true,
            ..PLAIN
        },
        Recipe {
            name: "zlib",
            compression: Some(Compression::Zlib),
            ..PLAIN
        },
        Recipe {
            name: "zstd",
            compression: Some(Compression::Zstd),
            cluster_bits: 13,
            refcount_order: 5,
            ..PLAIN
        },
        Recipe {
            name: "snapshots",
            snapshots: true,
            ..PLAIN
        },
        Recipe {
            name: "snapshots and all",
            cluster_bits: 14,
            extended: true,
            compression: Some(Compression::Zlib),
            snapshots: true,
            backing: Some(Backing::Raw(raw)),
            ..PLAIN
        },
        Recipe {
            name: "backing file in qcow2",
            backing: Some(base.clone()),
            ..PLAIN
        },
        Recipe {
            name: "version 2, snapshots, backing file in qcow2",
            version: 2,
            snapshots: true,
            backing: Some(base),
            ..PLAIN
        },
        Recipe {
            name: "external data file",
            external: true,
            ..PLAIN
        },
        Recipe {
            name: "clusters of 512 bytes",
            cluster_bits: 9,
            snapshots: true,
            ..PLAIN
        },
        Recipe {
            name: "clusters of 64 KiB",
            cluster_bits: 16,
            ..PLAIN
        },
        Recipe {
            name: "refcounts of one bit",
            cluster_bits: 9,
            refcount_order: 0,
            ..PLAIN
        },
        Recipe {
            name: "refcounts of 64 bits",
            cluster_bits: 9,
            refcount_order: 6,
            compression: Some(Compression::Zlib),
            snapshots: true,
            ..PLAIN
        },
    ];
    (1..)
        .zip(recipes)
        .map(|(tag, recipe)| recipe.build(names, tag))
        .collect()
}

/// What a sector holds: unlike every other sector.
pub(super) fn stamp(tag: u32, sector: u64) -> Vec<u8> {
    let word = (u64::from(tag) << 40) ^ sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    word.to_be_bytes().repeat(64)
}

/// An image while it is made.
struct Draft {
    seed: Seed,
    cluster: u64,
    refcounts: Vec<u64>,
}

impl Draft {
    /// Takes clusters at the end of the image.
    fn take(&mut self, count: u64) -> u64 {
        let start = self.seed.image.len() as u64;
        self.refcounts
            .resize(self.refcounts.len() + count as usize, 1);
        self.seed
            .image
            .resize((start + count * self.cluster) as usize, 0);
        self.seed.places.push(start);
        start
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let at = offset as usize;
        self.seed.image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put64(&mut self, offset: u64, value: u64) {
        self.put(offset, &value.to_be_bytes());
    }

    fn number64(&self, offset: u64) -> u64 {
        super::view::be64(&self.seed.image, offset)
    }

    fn numbers(&mut self, part: Part, offset: u64, width: usize, count: u64) {
        let numbers = self.seed.numbers.entry(part).or_default();
        numbers.extend((0..count).map(|at| Number {
            offset: offset + at * width as u64,
            width,
        }));
    }

    fn host_of(&self, offset: u64) -> usize {
        (offset / self.cluster) as usize
    }
}

impl Recipe {
    fn entry_len(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Sectors of a cluster, as the guest has written them.
    fn content(&self, tag: u32, cluster: u64) -> Vec<u8> {
        let sectors = 1 << (self.cluster_bits - 9);
        let first = cluster * sectors;
        (first..first + sectors)
            .map(|sector| stamp(tag, sector))
            .collect::<Vec<_>>()
            .concat()
    }

    fn build(self, names: &Names, tag: u32) -> Seed {
        let cluster = 1 << self.cluster_bits;
        let mut draft = Draft {
            seed: Seed {
                name: self.name,
                cluster_bits: self.cluster_bits,
                ..Seed::default()
            },
            cluster,
            refcounts: Vec::new(),
        };
        let mapped = cluster / self.entry_len() * cluster;
        let size = mapped + 3 * cluster + 512;
        if self.external {
            draft.seed.data = Some(vec![0; (mapped + 4 * cluster) as usize]);
        }
        draft.take(1);
        let refcount_table = draft.take(1);
        let l1 = draft.take(1);
        let tables = [draft.take(1), draft.take(1)];
        for (at, table) in (0..).zip(tables) {
            draft.put64(l1 + at * 8, table | COPIED);
        }
        draft.numbers(Part::L1, l1, 8, 3);
        self.describe(&mut draft, tag, tables[0], 0..DESCRIBED);
        let second = mapped / cluster;
        self.describe(&mut draft, tag, tables[1], second..second + 3);
        let entries = (cluster / self.entry_len()).min(DESCRIBED + 4);
        draft.numbers(Part::L2, tables[0], 8, entries * self.entry_len() / 8);
        draft.numbers(Part::L2, tables[1], 8, 6);

        let snapshots = self.snapshots.then(|| self.snapshots(&mut draft, tag, l1));
        self.header(&mut draft, names, [size, refcount_table, l1], snapshots);
        self.refcounts(&mut draft, refcount_table);
        draft.seed.backing = self.backing;
        draft.seed
    }

    /// Fills a range of an L2 table, and makes the clusters that it refers to.
    fn describe(&self, draft: &mut Draft, tag: u32, table: u64, clusters: std::ops::Range<u64>) {
        let mut stream = 0..0;
        for (at, cluster) in (0..).zip(clusters) {
            let entry = table + at * self.entry_len();
            let content = self.content(tag, cluster);
            let compressed = self.compression.filter(|_| at % 4 == 1);
            let (descriptor, bitmap) = match at % 8 {
                _ if compressed.is_some_and(|compression| {
                    self.compress(draft, entry, compression, &content, &mut stream)
                }) =>
                {
                    continue;
                }
                2 => (0, 0),
                3 if self.version > 2 => (if self.extended { 0 } else { 1 }, u64::MAX << 32),
                4 if self.version > 2 && !self.external => {
                    let host = draft.take(1) | COPIED;
                    (if self.extended { host } else { host | 1 }, u64::MAX << 32)
                }
                kind => {
                    let host = match &mut draft.seed.data {
                        Some(data) => {
                            let at = (cluster << self.cluster_bits) as usize;
                            data[at..at + content.len()].copy_from_slice(&content);
                            cluster << self.cluster_bits
                        }
                        None => {
                            let host = draft.take(1);
                            draft.put(host, &content);
                            host
                        }
                    };
                    // Some subclusters are data, some zeroes, some neither.
                    let some = 0x00f0_ff00_0f00_00ff;
                    (host | COPIED, if kind == 5 { some } else { 0xffff_ffff })
                }
            };
            draft.put64(entry, descriptor);
            if self.extended {
                draft.put64(entry + 8, bitmap);
            }
        }
    }

    /// Stores a compressed cluster behind those before; false if it must not be compressed.
    fn compress(
        &self,
        draft: &mut Draft,
        entry: u64,
        compression: Compression,
        content: &[u8],
        stream: &mut std::ops::Range<u64>,
    ) -> bool {
        let mut bytes = vec![0; content.len()];
        let Some(len) = Encoder::new(compression)
            .unwrap()
            .compress(content, &mut bytes)
            .unwrap()
        else {
            return false;
        };
        let old_end = stream.end;
        if stream.end - stream.start < len as u64 {
            let taken = draft.take(1);
            match taken == stream.end && stream.end > 0 {
                true => stream.end += draft.cluster,
                false => *stream = taken..taken + draft.cluster,
            }
            draft.refcounts[(taken / draft.cluster) as usize] = 0;
        }
        if stream.end - stream.start < len as u64 {
            return false;
        }
        let offset = stream.start;
        draft.put(offset, &bytes[..len]);
        draft.numbers(Part::Compressed, offset, 1, len.min(16) as u64);
        stream.start += len as u64;
        let last = (offset + len as u64 - 1) / 512;
        let sectors = last - offset / 512;
        let x = 62 - (self.cluster_bits - 8);
        draft.put64(entry, 1 << 62 | sectors << x | offset);
        let end = (last + 1) * 512;
        debug_assert!(end <= stream.end.max(old_end));
        for host in draft.host_of(offset)..=draft.host_of(end - 1) {
            draft.refcounts[host] += 1;
        }
        true
    }

    /// Makes two snapshots: one that shares the first L2 table with the disk, and an older one
    /// that has all to itself. Returns where the table is.
    fn snapshots(&self, draft: &mut Draft, tag: u32, l1: u64) -> u64 {
        let tables = [draft.take(1), draft.take(1)];
        draft.numbers(Part::SnapshotL1, tables[0], 8, 3);
        draft.numbers(Part::SnapshotL1, tables[1], 8, 3);
        let shared = draft.number64(l1) & !COPIED;
        draft.put64(l1, shared);
        draft.put64(tables[0], shared);
        let at = draft.host_of(shared);
        draft.refcounts[at] += 1;
        for at in 0..DESCRIBED {
            let entry = shared + at * self.entry_len();
            let descriptor = draft.number64(entry) & !COPIED;
            draft.put64(entry, descriptor);
            if descriptor >> 62 == 1 {
                let x = 62 - (self.cluster_bits - 8);
                let offset = descriptor & ((1 << x) - 1);
                let sectors = (descriptor & !(1 << 62)) >> x;
                let end = (offset / 512 + sectors + 1) * 512;
                for host in draft.host_of(offset)..=draft.host_of(end - 1) {
                    draft.refcounts[host] += 1;
                }
            } else if descriptor & !511 != 0 {
                let host = draft.host_of(descriptor);
                draft.refcounts[host] += 1;
            }
        }
        let own = draft.take(1);
        draft.put64(tables[1], own | COPIED);
        self.describe(draft, tag ^ 0x80, own, 0..3);
        draft.numbers(Part::SnapshotL2, own, 8, 6);
        let table = draft.take(1);
        let mut at = table;
        for (number, l1) in (1u8..).zip(tables) {
            draft.put64(at, l1);
            draft.put(at + 8, &[0, 0, 0, 3, 0, 1, 0, 5]);
            draft.put(at + 36, &[0, 0, 0, 24]);
            draft.put64(at + 48, 4 << self.cluster_bits);
            draft.put64(at + 56, u64::MAX);
            draft.put(at + 64, &[b'0' + number]);
            draft.put(at + 65, b"older");
            draft.numbers(Part::Snapshots, at, 8, 1);
            draft.numbers(Part::Snapshots, at + 8, 4, 1);
            draft.numbers(Part::Snapshots, at + 12, 2, 2);
            draft.numbers(Part::Snapshots, at + 32, 4, 2);
            draft.numbers(Part::Snapshots, at + 40, 8, 3);
            at += 72;
        }
        table
    }

    fn header(&self, draft: &mut Draft, names: &Names, at: [u64; 3], snapshots: Option<u64>) {
        let [size, refcount_table, l1] = at;
        draft.put(0, b"QFI\xfb");
        draft.put(4, &self.version.to_be_bytes());
        draft.put(20, &self.cluster_bits.to_be_bytes());
        draft.put64(24, size);
        draft.put(36, &3u32.to_be_bytes());
        draft.put64(40, l1);
        draft.put64(48, refcount_table);
        draft.put(56, &1u32.to_be_bytes());
        if let Some(table) = snapshots {
            draft.put(60, &2u32.to_be_bytes());
            draft.put64(64, table);
        }
        let zstd = self.compression == Some(Compression::Zstd);
        let mut end = 72;
        if self.version > 2 {
            let features = u64::from(self.external) << 2
                | u64::from(zstd) << 3
                | u64::from(self.extended) << 4;
            draft.put64(72, features);
            draft.put64(88, u64::from(self.external) << 1);
            draft.put(96, &self.refcount_order.to_be_bytes());
            draft.put(100, &112u32.to_be_bytes());
            draft.put(104, &[u8::from(zstd)]);
            end = 112;
        }
        let mut extension = |kind: u32, content: &[u8]| {
            draft.put(end, &kind.to_be_bytes());
            draft.put(end + 4, &(content.len() as u32).to_be_bytes());
            draft.put(end + 8, content);
            draft.numbers(Part::Extensions, end, 4, 2 + content.len() as u64 / 4);
            end += 8 + (content.len() as u64).next_multiple_of(8);
        };
        match &self.backing {
            Some(Backing::Raw(_)) => extension(0xe279_2aca, b"raw"),
            Some(Backing::Qcow2(_)) => extension(0xe279_2aca, b"qcow2"),
            None => {}
        }
        if self.external {
            extension(0x4441_5441, names.data.as_bytes());
        }
        extension(0x6803_f857, &[b'?'; 48]);
        draft.numbers(Part::Extensions, end, 4, 2);
        if self.backing.is_some() {
            end += 8;
            draft.put64(8, end);
            draft.put(16, &(names.backing.len() as u32).to_be_bytes());
            draft.put(end, names.backing.as_bytes());
        }
        for (offset, width) in [
            (0, 4),
            (4, 4),
            (8, 8),
            (16, 4),
            (20, 4),
            (24, 8),
            (32, 4),
            (36, 4),
            (40, 8),
            (48, 8),
            (56, 4),
            (60, 4),
            (64, 8),
            (72, 8),
            (80, 8),
            (88, 8),
            (96, 4),
            (100, 4),
            (104, 1),
        ] {
            draft.numbers(Part::Header, offset, width, 1);
        }
    }

    /// Makes the refcount blocks.
    fn refcounts(&self, draft: &mut Draft, table: u64) {
        let order = self.refcount_order;
        let in_block = (draft.cluster * 8) >> order;
        let mut blocks = Vec::new();
        while (blocks.len() as u64 * in_block) < draft.refcounts.len() as u64 {
            blocks.push(draft.take(1));
        }
        let refcounts = draft.refcounts.clone();
        for (at, block) in (0..).zip(&blocks) {
            draft.put64(table + at * 8, *block);
        }
        for (cluster, refcount) in refcounts.into_iter().enumerate() {
            let block = blocks[cluster / in_block as usize] as usize;
            let bytes = &mut draft.seed.image[block..block + draft.cluster as usize];
            refcount::store(bytes, order, cluster % in_block as usize, refcount);
        }
        let widths = (1 << order) / 8;
        let count = (draft.refcounts.len() as u64 + 8).min(in_block);
        for block in blocks.iter().copied() {
            match widths {
                0 => draft.numbers(Part::Refcounts, block, 1, (count << order).div_ceil(8)),
                width => draft.numbers(Part::Refcounts, block, width, count),
            }
        }
        draft.numbers(Part::RefcountTable, table, 8, blocks.len() as u64 + 2);
    }
}
