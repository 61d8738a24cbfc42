//! Refcounts written anew, past the end of the file: nothing that is there is touched until the
//! header is switched to them.

use std::collections::BTreeSet;
use std::fs::File;

use super::super::Refusal;
use super::super::check::io::length;
use super::super::check::refcounts::{PAGE, Refcounts};
use super::super::check::stored::BlockPlace;
use super::super::check::walk::Walk;
use super::super::check::{CheckError, Subject, too_many};
use super::super::entry::Geometry;
use super::super::header::MAX_REFCOUNT_TABLE_BYTES;
use super::super::refcount;
use super::write::write;

/// Where the refcount table and its offset are said in the header.
const TABLE_FIELDS: u64 = 48;

pub(super) fn rebuild(
    file: &File,
    subject: &Subject,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), CheckError> {
    // Without the old table and its blocks, which are free afterwards.
    let mut walk = subject.count(file, progress)?;
    let geometry = walk.geometry;
    if walk.lost {
        keep_leaks(subject, &mut walk)?;
    }
    let cluster_size = geometry.cluster_size();
    let start = length(file)?.div_ceil(cluster_size).max(walk.clusters);
    let mut blocks = used_blocks(&walk.counted, geometry);
    let table_clusters = place(&mut blocks, start, geometry)?;
    let len = table_clusters + blocks.len() as u64;
    for cluster in start..start + len {
        let stored = walk.counted.store(cluster, 1);
        stored.map_err(|_| too_many())?;
    }
    let mut table = vec![0; (table_clusters << geometry.cluster_bits) as usize];
    let mut block = vec![0; cluster_size as usize];
    for (number, index) in blocks.iter().enumerate() {
        let first = index << geometry.refcount_block_bits();
        for at in 0..1usize << geometry.refcount_block_bits() {
            let value = walk.counted.load(first + at as u64);
            refcount::store(&mut block, geometry.refcount_order, at, value);
        }
        let offset = (start + table_clusters + number as u64) << geometry.cluster_bits;
        write(file, &block, offset)?;
        let at = *index as usize * 8;
        table[at..at + 8].copy_from_slice(&offset.to_be_bytes());
    }
    let table_offset = start << geometry.cluster_bits;
    write(file, &table, table_offset)?;
    // Durable before anything points to it.
    file.sync_data()?;
    let mut fields = [0; 12];
    fields[..8].copy_from_slice(&table_offset.to_be_bytes());
    fields[8..].copy_from_slice(&(table_clusters as u32).to_be_bytes());
    write(file, &fields, TABLE_FIELDS)?;
    Ok(file.sync_data()?)
}

/// Keeps what seems to be leaked: all that has a refcount, or none that can be believed.
fn keep_leaks(subject: &Subject, walk: &mut Walk<'_>) -> Result<(), CheckError> {
    let geometry = walk.geometry;
    let end = length(walk.file)?.div_ceil(geometry.cluster_size());
    let block_bits = geometry.refcount_block_bits();
    for index in 0..end.div_ceil(1 << block_bits) {
        let believed = matches!(
            subject.stored.place(geometry, index as usize),
            BlockPlace::At(_)
        ) && !subject.stored.unreadable.contains(&index);
        for cluster in index << block_bits..((index + 1) << block_bits).min(end) {
            let stored = match believed {
                true => subject.stored.load(cluster).unwrap_or(1),
                false => 1,
            };
            if stored > walk.counted.load(cluster) {
                let kept = walk.counted.store(cluster, stored);
                kept.map_err(|_| too_many())?;
            }
        }
    }
    Ok(())
}

/// The indexes of the blocks that have something to count.
fn used_blocks(counted: &Refcounts, geometry: Geometry) -> BTreeSet<u64> {
    let mut blocks = BTreeSet::new();
    for page in counted.pages() {
        for cluster in page * PAGE..(page + 1) * PAGE {
            let index = cluster >> geometry.refcount_block_bits();
            if counted.load(cluster) > 0 {
                blocks.insert(index);
            }
        }
    }
    blocks
}

/// Adds the blocks that count the new table and all blocks, which are to lie from cluster `start`
/// on. Returns the length of the table in clusters.
fn place(blocks: &mut BTreeSet<u64>, start: u64, geometry: Geometry) -> Result<u64, CheckError> {
    let bits = geometry.refcount_block_bits();
    let mut table_clusters = 1;
    loop {
        let before = (table_clusters, blocks.len());
        let end = start + table_clusters + blocks.len() as u64;
        blocks.extend(start >> bits..=(end - 1) >> bits);
        let entries = blocks.last().map_or(0, |last| last + 1);
        table_clusters = (entries * 8).div_ceil(geometry.cluster_size());
        let table_len = table_clusters << geometry.cluster_bits;
        if table_len > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Refusal::new(format!(
                "its refcounts need a table of {table_len} bytes, expected at most \
                 {MAX_REFCOUNT_TABLE_BYTES}"
            ))
            .help("convert it to an image with larger clusters")
            .into());
        }
        if (table_clusters, blocks.len()) == before {
            return Ok(table_clusters);
        }
    }
}
