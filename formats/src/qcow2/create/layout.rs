//! What a new image consists of, and where each part lies: the header, the refcount table and
//! its blocks, the L1 table; if clusters are allocated in advance, the L2 tables and then the
//! data, in the guest's order.

use super::super::entry::Geometry;
use super::super::header::{MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use crate::OpenError;
use crate::host_file::Size;

/// Lengths in clusters, but for `l1_entries`; each part follows the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) geometry: Geometry,
    pub(super) refcount_table: u64,
    pub(super) refcount_blocks: u64,
    pub(super) l1: u64,
    pub(super) l1_entries: u64,
    pub(super) l2: u64,
    /// Clusters of the guest that are allocated, wherever they lie.
    pub(super) allocated: u64,
}

impl Layout {
    /// For a disk of `size` bytes, all of which is mapped if `allocate`.
    pub(super) fn new(geometry: Geometry, size: u64, allocate: bool) -> Result<Layout, OpenError> {
        let cluster_size = geometry.cluster_size();
        let too_large = |most: u64| OpenError {
            message: format!(
                "`size` is {}, expected at most {} with a `cluster_size` of {}",
                Size(size),
                Size(most),
                Size(cluster_size)
            ),
            help: Some("choose a larger `cluster_size`".into()),
            key: "size",
        };
        let coverage_bits = geometry.cluster_bits + geometry.l2_bits();
        let most = (MAX_L1_BYTES / 8) << coverage_bits;
        if size > most {
            return Err(too_large(most));
        }
        // An image of 0 bytes has an L1 table too.
        let l1_entries = size.div_ceil(1 << coverage_bits).max(1);
        let mut layout = Layout {
            geometry,
            refcount_table: 1,
            refcount_blocks: 1,
            l1: (l1_entries * 8).div_ceil(cluster_size),
            l1_entries,
            l2: if allocate { l1_entries } else { 0 },
            allocated: if allocate {
                size.div_ceil(cluster_size)
            } else {
                0
            },
        };
        // Refcount blocks count themselves and their table: more of them until it is enough.
        loop {
            let blocks = layout
                .clusters()
                .div_ceil(1 << geometry.refcount_block_bits());
            let table = (blocks * 8).div_ceil(cluster_size);
            if (blocks, table) == (layout.refcount_blocks, layout.refcount_table) {
                break;
            }
            (layout.refcount_blocks, layout.refcount_table) = (blocks, table);
        }
        if layout.refcount_table * cluster_size > MAX_REFCOUNT_TABLE_BYTES {
            let blocks = MAX_REFCOUNT_TABLE_BYTES / 8;
            let counted = blocks << geometry.refcount_block_bits();
            return Err(OpenError {
                message: format!(
                    "`preallocation` of {} needs {} clusters, expected at most {counted} with a \
                     `cluster_size` of {}",
                    Size(size),
                    layout.clusters(),
                    Size(cluster_size)
                ),
                help: Some("choose a larger `cluster_size`, or `preallocation = \"off\"`".into()),
                key: "preallocation",
            });
        }
        Ok(layout)
    }

    /// Clusters of data in the image's own file.
    pub(super) fn data(&self) -> u64 {
        match self.geometry.external {
            true => 0,
            false => self.allocated,
        }
    }

    /// The clusters of the whole image.
    pub(super) fn clusters(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.l1 + self.l2 + self.data()
    }

    /// In bytes, as all that follow.
    pub(super) fn refcount_table_offset(&self) -> u64 {
        self.geometry.cluster_size()
    }

    pub(super) fn refcount_blocks_offset(&self) -> u64 {
        self.refcount_table_offset() + (self.refcount_table << self.geometry.cluster_bits)
    }

    pub(super) fn l1_offset(&self) -> u64 {
        self.refcount_blocks_offset() + (self.refcount_blocks << self.geometry.cluster_bits)
    }

    pub(super) fn l2_offset(&self) -> u64 {
        self.l1_offset() + (self.l1 << self.geometry.cluster_bits)
    }

    /// Where the guest's first cluster lies: in the data file if there is one.
    pub(super) fn data_offset(&self) -> u64 {
        match self.geometry.external {
            true => 0,
            false => self.l2_offset() + (self.l2 << self.geometry.cluster_bits),
        }
    }

    /// Length of the image's own file.
    pub(super) fn file_len(&self) -> u64 {
        self.clusters() << self.geometry.cluster_bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, refcount_order: u32) -> Geometry {
        Geometry {
            cluster_bits,
            refcount_order,
            version: 3,
            extended: false,
            external: false,
        }
    }

    #[test]
    fn every_cluster_is_counted_and_no_block_is_too_many() {
        for cluster_bits in 9..=21 {
            for order in 0..=6 {
                for size in [0, 512, 1 << 20, 1 << 30, 128 << 30] {
                    for allocate in [false, true] {
                        let geometry = geometry(cluster_bits, order);
                        let Ok(layout) = Layout::new(geometry, size, allocate) else {
                            continue;
                        };
                        let a_block = 1 << geometry.refcount_block_bits();
                        let counted = layout.refcount_blocks * a_block;
                        assert!((counted - a_block..=counted).contains(&layout.clusters()));
                        let entries = layout.refcount_table << (cluster_bits - 3);
                        assert!(entries >= layout.refcount_blocks);
                        assert!(layout.l1 << cluster_bits >= layout.l1_entries * 8);
                    }
                }
            }
        }
    }

    #[test]
    fn what_the_tables_cannot_describe_is_refused_with_the_limit() {
        let error = Layout::new(geometry(9, 4), 1 << 40, false).unwrap_err();
        assert_eq!(
            error.message,
            "`size` is 1TiB, expected at most 128GiB with a `cluster_size` of 512 bytes"
        );
        assert_eq!(error.key, "size");
        let error = Layout::new(geometry(9, 6), 127 << 30, true).unwrap_err();
        assert!(error.message.contains("expected at most 67108864 with"));
        assert_eq!(error.key, "preallocation");
        assert!(Layout::new(geometry(21, 4), 1 << 61, false).is_ok());
        assert!(Layout::new(geometry(21, 4), (1 << 61) + 512, false).is_err());
    }
}
