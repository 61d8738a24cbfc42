//! An image as the specification has it, read from its bytes in the simplest way: what the engine
//! is compared with.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::super::Compression;
use super::super::compressed::Decoder;
use super::super::refcount;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSETS: u64 = 0x00ff_ffff_ffff_fe00;

/// As far as clusters are looked at that nothing but a refcount tells of: what seeds are made of
/// lies before this offset.
const MAX_KEPT: usize = 4 << 20;

pub(super) fn be64(bytes: &[u8], offset: u64) -> u64 {
    let bytes = usize::try_from(offset)
        .ok()
        .and_then(|at| bytes.get(at..)?.first_chunk());
    u64::from_be_bytes(bytes.copied().unwrap_or_default())
}

fn be32(bytes: &[u8], offset: u64) -> u32 {
    (be64(bytes, offset) >> 32) as u32
}

fn be16(bytes: &[u8], offset: u64) -> u32 {
    (be64(bytes, offset) >> 48) as u32
}

/// What lies below an image.
pub(super) enum Below<'a> {
    Nothing,
    Raw(&'a [u8]),
    Qcow2(Box<View<'a>>),
}

/// An image whose header the engine has taken for good.
pub(super) struct View<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) data: Option<&'a [u8]>,
    pub(super) below: Below<'a>,
    pub(super) bits: u32,
    pub(super) size: u64,
    order: u32,
    extended: bool,
}

/// Which host clusters are in use, and by how many.
#[derive(Default)]
pub(super) struct Audit {
    /// Clusters that are not what their refcounts and flags say: a writer may harm what is there.
    pub(super) suspect: BTreeSet<u64>,
    /// L2 tables that a writer may harm without knowing.
    pub(super) doubtful: BTreeSet<u64>,
    /// Clusters that no write to the disk may change.
    pub(super) kept: BTreeSet<u64>,
    /// Past all clusters that something refers to, or that have a refcount.
    pub(super) end: u64,
}

#[derive(Default)]
struct Uses {
    count: u64,
    /// By an entry that says that it is the only one.
    copied: bool,
    by: BTreeSet<By>,
}

/// What refers to a cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum By {
    /// The header or a refcount table: it is a table that is written in place.
    Table,
    Disk,
    Snapshot,
}

impl<'a> View<'a> {
    pub(super) fn new(bytes: &'a [u8], data: Option<&'a [u8]>, below: Below<'a>) -> Self {
        let version = be32(bytes, 4);
        View {
            bytes,
            data,
            below,
            bits: be32(bytes, 20),
            size: be64(bytes, 24),
            order: if version == 2 { 4 } else { be32(bytes, 96) },
            extended: version > 2 && be64(bytes, 72) & 16 != 0,
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.bits
    }

    fn entry_len(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Offset of the L2 table that describes a cluster of the disk; 0 if there is none.
    pub(super) fn table(&self, cluster: u64) -> u64 {
        let index = cluster / (self.cluster() / self.entry_len());
        match index < be32(self.bytes, 36).into() {
            true => be64(self.bytes, be64(self.bytes, 40) + index * 8) & OFFSETS,
            false => 0,
        }
    }

    /// The L2 entry of a cluster of the disk.
    fn entry(&self, cluster: u64) -> (u64, u64) {
        let table = self.table(cluster);
        if table == 0 {
            return (0, 0);
        }
        let index = cluster % (self.cluster() / self.entry_len());
        self.entry_at(table + index * self.entry_len())
    }

    fn entry_at(&self, offset: u64) -> (u64, u64) {
        let bitmap = match self.extended {
            true => be64(self.bytes, offset + 8),
            false => 0,
        };
        (be64(self.bytes, offset), bitmap)
    }

    /// The entries of an L2 table, as far as there is something.
    fn entries(&self, table: u64) -> impl Iterator<Item = (u64, u64)> {
        let end = (table + self.cluster()).min(self.bytes.len() as u64);
        let offsets = (table..end).step_by(self.entry_len() as usize);
        offsets.map(|at| self.entry_at(at))
    }

    /// The host's bytes that a compressed cluster is in.
    fn stream(&self, descriptor: u64) -> Range<u64> {
        let x = 62 - (self.bits - 8);
        let offset = descriptor & ((1 << x) - 1);
        let sectors = (descriptor & (COMPRESSED - 1)) >> x;
        offset..(offset / 512 + sectors + 1) * 512
    }

    /// The host clusters of the image that an L2 entry refers to.
    fn hosts(&self, descriptor: u64) -> Range<u64> {
        if descriptor & COMPRESSED != 0 {
            let stream = self.stream(descriptor);
            return stream.start >> self.bits..stream.end.div_ceil(self.cluster());
        }
        let host = (descriptor & OFFSETS) >> self.bits;
        match descriptor & OFFSETS == 0 || self.data.is_some() {
            true => 0..0,
            false => host..host + 1,
        }
    }

    /// Whether what a cluster of the disk holds can depend on others that are written.
    pub(super) fn is_in_doubt(&self, cluster: u64, audit: &Audit) -> bool {
        let (descriptor, _) = self.entry(cluster);
        audit.doubtful.contains(&(self.table(cluster) >> self.bits))
            || self
                .hosts(descriptor)
                .any(|host| audit.suspect.contains(&host))
    }

    /// What a cluster of the disk holds; `None` if its entry means nothing.
    pub(super) fn content(&self, cluster: u64) -> Option<Vec<u8>> {
        let start = cluster << self.bits;
        let (descriptor, bitmap) = self.entry(cluster);
        if descriptor & COMPRESSED != 0 {
            let stream = self.stream(descriptor);
            let compression = match be64(self.bytes, 72) & 8 != 0 && be32(self.bytes, 4) > 2 {
                true => Compression::Zstd,
                false => Compression::Zlib,
            };
            let from = bytes_at(
                self.bytes,
                stream.start,
                (stream.end - stream.start) as usize,
            );
            let mut to = vec![0; self.cluster() as usize];
            let mut decoder = Decoder::new(compression).ok()?;
            decoder.decompress(&from, &mut to).ok()?;
            return Some(to);
        }
        let host = descriptor & OFFSETS;
        // Other clusters may be there.
        let placed = host != 0 || descriptor & COPIED != 0;
        let elsewhere = self.data.is_some() && placed && host != start;
        if elsewhere || host & (self.cluster() - 1) != 0 {
            return None;
        }
        let external = self.data.is_some() && descriptor & COPIED != 0;
        let here = || match (host, self.data) {
            (0, None) => None,
            (host, Some(data)) if external || host > 0 => {
                Some(bytes_at(data, host, self.cluster() as usize))
            }
            (_, Some(_)) => None,
            (host, None) => Some(bytes_at(self.bytes, host, self.cluster() as usize)),
        };
        if !self.extended {
            if descriptor & 1 != 0 {
                return Some(vec![0; self.cluster() as usize]);
            }
            return here().or_else(|| self.below(start, self.cluster() as usize));
        }
        let part = self.cluster() as usize / 32;
        let mut content = vec![0; self.cluster() as usize];
        for (at, to) in content.chunks_mut(part).enumerate() {
            let from = at * part;
            match (bitmap >> at & 1, bitmap >> (32 + at) & 1) {
                (0, 0) => to.copy_from_slice(&self.below(start + from as u64, part)?),
                (1, 0) => to.copy_from_slice(&here()?[from..from + part]),
                (0, 1) => {}
                _ => return None,
            }
        }
        Some(content)
    }

    /// What lies below a range; `None` if that means nothing.
    fn below(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        Some(match &self.below {
            Below::Nothing => vec![0; len],
            Below::Raw(bytes) => bytes_at(bytes, offset, len),
            Below::Qcow2(view) => {
                let mut all = Vec::with_capacity(len);
                while all.len() < len && offset + (all.len() as u64) < view.size {
                    let at = offset + all.len() as u64;
                    let there = view.size - at;
                    let within = (at % view.cluster()) as usize;
                    let cluster = view.content(at >> view.bits)?;
                    let rest = &cluster[within..];
                    let count = rest.len().min(len - all.len());
                    let count = count.min(usize::try_from(there).unwrap_or(usize::MAX));
                    all.extend(&rest[..count]);
                }
                all.resize(len, 0);
                all
            }
        })
    }

    /// Clusters of the disk that are described, the first of them.
    pub(super) fn described(&self, most: usize) -> Vec<u64> {
        let in_table = self.cluster() / self.entry_len();
        let mut all = Vec::new();
        let entries = u64::from(be32(self.bytes, 36)).min(self.bytes.len() as u64 / 8);
        for index in 0..entries {
            let first = index * in_table;
            let table = self.table(first);
            let end = self.size.div_ceil(self.cluster());
            if table == 0 || first >= end {
                continue;
            }
            let described = (first..end)
                .zip(self.entries(table))
                .filter(|(_, entry)| *entry != (0, 0))
                .map(|(cluster, _)| cluster);
            all.extend(described.take(most - all.len()));
        }
        all
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let bits = self.bits + 3 - self.order;
        let index = cluster >> bits;
        if index * 8 >= u64::from(be32(self.bytes, 56)) << self.bits {
            return 0;
        }
        let block = be64(self.bytes, be64(self.bytes, 48) + index * 8) & OFFSETS;
        let all = match usize::try_from(block).ok() {
            Some(at) if at > 0 => self.bytes.get(at..).unwrap_or_default(),
            _ => return 0,
        };
        let all = all.get(..1 << self.bits).unwrap_or(all);
        let index = (cluster & ((1 << bits) - 1)) as usize;
        refcount::load(all, self.order, index)
    }

    /// Where the snapshots' L1 tables are and how many entries they have, and the length of the
    /// snapshot table.
    fn snapshots(&self) -> (Vec<(u64, u64)>, u64) {
        let start = be64(self.bytes, 64);
        let mut at = start;
        let mut all = Vec::new();
        for _ in 0..be32(self.bytes, 60).min(1 << 16) {
            all.push((be64(self.bytes, at), be32(self.bytes, at + 8).into()));
            let names = be16(self.bytes, at + 12) + be16(self.bytes, at + 14);
            let len = 40 + u64::from(be32(self.bytes, at + 36)) + u64::from(names);
            at += len.next_multiple_of(8);
        }
        (all, at - start)
    }

    /// Finds out what refers to each cluster, and whether its refcount knows. `harmed` holds
    /// clusters that have been suspect before.
    pub(super) fn audit(&self, harmed: &BTreeSet<u64>) -> Audit {
        let mut uses = BTreeMap::<u64, Uses>::new();
        let mut add = |clusters: Range<u64>, count: u64, copied: bool, by: By| {
            for cluster in clusters {
                let uses = uses.entry(cluster).or_default();
                uses.count += count;
                uses.copied |= copied;
                uses.by.insert(by);
            }
        };
        let clusters = |offset: u64, len: u64| {
            // What does not end in the file is nothing to anybody.
            let len = len.min(self.bytes.len() as u64);
            offset >> self.bits..offset.saturating_add(len).div_ceil(self.cluster())
        };
        add(0..1, 1, false, By::Table);
        let (table, len) = (be64(self.bytes, 48), be32(self.bytes, 56));
        let len = u64::from(len) << self.bits;
        add(clusters(table, len), 1, false, By::Table);
        let mut end = 0;
        for index in 0..(len / 8).min(self.bytes.len() as u64 / 8) {
            let block = be64(self.bytes, table + index * 8) & OFFSETS;
            if block == 0 {
                continue;
            }
            add(clusters(block, 1), 1, false, By::Table);
            let rest = self.bytes.get(block as usize..).unwrap_or_default();
            let all = &rest[..rest.len().min(1 << self.bits)];
            if let Some(last) = all.iter().rposition(|byte| *byte != 0) {
                let bits = self.bits + 3 - self.order;
                let within = ((last as u64 + 1) << 3).div_ceil(1 << self.order);
                end = end.max((index << bits) + within);
            }
        }
        let (mut l1s, len) = self.snapshots();
        add(clusters(be64(self.bytes, 64), len), 1, false, By::Snapshot);
        for (offset, entries) in &l1s {
            add(clusters(*offset, entries * 8), 1, false, By::Snapshot);
        }
        l1s.insert(0, (be64(self.bytes, 40), be32(self.bytes, 36).into()));
        add(clusters(l1s[0].0, l1s[0].1 * 8), 1, false, By::Table);
        // L2 tables: by the disk, by snapshots.
        let mut tables = BTreeMap::<u64, (u64, u64)>::new();
        for (number, (offset, entries)) in l1s.into_iter().enumerate() {
            for index in 0..entries.min(self.bytes.len() as u64 / 8) {
                let entry = be64(self.bytes, offset.saturating_add(index * 8));
                let table = entry & OFFSETS;
                if table == 0 {
                    continue;
                }
                let host = table >> self.bits;
                let copied = number == 0 && entry & COPIED != 0;
                let by = if number == 0 { By::Disk } else { By::Snapshot };
                add(host..host + 1, 1, copied, by);
                let paths = tables.entry(table).or_default();
                match number {
                    0 => paths.0 += 1,
                    _ => paths.1 += 1,
                }
            }
        }
        for (table, (active, snapshots)) in &tables {
            for (descriptor, _) in self.entries(*table) {
                let copied = descriptor & (COPIED | COMPRESSED) == COPIED;
                if *active > 0 {
                    add(self.hosts(descriptor), *active, copied, By::Disk);
                }
                if *snapshots > 0 {
                    let copied = copied && *active > 0;
                    add(self.hosts(descriptor), *snapshots, copied, By::Snapshot);
                }
            }
        }
        let mut audit = Audit {
            suspect: harmed.clone(),
            end: end.max(uses.keys().next_back().map_or(0, |last| last + 1)),
            ..Audit::default()
        };
        for (cluster, uses) in &uses {
            // A table is written whatever its refcount says, as is what an entry calls its own.
            let written = uses.copied || uses.by.contains(&By::Table);
            if uses.count > self.refcount(*cluster) || written && uses.count > 1 {
                audit.suspect.insert(*cluster);
            }
        }
        // What a table refers to that may be overwritten is in doubt as well.
        loop {
            let before = audit.suspect.len() + audit.doubtful.len();
            for (table, (_, snapshots)) in &tables {
                let host = table >> self.bits;
                let shared = *snapshots > 0 || uses.get(&host).is_some_and(|uses| uses.count > 1);
                if shared && audit.suspect.contains(&host) {
                    audit.doubtful.insert(host);
                    for (descriptor, _) in self.entries(*table) {
                        audit.suspect.extend(self.hosts(descriptor));
                    }
                }
            }
            if audit.suspect.len() + audit.doubtful.len() == before {
                break;
            }
        }
        for cluster in 0..self.bytes.len().min(MAX_KEPT).div_ceil(1 << self.bits) as u64 {
            let uses = uses.get(&cluster);
            let kept = match uses {
                Some(uses) => uses.by.contains(&By::Snapshot) && !uses.by.contains(&By::Table),
                None => self.refcount(cluster) > 0,
            };
            if kept && !audit.suspect.contains(&cluster) {
                audit.kept.insert(cluster);
            }
        }
        audit
    }
}

/// The `len` bytes at `offset`; zeroes past the end.
pub(super) fn bytes_at(bytes: &[u8], offset: u64, len: usize) -> Vec<u8> {
    let at = usize::try_from(offset).unwrap_or(usize::MAX);
    let there = bytes.get(at..).unwrap_or_default();
    let mut found = there[..there.len().min(len)].to_vec();
    found.resize(len, 0);
    found
}
