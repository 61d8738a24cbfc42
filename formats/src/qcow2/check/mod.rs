//! Checking an image: every use of a cluster is counted, and compared with the refcount that is
//! stored.

mod bitmaps;
mod compare;
pub(super) mod io;
mod l2;
pub(super) mod refcounts;
mod report;
pub(super) mod stored;
pub(super) mod walk;

use std::fmt;
use std::fs::File;

use super::header::{MAX_HEADER, MAX_L1_BYTES, be32};
use super::snapshot::{self, Snapshot};
use super::{Header, Refusal};
use refcounts::Refcounts;
pub use report::{Problem, ProblemKind, Report};
use stored::Stored;
use walk::Walk;

/// Why an image could not be checked or repaired.
#[derive(Debug)]
pub enum CheckError {
    /// The host failed.
    Io(std::io::Error),
    /// Its header or snapshot table make no sense, or it is too large to be checked in memory.
    Refused(Refusal),
}

impl fmt::Display for CheckError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CheckError::Io(error) => write!(f, "it cannot be read or written: {error}"),
            CheckError::Refused(refusal) => refusal.fmt(f),
        }
    }
}

impl std::error::Error for CheckError {}

impl From<std::io::Error> for CheckError {
    fn from(error: std::io::Error) -> Self {
        CheckError::Io(error)
    }
}

impl From<Refusal> for CheckError {
    fn from(refusal: Refusal) -> Self {
        CheckError::Refused(refusal)
    }
}

pub(super) fn too_many() -> CheckError {
    CheckError::Refused(Refusal::new(
        "it has more clusters or tables than can be checked in 256 MiB of memory",
    ))
}

/// Checks an image, which nobody may write to meanwhile. Nothing is changed.
///
/// `progress` is told how many of its L2 tables have been read, and how many there are.
/// Backing and data files are not looked at.
pub fn check(file: &File, progress: &mut dyn FnMut(u64, u64)) -> Result<Report, CheckError> {
    let subject = Subject::read(file)?;
    Ok(subject.compare(file, progress)?.report)
}

/// What is known of an image before its L1 tables are followed.
pub(super) struct Subject {
    pub(super) header: Header,
    /// Why the refcount table cannot be where the header says, if that is so.
    no_table: Option<Refusal>,
    pub(super) snapshots: Vec<Snapshot>,
    pub(super) snapshot_table_len: u64,
    pub(super) stored: Stored,
}

impl Subject {
    pub(super) fn read(file: &File) -> Result<Subject, CheckError> {
        let len = io::length(file)?.min(MAX_HEADER as u64);
        let mut bytes = vec![0; len as usize];
        io::read_padded(file, 0, &mut bytes)?;
        let (header, no_table) = match Header::parse(&bytes) {
            Ok(header) => (header, None),
            Err(refusal) => match without_refcounts(&mut bytes) {
                Some(header) => (header, Some(refusal)),
                None => return Err(refusal.into()),
            },
        };
        let (snapshots, table_len) = snapshot::read_unchecked(file, &header)??;
        let stored = match no_table {
            Some(_) => Stored::none(&header),
            None => Stored::read(file, &header)?,
        };
        Ok(Subject {
            header,
            no_table,
            snapshots,
            snapshot_table_len: table_len as u64,
            stored,
        })
    }

    /// Counts everything and compares it with what is stored.
    pub(super) fn compare<'a>(
        &'a self,
        file: &'a File,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Walk<'a>, CheckError> {
        let mut walk = self.count(file, progress)?;
        match &self.no_table {
            Some(refusal) => {
                walk.report.corruption(|| refusal.to_string());
                walk.rebuild = true;
            }
            None => walk.count_refcounts(&self.header)?,
        }
        walk.compare();
        Ok(walk)
    }

    /// Counts everything but the refcount table and its blocks.
    pub(super) fn count<'a>(
        &'a self,
        file: &'a File,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Walk<'a>, CheckError> {
        let header = &self.header;
        let mut walk = Walk::new(file, io::length(file)?, header, &self.stored, progress);
        walk.count_table(0, header.cluster_size(), || "the header".into())?;
        walk.count_l1("", header.l1_table_offset, header.l1_size, true)?;
        self.count_snapshots(&mut walk)?;
        walk.count_l2()?;
        let (offset, len) = (header.snapshots_offset, self.snapshot_table_len);
        walk.count_table(offset, len, || "the snapshot table".into())?;
        walk.count_bitmaps(header)?;
        Ok(walk)
    }

    /// Counts the uses of clusters by the L2 tables of one L1 table and by all below them. Only
    /// for an image that was found sound.
    pub(super) fn count_uses(
        &self,
        file: &File,
        (offset, entries): (u64, u32),
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Refcounts, CheckError> {
        let len = io::length(file)?;
        let mut walk = Walk::new(file, len, &self.header, &self.stored, progress);
        walk.count_l1("", offset, entries, false)?;
        walk.count_l2()?;
        // Its own clusters are counted too by now.
        let bits = self.header.cluster_bits;
        let mut uses = walk.counted;
        for cluster in offset >> bits..(offset + u64::from(entries) * 8).div_ceil(1 << bits) {
            let count = uses.load(cluster).saturating_sub(1);
            uses.store(cluster, count).map_err(|_| too_many())?;
        }
        Ok(uses)
    }

    fn count_snapshots(&self, walk: &mut Walk<'_>) -> Result<(), CheckError> {
        // Tables cannot overlap: all together they are in the file.
        let mut left = walk.file_len;
        for (number, snapshot) in self.snapshots.iter().enumerate() {
            let (offset, size) = (snapshot.l1_table_offset, snapshot.l1_size);
            let len = u64::from(size) * 8;
            let name = format!(" of snapshot `{}`", snapshot.name);
            if self.header.version >= 3 && snapshot.disk_size.is_none() {
                walk.report.corruption(|| {
                    format!("entry {number} of the snapshot table lacks the size of the disk")
                });
            }
            let wrong = if !offset.is_multiple_of(self.header.cluster_size()) {
                Some("is at no cluster's start")
            } else if len > MAX_L1_BYTES {
                Some("is too large")
            } else if len > left {
                Some("lies over others")
            } else {
                None
            };
            match wrong {
                Some(wrong) => walk.astray(1, || format!("the L1 table{name} {wrong}")),
                None => {
                    left -= len;
                    walk.count_l1(&name, offset, size, false)?;
                }
            }
        }
        Ok(())
    }
}

/// The header as it is but for the refcount table, if that alone is what is wrong.
fn without_refcounts(bytes: &mut [u8]) -> Option<Header> {
    let cluster_bits = be32(bytes, 20);
    let place = bytes.get_mut(48..60)?;
    place[..8].copy_from_slice(&1u64.checked_shl(cluster_bits)?.to_be_bytes());
    place[8..].copy_from_slice(&1u32.to_be_bytes());
    Header::parse(bytes).ok()
}

#[cfg(test)]
mod tests;
