//! What the L1 and L2 tables of an image hold: whether the crate can do all of it, and how much
//! is in use (qcow2 specification, "Cluster mapping").

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use formats::qcow2::{self, CheckError, Header, ProblemKind};
use formats::{Buffer, HostFile, OpenError, Segments};

use crate::caches::Usage;
use crate::subset::beyond;

/// An L1 or L2 entry: the refcount of what it points to is exactly one.
const COPIED: u64 = 1 << 63;
/// An L2 entry: compressed data.
const COMPRESSED: u64 = 1 << 62;
/// An L2 entry: reads as zeroes.
const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Looks through the tables. `writable` images must have every cluster for themselves.
pub(crate) async fn survey(
    file: &HostFile,
    header: &Header,
    writable: bool,
) -> Result<Usage, OpenError> {
    let clusters = header.size.div_ceil(header.cluster_size());
    let l2_entries = header.cluster_size() / 8;
    let mut usage = Usage {
        file: file.size().div_ceil(header.cluster_size()),
        ..Usage::default()
    };
    let tables = Tables {
        file,
        header,
        writable,
        end: usage.file << header.cluster_bits,
    };
    let l1_entries = header.l1_entries_for(header.size);
    let l1 = tables.read(header.l1_table_offset, l1_entries).await?;
    let l2 = memory(l2_entries).map_err(|error| unreadable(&error))?;
    for (index, entry) in entries(&l1, l1_entries).into_iter().enumerate() {
        let Some(offset) = tables.l2_table(entry)? else {
            continue;
        };
        usage.l2_tables += 1;
        tables.fill(offset, &l2).await?;
        let first = index as u64 * l2_entries;
        for entry in entries(&l2, l2_entries.min(clusters - first)) {
            match tables.cluster(entry)? {
                Cluster::None => {}
                Cluster::Kept => usage.kept += 1,
                Cluster::Data => usage.data += 1,
            }
        }
    }
    Ok(usage)
}

/// Refuses an image whose refcounts are not those of what is in use of it: what is counted too
/// low would be allocated again. What is counted too high is lost space and nothing else.
pub(crate) fn count(file: &HostFile) -> Result<(), OpenError> {
    // Opened once more, for it may be open with O_DIRECT, which takes whole blocks only.
    let path = format!("/proc/self/fd/{}", file.file().as_raw_fd());
    let file = File::open(path).map_err(|error| unreadable(&error))?;
    let report = match qcow2::check(&file, &mut |_, _| {}) {
        Ok(report) => report,
        Err(CheckError::Io(error)) => return Err(unreadable(&error)),
        Err(CheckError::Refused(refusal)) => {
            return Err(OpenError {
                message: refusal.message,
                help: refusal.help,
                key: "path",
            });
        }
    };
    let mut problems = report.problems.iter();
    match problems.find(|problem| problem.kind != ProblemKind::Leak) {
        Some(problem) => Err(damaged(&problem.what)),
        None if report.corruptions + report.check_errors > 0 => {
            Err(damaged("it has more leaks than are shown, and corruptions"))
        }
        None => Ok(()),
    }
}

/// Makes clusters of zeroes of those that are kept for what reads as zeroes. The crate would put
/// another cluster in the place of one that is kept, and forget it.
///
/// Whatever of this a power cut leaves done, the disk has the same bytes.
pub(crate) async fn fill_kept(file: &HostFile, header: &Header) -> Result<(), OpenError> {
    let unwritable = |error: io::Error| OpenError {
        message: format!("it cannot be written: {error}"),
        help: None,
        key: OpenError::HOST,
    };
    let tables = Tables {
        file,
        header,
        writable: true,
        end: file.size().next_multiple_of(header.cluster_size()),
    };
    let l1_entries = header.l1_entries_for(header.size);
    let l1 = tables.read(header.l1_table_offset, l1_entries).await?;
    let l2_entries = header.cluster_size() / 8;
    let clusters = header.size.div_ceil(header.cluster_size());
    for (index, entry) in entries(&l1, l1_entries).into_iter().enumerate() {
        let Some(offset) = tables.l2_table(entry)? else {
            continue;
        };
        let l2 = tables.read(offset, l2_entries).await?;
        let mapped = l2_entries.min(clusters - index as u64 * l2_entries);
        let mut changed = false;
        for (at, entry) in entries(&l2, mapped).into_iter().enumerate() {
            if let Cluster::Kept = tables.cluster(entry)? {
                let zeroes = file.write_zeroes(entry & OFFSET, header.cluster_size(), true);
                zeroes.await.map_err(unwritable)?;
                l2.slice(at * 8, 8)
                    .copy_from(&(entry & !ZERO).to_be_bytes());
                changed = true;
            }
        }
        if changed {
            file.flush().await.map_err(unwritable)?;
            file.write(offset, l2).await.map_err(unwritable)?;
        }
    }
    file.flush().await.map_err(unwritable)
}

/// What an L2 entry says of a cluster of the file.
enum Cluster {
    /// There is none.
    None,
    /// There is one, but the disk reads as zeroes.
    Kept,
    Data,
}

struct Tables<'a> {
    file: &'a HostFile,
    header: &'a Header,
    writable: bool,
    /// No cluster begins here or later.
    end: u64,
}

impl Tables<'_> {
    async fn read(&self, offset: u64, entries: u64) -> Result<Segments, OpenError> {
        let memory = memory(entries).map_err(|error| unreadable(&error))?;
        self.fill(offset, &memory).await?;
        Ok(memory)
    }

    async fn fill(&self, offset: u64, memory: &Segments) -> Result<(), OpenError> {
        let read = self.file.read_zero_filled(offset, memory.clone());
        read.await.map_err(|error| unreadable(&error))
    }

    /// Where the L2 table of an L1 entry is, if there is one.
    fn l2_table(&self, entry: u64) -> Result<Option<u64>, OpenError> {
        match entry & OFFSET {
            0 => Ok(None),
            offset if self.is_own(entry, entry & !(COPIED | OFFSET)) => Ok(Some(offset)),
            _ => Err(bad_entry("L1", entry)),
        }
    }

    /// The cluster of the file that an L2 entry has, if it may.
    fn cluster(&self, entry: u64) -> Result<Cluster, OpenError> {
        if entry & COMPRESSED != 0 {
            return Err(beyond("it has compressed clusters".into()));
        }
        let zero = entry & ZERO != 0;
        let reserved = entry & !(COPIED | OFFSET | ZERO);
        let offset = entry & OFFSET;
        let good = match offset {
            0 => entry & COPIED == 0 && reserved == 0,
            _ => self.is_own(entry, reserved),
        };
        match (good && (!zero || self.header.version >= 3), offset, zero) {
            (false, ..) => Err(bad_entry("L2", entry)),
            (_, 0, _) => Ok(Cluster::None),
            (_, _, true) => Ok(Cluster::Kept),
            (_, _, false) => Ok(Cluster::Data),
        }
    }

    /// Whether an entry points to a cluster of the file, no other image's if this one is written.
    fn is_own(&self, entry: u64, reserved: u64) -> bool {
        let offset = entry & OFFSET;
        reserved == 0
            && offset.is_multiple_of(self.header.cluster_size())
            && (self.header.cluster_size()..self.end).contains(&offset)
            && (entry & COPIED != 0 || !self.writable)
    }
}

/// Memory for table entries, in whole blocks as O_DIRECT takes them.
fn memory(entries: u64) -> io::Result<Segments> {
    let len = (entries as usize * 8).next_multiple_of(4096);
    Ok(Segments::from_buffer(Buffer::zeroed(len, 4096)?))
}

/// The first `count` entries of a table.
fn entries(table: &Segments, count: u64) -> Vec<u64> {
    let mut bytes = vec![0; count as usize * 8];
    table.copy_to(&mut bytes);
    let (entries, _) = bytes.as_chunks::<8>();
    entries.iter().map(|it| u64::from_be_bytes(*it)).collect()
}

/// The error for a file that the host does not read.
pub(crate) fn unreadable(error: &io::Error) -> OpenError {
    OpenError {
        message: format!("it cannot be read: {error}"),
        help: None,
        key: OpenError::HOST,
    }
}

fn bad_entry(table: &str, entry: u64) -> OpenError {
    damaged(&format!(
        "an {table} entry is {entry:#x}, expected that of a cluster of the file, in use here alone"
    ))
}

fn damaged(what: &str) -> OpenError {
    OpenError {
        message: format!("it is damaged: {what}"),
        help: Some("make a copy, and see what `qemu-img check` says".into()),
        key: "path",
    }
}
