//! Refcounts put right in the blocks that there are.

use super::super::check::io::read_padded;
use super::super::check::stored::BlockPlace;
use super::super::check::walk::Walk;
use super::super::check::{CheckError, Subject};
use super::super::refcount;
use super::write::write;

/// Which refcounts are put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// Those that are too high.
    Down,
    /// All of them.
    Both,
}

/// Stores what was counted. Each refcount is right or as it was, whenever it ends.
pub(super) fn store(
    subject: &Subject,
    walk: &Walk<'_>,
    direction: Direction,
) -> Result<(), CheckError> {
    let geometry = walk.geometry;
    let order = geometry.refcount_order;
    let mut block = vec![0; geometry.cluster_size() as usize];
    for index in 0..subject.stored.table.len() {
        let BlockPlace::At(offset) = subject.stored.place(geometry, index) else {
            continue;
        };
        let users = walk.counted.load(offset >> geometry.cluster_bits);
        if users != 1 || subject.stored.unreadable.contains(&(index as u64)) {
            continue;
        }
        let range = subject.stored.counted_by(index as u64);
        let range = range.start..range.end.min(walk.clusters);
        let mut changed = None;
        for cluster in range.clone() {
            let Some(stored) = subject.stored.load(cluster) else {
                continue;
            };
            let counted = walk.counted.load(cluster);
            let wanted = stored != counted
                && match stored > counted {
                    true => !walk.lost,
                    false => direction == Direction::Both,
                };
            if !wanted {
                continue;
            }
            if changed.is_none() {
                read_padded(walk.file, offset, &mut block)?;
            }
            let at = (cluster - range.start) as usize;
            refcount::store(&mut block, order, at, counted);
            let (first, _) = changed.unwrap_or((at, at));
            changed = Some((first, at));
        }
        if let Some((first, last)) = changed {
            let bytes = (first << order) / 8..((last + 1) << order).div_ceil(8);
            let at = offset + bytes.start as u64;
            write(walk.file, &block[bytes], at)?;
        }
    }
    Ok(walk.file.sync_data()?)
}
