//! How a cluster of the disk is described: L2 entries, and the arithmetic that finds them (qcow2
//! specification, "Cluster mapping").

use super::header::{Header, incompatible};

/// An L1 or standard L2 entry: the refcount of what it points to is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
/// An L2 entry: the descriptor is one of compressed data.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// A standard L2 entry without subclusters: reads as zeroes.
pub(super) const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Subclusters in a cluster with extended L2 entries.
pub(super) const SUBCLUSTERS: u32 = 32;

/// What of an image's geometry the mapping depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) version: u32,
    /// L2 entries have 16 bytes, and clusters 32 subclusters.
    pub(super) extended: bool,
    /// Data clusters lie in a file of their own, where the guest has them.
    pub(super) external: bool,
}

impl Geometry {
    pub(super) fn of(header: &Header) -> Geometry {
        Geometry {
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            version: header.version,
            extended: header.has(incompatible::EXTENDED_L2),
            external: header.has(incompatible::DATA_FILE),
        }
    }

    /// In bytes.
    pub(super) fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// The first byte of the cluster that `offset` lies in.
    pub(super) fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// Where `offset` lies in its cluster.
    pub(super) fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// log2 of the size of an L2 entry in bytes.
    pub(super) fn l2_entry_bits(self) -> u32 {
        if self.extended { 4 } else { 3 }
    }

    /// log2 of the number of entries of an L2 table.
    pub(super) fn l2_bits(self) -> u32 {
        self.cluster_bits - self.l2_entry_bits()
    }

    /// log2 of the number of refcounts in a refcount block.
    pub(super) fn refcount_block_bits(self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// The largest refcount.
    pub(super) fn max_refcount(self) -> u64 {
        u64::MAX >> (64 - (1 << self.refcount_order))
    }

    /// log2 of the size of a subcluster, or of a cluster that has none.
    pub(super) fn subcluster_bits(self) -> u32 {
        self.cluster_bits
            - if self.extended {
                SUBCLUSTERS.ilog2()
            } else {
                0
            }
    }
}

/// An L2 entry as it stands in the table; `bitmap` only with extended L2 entries, else 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) descriptor: u64,
    /// Low half: subclusters that are allocated; high half: those that read as zeroes.
    pub(super) bitmap: u64,
}

/// What an L2 entry says about a cluster, or about the subclusters of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// The backing file's bytes, or zeroes.
    Unallocated,
    /// Zeroes; a host cluster may be kept for it.
    Zero { host: Option<u64>, copied: bool },
    /// The host cluster's bytes.
    Data { host: u64, copied: bool },
    /// Compressed data: its first byte and the number of bytes that hold it, at most.
    Compressed { offset: u64, len: u64 },
    /// Some of each: one bit a subcluster, the first is bit 0. No bit is set in both.
    Subclusters {
        host: Option<u64>,
        copied: bool,
        allocated: u32,
        zero: u32,
    },
}

/// An L2 entry that the specification does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadEntry;

impl Entry {
    pub(super) const UNALLOCATED: Entry = Entry {
        descriptor: 0,
        bitmap: 0,
    };

    /// Data in a host cluster of our own.
    pub(super) fn data(geometry: Geometry, host: u64) -> Entry {
        Entry {
            descriptor: host | COPIED,
            bitmap: if geometry.extended {
                u32::MAX.into()
            } else {
                0
            },
        }
    }

    /// Reads as zeroes; `host` is the cluster of our own that is kept for it, if there is one.
    /// Not for version 2.
    pub(super) fn zero(geometry: Geometry, host: Option<u64>) -> Entry {
        let kept = host.map_or(0, |host| host | COPIED);
        match geometry.extended {
            true => Entry {
                descriptor: kept,
                bitmap: u64::from(u32::MAX) << 32,
            },
            false => Entry {
                descriptor: kept | ZERO,
                bitmap: 0,
            },
        }
    }

    /// Subclusters in a host cluster of our own, or in none.
    pub(super) fn subclusters(host: Option<u64>, allocated: u32, zero: u32) -> Entry {
        Entry {
            descriptor: host.map_or(0, |host| host | COPIED),
            bitmap: u64::from(zero) << 32 | u64::from(allocated),
        }
    }

    /// What it says.
    pub(super) fn mapping(self, geometry: Geometry) -> Result<Mapping, BadEntry> {
        let Entry { descriptor, bitmap } = self;
        if descriptor & COMPRESSED != 0 {
            // Bits 0 to x-1 are the offset, the rest up to bit 61 the sectors besides the first.
            let x = 62 - (geometry.cluster_bits - 8);
            let offset = descriptor & ((1 << x) - 1);
            let sectors = ((descriptor & (COMPRESSED - 1)) >> x) + 1;
            let len = sectors * 512 - offset % 512;
            let bad = geometry.external || bitmap != 0 || descriptor & COPIED != 0;
            // A host offset has 56 bits at most.
            return match bad || offset > OFFSET_MASK {
                true => Err(BadEntry),
                false => Ok(Mapping::Compressed { offset, len }),
            };
        }
        let host = descriptor & OFFSET_MASK;
        let copied = descriptor & COPIED != 0;
        if geometry.in_cluster(host) != 0 {
            return Err(BadEntry);
        }
        // Offset 0 is the header's cluster, or the first of an external data file.
        let host = match host == 0 && !(geometry.external && copied) {
            true => None,
            false => Some(host),
        };
        if geometry.extended {
            let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
            if allocated & zero != 0 || allocated != 0 && host.is_none() {
                return Err(BadEntry);
            }
            return Ok(match (host, allocated, zero) {
                (Some(host), u32::MAX, _) => Mapping::Data { host, copied },
                (_, _, u32::MAX) => Mapping::Zero { host, copied },
                (None, _, 0) => Mapping::Unallocated,
                _ => Mapping::Subclusters {
                    host,
                    copied,
                    allocated,
                    zero,
                },
            });
        }
        Ok(match (host, descriptor & ZERO != 0) {
            (_, true) if geometry.version < 3 => return Err(BadEntry),
            (host, true) => Mapping::Zero { host, copied },
            (Some(host), false) => Mapping::Data { host, copied },
            (None, false) => Mapping::Unallocated,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANDARD: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        version: 3,
        extended: false,
        external: false,
    };
    const EXTENDED: Geometry = Geometry {
        extended: true,
        ..STANDARD
    };

    fn standard(descriptor: u64) -> Result<Mapping, BadEntry> {
        Entry {
            descriptor,
            bitmap: 0,
        }
        .mapping(STANDARD)
    }

    #[test]
    fn a_standard_entry_is_data_zero_or_nothing() {
        let (host, copied) = (0x50000, true);
        assert_eq!(standard(0), Ok(Mapping::Unallocated));
        assert_eq!(standard(COPIED | host), Ok(Mapping::Data { host, copied }));
        let zero = |host, copied| Ok(Mapping::Zero { host, copied });
        assert_eq!(standard(1), zero(None, false));
        assert_eq!(standard(COPIED | host | 1), zero(Some(host), true));
        assert_eq!(standard(0x50200), Err(BadEntry));
    }

    #[test]
    fn a_compressed_entry_counts_the_sectors_it_touches() {
        // 64 KiB clusters: 54 bits of offset, 8 of sectors.
        let entry = COMPRESSED | 2 << 54 | 0x5_0010;
        let (offset, len) = (0x5_0010, 3 * 512 - 0x10);
        assert_eq!(standard(entry), Ok(Mapping::Compressed { offset, len }));
        assert_eq!(standard(entry | COPIED), Err(BadEntry));
    }

    #[test]
    fn what_is_made_reads_back() {
        let (host, copied) = (0x70000, true);
        for geometry in [STANDARD, EXTENDED] {
            let data = Entry::data(geometry, host);
            assert_eq!(data.mapping(geometry), Ok(Mapping::Data { host, copied }));
            let zero = Entry::zero(geometry, None);
            let want = Mapping::Zero {
                host: None,
                copied: false,
            };
            assert_eq!(zero.mapping(geometry), Ok(want));
            let unallocated = Entry::UNALLOCATED.mapping(geometry);
            assert_eq!(unallocated, Ok(Mapping::Unallocated));
        }
    }

    #[test]
    fn a_subcluster_is_not_both_allocated_and_zero() {
        let entry = Entry::subclusters(Some(0x70000), 0xf, 0xf0);
        let want = Mapping::Subclusters {
            host: Some(0x70000),
            copied: true,
            allocated: 0xf,
            zero: 0xf0,
        };
        assert_eq!(entry.mapping(EXTENDED), Ok(want));
        let both = Entry::subclusters(Some(0x70000), 0xf, 0x8);
        assert_eq!(both.mapping(EXTENDED), Err(BadEntry));
        let nowhere = Entry::subclusters(None, 1, 0);
        assert_eq!(nowhere.mapping(EXTENDED), Err(BadEntry));
    }

    #[test]
    fn only_in_an_external_data_file_offset_0_is_a_place_for_data() {
        let external = Geometry {
            external: true,
            ..STANDARD
        };
        let first = Entry::data(external, 0);
        let (host, copied) = (0, true);
        assert_eq!(first.mapping(external), Ok(Mapping::Data { host, copied }));
        assert_eq!(first.mapping(STANDARD), Ok(Mapping::Unallocated));
    }

    #[test]
    fn sizes_follow_from_the_geometry() {
        assert_eq!((STANDARD.l2_bits(), EXTENDED.l2_bits()), (13, 12));
        assert_eq!(STANDARD.refcount_block_bits(), 15);
        assert_eq!(STANDARD.max_refcount(), 65535);
        assert_eq!(EXTENDED.subcluster_bits(), 11);
    }
}
