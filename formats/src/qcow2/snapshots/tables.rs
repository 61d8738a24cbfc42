//! L1 tables, and the L2 tables whose flags follow from refcounts that change.

use std::fs::File;

use super::super::check::CheckError;
use super::super::check::io::{read_padded, read_table};
use super::super::entry::{COMPRESSED, COPIED, OFFSET_MASK};
use super::super::header::be64;
use super::plan::Plan;
use super::write::write;

/// Reads an L1 table.
pub(super) fn read_l1(file: &File, offset: u64, entries: u32) -> Result<Vec<u64>, CheckError> {
    let mut bytes = vec![0; entries as usize * 8];
    read_padded(file, offset, &mut bytes)?;
    Ok(bytes.chunks(8).map(|entry| be64(entry, 0)).collect())
}

/// Writes an L1 table that begins at a cluster's start where nothing is: whole clusters.
pub(super) fn write_l1(
    plan: &Plan<'_>,
    file: &File,
    offset: u64,
    table: &[u64],
) -> Result<(), CheckError> {
    let cluster_size = plan.geometry.cluster_size() as usize;
    let mut bytes = vec![0; (table.len() * 8).next_multiple_of(cluster_size)];
    for (to, entry) in bytes.chunks_exact_mut(8).zip(table) {
        to.copy_from_slice(&entry.to_be_bytes());
    }
    Ok(write(file, &bytes, offset)?)
}

/// The L1 table that is to take an old one's place in a plan that counts its uses already: its
/// flags say which refcounts will be 1, and an L2 table whose flags have to change has a new
/// place. `users` is how many tables like this one there will be in its stead.
pub(super) fn follow(
    plan: &mut Plan<'_>,
    file: &File,
    old: &[u64],
    users: u64,
) -> Result<Vec<u64>, CheckError> {
    let mut table = vec![0; plan.geometry.cluster_size() as usize];
    let mut new = Vec::with_capacity(old.len());
    for entry in old {
        let place = entry & OFFSET_MASK;
        let mut follower = place;
        if place != 0 && read_table(file, place, &mut table)? && set_flags(plan, &mut table) {
            follower = plan.place(1, users)?;
            plan.release(place >> plan.geometry.cluster_bits, users)?;
        }
        new.push(follower);
    }
    // Only now the refcounts of all L2 tables are known.
    for entry in &mut new {
        if *entry != 0 && plan.refcount_at(*entry) == 1 {
            *entry |= COPIED;
        }
    }
    Ok(new)
}

/// Writes the L2 tables that have a new place.
pub(super) fn write_followers(
    plan: &Plan<'_>,
    file: &File,
    old: &[u64],
    new: &[u64],
) -> Result<(), CheckError> {
    let mut table = vec![0; plan.geometry.cluster_size() as usize];
    for (old, new) in old.iter().zip(new) {
        let (from, to) = (old & OFFSET_MASK, new & OFFSET_MASK);
        if from != to {
            read_padded(file, from, &mut table)?;
            set_flags(plan, &mut table);
            write(file, &table, to)?;
        }
    }
    Ok(())
}

/// Sets the flags of an L2 table as the refcounts to come demand; whether one changes.
fn set_flags(plan: &Plan<'_>, table: &mut [u8]) -> bool {
    let mut changed = false;
    for entry in table.chunks_exact_mut(1 << plan.geometry.l2_entry_bits()) {
        let Some(descriptor) = entry.first_chunk_mut::<8>() else {
            continue;
        };
        let old = u64::from_be_bytes(*descriptor);
        let place = old & OFFSET_MASK;
        if old & COMPRESSED != 0 || place == 0 {
            continue;
        }
        let new = match plan.refcount_at(place) {
            1 => old | COPIED,
            _ => old & !COPIED,
        };
        changed |= new != old;
        *descriptor = new.to_be_bytes();
    }
    changed
}
