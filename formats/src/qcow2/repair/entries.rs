//! Entries of the active L1 table and of its L2 tables put right.

use super::super::check::io::{read_padded, read_table};
use super::super::check::walk::Walk;
use super::super::check::{CheckError, Subject};
use super::super::entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use super::super::header::be64;
use super::write::write;

/// How much of the L1 table is read at once.
const CHUNK: u64 = 1 << 20;

/// What is put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// What does not depend on refcounts: the impossible flag of compressed clusters, and places
    /// that cannot be, kept for zeroes.
    Contents,
    /// The flags that say that a refcount is 1.
    Flags,
}

/// Puts right what can be. A table in a cluster that something else claims too is left alone.
pub(super) fn mend(subject: &Subject, walk: &Walk<'_>, what: What) -> Result<(), CheckError> {
    let header = &subject.header;
    let (offset, len) = (header.l1_table_offset, u64::from(header.l1_size) * 8);
    let bits = header.cluster_bits;
    let ours = |cluster| walk.counted.load(cluster) == 1;
    let l1_is_ours = (offset >> bits..(offset + len).div_ceil(1 << bits)).all(ours);
    let mut tables = Vec::new();
    let mut done = 0;
    while done < len {
        let mut part = vec![0; CHUNK.min(len - done) as usize];
        read_padded(walk.file, offset + done, &mut part)?;
        let mut changed = false;
        for entry in part.chunks_exact_mut(8) {
            let old = be64(entry, 0);
            let table = old & OFFSET_MASK;
            if table == 0 || walk.geometry.in_cluster(table) != 0 {
                continue;
            }
            tables.push(table);
            if what == What::Flags && l1_is_ours {
                let new = with_flag(old, subject.stored.load(table >> bits));
                changed |= new != old;
                entry.copy_from_slice(&new.to_be_bytes());
            }
        }
        if changed {
            write(walk.file, &part, offset + done)?;
        }
        done += part.len() as u64;
    }
    tables.sort_unstable();
    tables.dedup();
    let mut table = vec![0; header.cluster_size() as usize];
    for offset in tables {
        let cluster = offset >> bits;
        // Only L1 tables have a use for it.
        let ours = walk.counted.load(cluster) == walk.table_uses.load(cluster);
        if ours && offset < walk.file_len && read_table(walk.file, offset, &mut table)? {
            mend_table(subject, walk, what, offset, &mut table)?;
        }
    }
    Ok(walk.file.sync_data()?)
}

fn mend_table(
    subject: &Subject,
    walk: &Walk<'_>,
    what: What,
    offset: u64,
    table: &mut [u8],
) -> Result<(), CheckError> {
    let size = 1 << walk.geometry.l2_entry_bits();
    let mut changed: Option<(usize, usize)> = None;
    for (index, entry) in table.chunks_exact_mut(size).enumerate() {
        let Some(descriptor) = entry.first_chunk_mut::<8>() else {
            continue;
        };
        let old = u64::from_be_bytes(*descriptor);
        let new = match what {
            What::Contents => contents(subject, walk, old),
            What::Flags => flags(subject, walk, old),
        };
        if new != old {
            *descriptor = new.to_be_bytes();
            let first = changed.map_or(index, |(first, _)| first);
            changed = Some((first, index + 1));
        }
    }
    if let Some((first, end)) = changed {
        let bytes = &table[first * size..end * size];
        write(walk.file, bytes, offset + (first * size) as u64)?;
    }
    Ok(())
}

fn contents(subject: &Subject, walk: &Walk<'_>, entry: u64) -> u64 {
    if entry & COMPRESSED != 0 {
        return entry & !COPIED;
    }
    let unaligned = walk.geometry.in_cluster(entry & OFFSET_MASK) != 0;
    let zero = entry & ZERO != 0 && !walk.geometry.extended && subject.header.version >= 3;
    match unaligned && zero {
        // It reads as zeroes wherever its place is.
        true => ZERO,
        false => entry,
    }
}

fn flags(subject: &Subject, walk: &Walk<'_>, entry: u64) -> u64 {
    let place = entry & OFFSET_MASK;
    match walk.geometry.external {
        _ if entry & COMPRESSED != 0 => entry,
        true if place != 0 => entry | COPIED,
        false if place != 0 => {
            let cluster = place >> walk.geometry.cluster_bits;
            let stored = subject.stored.load(cluster);
            with_flag(entry, stored.map(|it| it.max(walk.counted.load(cluster))))
        }
        _ => entry,
    }
}

/// The entry with the flag that the refcount of its place means, if that is known.
fn with_flag(entry: u64, refcount: Option<u64>) -> u64 {
    match refcount {
        None => entry,
        Some(1) => entry | COPIED,
        Some(_) => entry & !COPIED,
    }
}
