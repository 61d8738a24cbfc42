//! Checking an image: every use of a cluster is counted, and compared with the refcount that is
//! stored.

mod bitmaps;
mod compare;
pub(super) mod io;
pub(super) mod refcounts;
mod report;
pub(super) mod stored;
pub(super) mod walk;

use std::fmt;
use std::fs::File;

use super::header::{MAX_HEADER, MAX_L1_BYTES};
use super::snapshot::{self, Snapshot};
use super::{Header, Refusal};
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

fn too_many() -> CheckError {
    CheckError::Refused(Refusal::new(
        "it has more clusters or tables than can be checked in 256 MiB of memory",
    ))
}

/// Checks an image, which nobody may write to meanwhile. Nothing is changed.
///
/// `progress` is told how many of its L2 tables have been read, and how many there are.
/// Backing and data files are not looked at.
pub fn check(file: &File, progress: &mut dyn FnMut(u64, u64)) -> Result<Report, CheckError> {
    let header = read_header(file)?;
    let (snapshots, table_len) = snapshot::read_unchecked(file, &header)??;
    let stored = Stored::read(file, &header)?;
    let mut walk = count(
        file,
        &header,
        &stored,
        &snapshots,
        table_len as u64,
        progress,
    )?;
    walk.count_blocks()?;
    walk.compare();
    Ok(walk.report)
}

pub(super) fn read_header(file: &File) -> Result<Header, CheckError> {
    let mut bytes = vec![0; MAX_HEADER.min(io::length(file)?.min(MAX_HEADER as u64) as usize)];
    io::read_padded(file, 0, &mut bytes)?;
    Ok(Header::parse(&bytes)?)
}

/// Counts everything but the refcount blocks.
pub(super) fn count<'a>(
    file: &'a File,
    header: &Header,
    stored: &'a Stored,
    snapshots: &[Snapshot],
    snapshot_table_len: u64,
    progress: &'a mut dyn FnMut(u64, u64),
) -> Result<Walk<'a>, CheckError> {
    let file_len = io::length(file)?;
    let mut walk = Walk::new(file, file_len, header, stored, progress);
    walk.count(0, header.cluster_size(), 1, || "the header".into())?;
    walk.count_l1("", header.l1_table_offset, header.l1_size, true)?;
    // Tables cannot overlap: all together they are in the file.
    let mut left = file_len;
    for (number, snapshot) in snapshots.iter().enumerate() {
        let len = u64::from(snapshot.l1_size) * 8;
        let name = format!(" of snapshot `{}`", snapshot.name);
        if header.version >= 3 && snapshot.disk_size.is_none() {
            walk.report.corruption(|| {
                format!("entry {number} of the snapshot table does not say how large the disk was")
            });
        }
        let wrong = if !snapshot
            .l1_table_offset
            .is_multiple_of(header.cluster_size())
        {
            Some("is at no cluster's start")
        } else if len > MAX_L1_BYTES {
            Some("is too large")
        } else if len > left {
            Some("lies over others")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            walk.report
                .corruption(|| format!("the L1 table{name} {wrong}"));
            continue;
        }
        left -= len;
        walk.count_l1(&name, snapshot.l1_table_offset, snapshot.l1_size, false)?;
    }
    walk.count_l2()?;
    walk.count(header.snapshots_offset, snapshot_table_len, 1, || {
        "the snapshot table".into()
    })?;
    let table_len = u64::from(header.refcount_table_clusters) << header.cluster_bits;
    walk.count(header.refcount_table_offset, table_len, 1, || {
        "the refcount table".into()
    })?;
    walk.count_bitmaps(header)?;
    Ok(walk)
}

#[cfg(test)]
mod tests;
