//! What a disk offers its driver: feature bits and configuration space (virtio 1.3 sections
//! 5.2.3 and 5.2.4).

use formats::Limits;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Bytes in a sector, whatever the logical block (section 5.2.4).
pub(super) const SECTOR_SIZE: u64 = 512;

/// Largest size of each virtqueue: as many requests as a driver keeps in flight on a fast disk,
/// and room for 1 MiB in one request of scattered pages.
pub(super) const QUEUE_SIZE: u16 = 256;

/// Most segments in one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 32;

/// Most sectors in one segment of a discard or write-zeroes request, 1 GiB: few requests for a
/// whole disk, and yet none that keeps a host file locked for long.
const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// Length of the configuration space, up to the last field that we fill in.
pub(super) const CONFIG_LEN: usize = 60;

/// Offset of the field `writeback` in the configuration space.
pub(super) const CONFIG_WRITEBACK: u64 = 32;

/// Largest physical block that is reported. A larger unit of the image (a cluster) is its
/// optimal size of I/O, and no block that file systems would round theirs up to.
const MAX_PHYSICAL_BLOCK: u32 = 4096;

/// What is fixed about a disk from its opening on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Profile {
    /// Logical block in bytes: a power of two, at least a sector.
    pub(super) block_size: u32,
    /// Read-only.
    pub(super) ro: bool,
    /// Whether host space may be freed.
    pub(super) sparse: bool,
    /// Number of virtqueues.
    pub(super) queues: u16,
    /// What the image can do.
    pub(super) limits: Limits,
}

/// Whether feature bit `bit` is in `features`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

impl Profile {
    /// The features that the disk backs, and no other.
    pub(super) fn features(&self) -> u64 {
        [
            (VIRTIO_F_VERSION_1, true),
            (VIRTIO_RING_F_EVENT_IDX, true),
            (VIRTIO_RING_F_INDIRECT_DESC, true),
            (VIRTIO_BLK_F_SEG_MAX, true),
            (VIRTIO_BLK_F_BLK_SIZE, true),
            (VIRTIO_BLK_F_FLUSH, true),
            (VIRTIO_BLK_F_TOPOLOGY, true),
            (VIRTIO_BLK_F_CONFIG_WCE, true),
            (VIRTIO_BLK_F_RO, self.ro),
            (VIRTIO_BLK_F_MQ, self.queues > 1),
            (VIRTIO_BLK_F_DISCARD, self.discard()),
            (VIRTIO_BLK_F_WRITE_ZEROES, self.write_zeroes()),
        ]
        .into_iter()
        .filter(|(_, backed)| *backed)
        .fold(0, |features, (bit, _)| features | 1 << bit)
    }

    fn discard(&self) -> bool {
        !self.ro && self.sparse && self.limits.discard_granularity > 0
    }

    fn write_zeroes(&self) -> bool {
        !self.ro && self.limits.write_zeroes
    }

    /// Whether a write-zeroes request may free host space (`write_zeroes_may_unmap`).
    pub(super) fn may_unmap(&self) -> bool {
        self.write_zeroes() && self.discard()
    }

    /// Unit of [`MAX_RANGE_SECTORS`] and of `discard_sector_alignment`, in sectors: what a
    /// discard frees whole, and a whole number of logical blocks.
    fn discard_sectors(&self) -> u32 {
        self.limits
            .discard_granularity
            .max(self.block_size)
            .div_ceil(SECTOR_SIZE as u32)
    }

    /// Most sectors in one segment of a discard or write-zeroes request.
    pub(super) fn max_range_sectors(&self) -> u32 {
        let unit = self.discard_sectors();
        (MAX_RANGE_SECTORS / unit).max(1) * unit
    }

    /// The physical block in bytes: a power of two from `block_size` to [`MAX_PHYSICAL_BLOCK`]
    /// that the optimal size of I/O is a multiple of.
    fn physical_block(&self) -> u32 {
        let divisor = match self.limits.optimal_io {
            0 => 1,
            optimal_io => 1 << optimal_io.trailing_zeros(),
        };
        self.block_size.max(divisor.min(MAX_PHYSICAL_BLOCK))
    }

    /// The configuration space (`struct virtio_blk_config`): fields of features that are not
    /// offered, and padding, are zero.
    pub(super) fn config(&self, capacity: u64, writeback: bool) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut set = |offset: usize, field: &[u8]| {
            config[offset..offset + field.len()].copy_from_slice(field);
        };
        set(0, &capacity.to_le_bytes());
        set(12, &(u32::from(QUEUE_SIZE) - 2).to_le_bytes()); // seg_max
        set(20, &self.block_size.to_le_bytes());

        let physical = self.physical_block() / self.block_size;
        set(24, &[physical.trailing_zeros() as u8]); // physical_block_exp
        // alignment_offset, at 25, is zero: an image begins on a physical block.
        set(26, &(physical as u16).to_le_bytes()); // min_io_size
        let optimal = self.limits.optimal_io / self.block_size;
        if optimal > physical {
            set(28, &optimal.to_le_bytes()); // opt_io_size
        }

        set(CONFIG_WRITEBACK as usize, &[u8::from(writeback)]);
        if self.queues > 1 {
            set(34, &self.queues.to_le_bytes()); // num_queues
        }
        let max_sectors = self.max_range_sectors().to_le_bytes();
        if self.discard() {
            set(36, &max_sectors); // max_discard_sectors
            set(40, &MAX_RANGES.to_le_bytes()); // max_discard_seg
            set(44, &self.discard_sectors().to_le_bytes()); // discard_sector_alignment
        }
        if self.write_zeroes() {
            set(48, &max_sectors); // max_write_zeroes_sectors
            set(52, &MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
            set(56, &[u8::from(self.may_unmap())]); // write_zeroes_may_unmap
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Profile = Profile {
        block_size: 512,
        ro: false,
        sparse: false,
        queues: 1,
        limits: Limits {
            alignment: 1,
            memory_alignment: 1,
            optimal_io: 4096,
            discard_granularity: 0,
            write_zeroes: false,
            resize: true,
        },
    };

    fn u16_at(config: &[u8], offset: usize) -> u16 {
        u16::from_le_bytes(config[offset..][..2].try_into().unwrap())
    }

    fn u32_at(config: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(config[offset..][..4].try_into().unwrap())
    }

    #[test]
    fn a_plain_disk_offers_what_every_disk_backs() {
        let offered = PLAIN.features();
        for bit in [32, 28, 29, 2, 6, 9, 10, 11] {
            assert!(has(offered, bit), "feature {bit}");
        }
        assert_eq!(offered.count_ones(), 8);
    }

    #[test]
    fn discard_is_offered_if_sparse_writable_and_backed() {
        let mut backed = PLAIN;
        backed.sparse = true;
        backed.limits.discard_granularity = 4096;
        backed.limits.write_zeroes = true;
        assert!(has(backed.features(), VIRTIO_BLK_F_DISCARD));
        assert!(has(backed.features(), VIRTIO_BLK_F_WRITE_ZEROES));
        let config = backed.config(0, true);
        assert_eq!(u32_at(&config, 36), 1 << 21);
        assert_eq!(u32_at(&config, 40), MAX_RANGES);
        assert_eq!(u32_at(&config, 44), 8);
        assert_eq!(u32_at(&config, 48), 1 << 21);
        assert_eq!(u32_at(&config, 52), MAX_RANGES);
        assert_eq!(config[56], 1);

        let full = Profile {
            sparse: false,
            ..backed
        };
        assert!(!has(full.features(), VIRTIO_BLK_F_DISCARD));
        assert!(has(full.features(), VIRTIO_BLK_F_WRITE_ZEROES));
        assert_eq!(full.config(0, true)[36..48], [0; 12]);
        assert_eq!(full.config(0, true)[56], 0);

        let ro = Profile { ro: true, ..backed };
        assert!(!has(ro.features(), VIRTIO_BLK_F_DISCARD));
        assert!(!has(ro.features(), VIRTIO_BLK_F_WRITE_ZEROES));
        assert!(has(ro.features(), VIRTIO_BLK_F_RO));
        assert_eq!(ro.config(0, true)[36..], [0; 24]);
    }

    #[test]
    fn discard_limits_are_whole_units_of_the_image() {
        let mut odd = PLAIN;
        odd.sparse = true;
        odd.limits.discard_granularity = 3 << 20;
        assert_eq!(u32_at(&odd.config(0, true), 44), 6144);
        assert_eq!(odd.max_range_sectors() % 6144, 0);
        odd.limits.discard_granularity = 1 << 31;
        assert_eq!(odd.max_range_sectors(), 1 << 22);
        odd.limits.discard_granularity = 1;
        odd.block_size = 4096;
        assert_eq!(u32_at(&odd.config(0, true), 44), 8);
    }

    #[test]
    fn num_queues_exists_only_with_multiqueue() {
        assert_eq!(u16_at(&PLAIN.config(0, true), 34), 0);
        let many = Profile { queues: 4, ..PLAIN };
        assert!(has(many.features(), VIRTIO_BLK_F_MQ));
        assert_eq!(u16_at(&many.config(0, true), 34), 4);
    }

    #[test]
    fn topology_is_in_logical_blocks() {
        let config = PLAIN.config(1 << 40, false);
        assert_eq!(config[..8], (1u64 << 40).to_le_bytes());
        assert_eq!(u32_at(&config, 12), 254);
        assert_eq!(u32_at(&config, 20), 512);
        assert_eq!(config[24..26], [3, 0]);
        assert_eq!(u16_at(&config, 26), 8);
        assert_eq!(u32_at(&config, 28), 0);
        assert_eq!(config[32], 0);

        let mut clusters = PLAIN;
        clusters.limits.optimal_io = 65536;
        clusters.block_size = 4096;
        let config = clusters.config(0, true);
        assert_eq!(config[24], 0);
        assert_eq!(u16_at(&config, 26), 1);
        assert_eq!(u32_at(&config, 28), 16);
        assert_eq!(config[32], 1);
    }

    #[test]
    fn topology_survives_any_optimal_size() {
        for optimal_io in [0, 1, 511, 513, 1536, 1 << 31, u32::MAX] {
            for block_size in [512, 4096, 65536] {
                let mut profile = PLAIN;
                profile.limits.optimal_io = optimal_io;
                profile.block_size = block_size;
                let physical = profile.physical_block();
                assert!(physical.is_power_of_two() && physical >= block_size);
                profile.config(0, true);
            }
        }
    }
}
