//! How large the crate's caches must be so that nothing is ever evicted from them: what it evicts
//! while it is in use is lost.

use formats::OpenError;
use formats::qcow2::Header;

/// The most that the tables of an image and its backing files may need in memory, in bytes.
pub(crate) const MOST: u64 = 64 << 20;

/// What is in use of an image, in clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Of the file.
    pub(crate) file: u64,
    /// L2 tables.
    pub(crate) l2_tables: u64,
    /// Clusters of data that are written in place.
    pub(crate) data: u64,
    /// Clusters that are kept for some of the disk that reads as zeroes.
    pub(crate) kept: u64,
}

/// The sizes of the crate's caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caches {
    /// log2 of the bytes in an entry, and bytes in all.
    pub(crate) l2: (u8, usize),
    /// As for `l2`.
    pub(crate) refcounts: (u8, usize),
    /// With the L1 table and the refcount table, which are in memory too, in bytes.
    pub(crate) total: u64,
}

/// Entries besides those that are needed. The crate wants two at least.
const MORE: u64 = 2;

impl Caches {
    /// For an image that is written, or only read (`usage` is `None`), in transfers of a multiple
    /// of 1 << `block_bits` bytes. A refusal is what is wrong, of the image.
    pub(crate) fn of(
        header: &Header,
        block_bits: u8,
        usage: Option<Usage>,
    ) -> Result<Caches, OpenError> {
        let cluster_bits = header.cluster_bits as u8;
        let l2_tables = header.l1_entries_for(header.size) + MORE;
        let slice_bits = refcount_slice_bits(header, block_bits)?;
        let per_slice = u64::from(slice_bits) + 3 - u64::from(header.refcount_order);
        let slices = match usage {
            Some(usage) => clusters_at_most(header, usage)?.div_ceil(1 << per_slice),
            None => 0,
        } + MORE;
        let total = l2_tables
            .saturating_mul(1 << cluster_bits)
            .saturating_add(slices.saturating_mul(1 << slice_bits))
            .saturating_add(u64::from(header.l1_size) * 8)
            .saturating_add(u64::from(header.refcount_table_clusters) << cluster_bits);
        within_most(total)?;
        Ok(Caches {
            l2: (cluster_bits, (l2_tables << cluster_bits) as usize),
            refcounts: (slice_bits, (slices << slice_bits) as usize),
            total,
        })
    }
}

/// log2 of the cluster size for a new disk of `size` bytes: 64 KiB, or more if its tables would
/// be too large.
pub(crate) fn cluster_bits_for(size: u64) -> u32 {
    // 8 bytes of L2 table and 2 of refcount block a cluster, and something to spare.
    let fits = |bits: &u32| (size >> bits).saturating_mul(8 + 2) <= MOST / 8 * 7;
    (16..20).find(fits).unwrap_or(20)
}

/// Refuses tables of more than [`MOST`] bytes.
pub(crate) fn within_most(total: u64) -> Result<(), OpenError> {
    match total > MOST {
        true => Err(OpenError {
            message: format!(
                "its tables need up to {} MiB of memory, expected at most {} MiB, for they are \
                 all kept there",
                total.div_ceil(1 << 20),
                MOST >> 20
            ),
            help: Some("set `format = \"qcow2\"`, or convert it to larger clusters".into()),
            key: "format",
        }),
        false => Ok(()),
    }
}

/// log2 of the bytes of a refcount block that are cached, and written, together.
///
/// The crate counts what they cover, in bytes, in 32 bits.
fn refcount_slice_bits(header: &Header, block_bits: u8) -> Result<u8, OpenError> {
    let most = 28 + header.refcount_order - header.cluster_bits.min(28);
    let bits = most.min(header.cluster_bits) as u8;
    match bits >= block_bits {
        true => Ok(bits),
        false => Err(OpenError {
            message: format!(
                "its refcounts of {} bits with clusters of {} KiB are beyond this engine in \
                 blocks of {} bytes",
                1 << header.refcount_order,
                header.cluster_size() >> 10,
                1 << block_bits
            ),
            help: Some("set `format = \"qcow2\"`".into()),
            key: "format",
        }),
    }
}

/// The most clusters that the file can come to have. A new one is the first that is free.
fn clusters_at_most(header: &Header, usage: Usage) -> Result<u64, OpenError> {
    let cluster_bits = header.cluster_bits;
    let data = header
        .size
        .div_ceil(header.cluster_size())
        .saturating_sub(usage.data);
    let l2_tables = header
        .l1_entries_for(header.size)
        .saturating_sub(usage.l2_tables);
    let per_block = cluster_bits + 3 - header.refcount_order;
    let counted = usage.file + data + l2_tables;
    // Each block counts itself, and there may be none yet for a part of the file.
    let blocks = counted.div_ceil((1 << per_block) - 1);
    let most = counted + blocks;
    let table = u64::from(header.refcount_table_clusters) << (cluster_bits - 3);
    match most > table << per_block {
        true => Err(OpenError {
            message: format!(
                "its refcount table is for a file of {} MiB, and the file may grow to {} MiB; \
                 this engine cannot make the table larger",
                (table << per_block << cluster_bits) >> 20,
                (most << cluster_bits) >> 20
            ),
            help: Some("set `format = \"qcow2\"`, or convert it to larger clusters".into()),
            key: "format",
        }),
        false => Ok(most),
    }
}
