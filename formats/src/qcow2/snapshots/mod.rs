//! Internal snapshots of an image that no VM runs with: listed, created, applied, deleted (qcow2
//! specification, "Snapshots").
//!
//! Nothing that the file says is written over. L2 tables whose flags change, L1 tables, the
//! snapshot table and all refcounts that change are written to clusters that nothing uses; once
//! they are durable, one sector, the header's, switches to them. A power cut leaves the image as
//! it was or as it is to be, with no refcount wrong and no cluster leaked at any instant.

mod change;
mod commit;
mod plan;
mod tables;
mod write;

use std::fs::File;
use std::io;
use std::path::Path;

use super::check::io::{length, read_padded};
use super::check::{CheckError, Subject};
use super::header::{MAX_HEADER, incompatible};
use super::repair::{Repair, repair};
use super::snapshot::{self, Snapshot};
use super::{Header, Refusal};
use crate::OpenError;
use crate::host_file::{LockedFile, text};
use change::{apply_in, create_in, delete_in};

/// Longest name of a snapshot in bytes: that of QEMU.
const MAX_NAME: usize = 255;
/// The longest snapshot table that is changed: many times what names of that length need.
const MAX_TABLE: u64 = 32 << 20;
/// How often a table is read that someone else is changing.
const TRIES: u32 = 8;

/// Which snapshot is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which<'a> {
    /// The one of this name, or of this id if there is no such name. Refused if it is the name
    /// of one and the id of another.
    Name(&'a str),
    /// The one of this id.
    Id(&'a str),
}

/// Lists the snapshots of the image at `path`, in the order of their table. Nothing is locked:
/// the image may be in use.
pub fn list(path: &Path) -> Result<Vec<Snapshot>, OpenError> {
    let file = LockedFile::open_shared(path)?;
    list_of(&file).map_err(|error| failed("list the snapshots of", path, error))
}

/// Creates a snapshot of the image at `path` as it is. It is in use by nobody else, or that is
/// the error. `progress` is told as by [`check`](super::check()), once for every pass.
pub fn create(
    path: &Path,
    name: &str,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Snapshot, OpenError> {
    let file = LockedFile::open(path)?;
    let what = format!("create snapshot `{name}` in");
    create_in(&file, name, progress).map_err(|error| failed(&what, path, error))
}

/// Makes the disk what it was when a snapshot was created, its size too; what it is now is lost
/// unless a snapshot has it. The snapshot stays. The state of a VM in it is not restored.
pub fn apply(
    path: &Path,
    which: Which<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Snapshot, OpenError> {
    let file = LockedFile::open(path)?;
    let what = format!("apply {which} to");
    apply_in(&file, which, progress).map_err(|error| failed(&what, path, error))
}

/// Deletes a snapshot, and gives the space that it alone uses back to the host.
pub fn delete(
    path: &Path,
    which: Which<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Snapshot, OpenError> {
    let file = LockedFile::open(path)?;
    let what = format!("delete {which} from");
    delete_in(&file, which, progress).map_err(|error| failed(&what, path, error))
}

impl std::fmt::Display for Which<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Which::Name(name) => write!(f, "snapshot `{name}`"),
            Which::Id(id) => write!(f, "the snapshot of id {id}"),
        }
    }
}

fn failed(what: &str, path: &Path, error: CheckError) -> OpenError {
    let (why, help) = match error {
        CheckError::Refused(refusal) => (refusal.message, refusal.help),
        CheckError::Io(error) => {
            let full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
            (text(&error), full.then(|| "free some space".to_owned()))
        }
    };
    OpenError {
        message: format!("cannot {what} `{}`: {why}", path.display()),
        help,
        key: OpenError::HOST,
    }
}

fn list_of(file: &File) -> Result<Vec<Snapshot>, CheckError> {
    let header = || -> Result<Header, CheckError> {
        let mut bytes = vec![0; length(file)?.min(MAX_HEADER as u64) as usize];
        read_padded(file, 0, &mut bytes)?;
        Ok(Header::parse(&bytes)?)
    };
    let place = |header: &Header| (header.snapshots_offset, header.nb_snapshots);
    let mut before = header()?;
    for _ in 0..TRIES {
        let read = snapshot::read(file, &before);
        let after = header()?;
        if place(&before) == place(&after) {
            return Ok(read??.0);
        }
        before = after;
    }
    Err(io::Error::other("someone else changes them all the time").into())
}

fn check_name(name: &str) -> Result<(), Refusal> {
    let wrong = match name {
        "" => "is empty".to_owned(),
        _ if name.len() > MAX_NAME => format!("has {} bytes", name.len()),
        _ if name.contains(char::is_control) => "has control characters".to_owned(),
        _ => return Ok(()),
    };
    Err(Refusal::new(format!(
        "the name {wrong}, expected 1 to {MAX_NAME} bytes without control characters"
    )))
}

/// The index of the snapshot that is meant.
fn find(snapshots: &[Snapshot], which: Which<'_>) -> Result<usize, Refusal> {
    let of = |same: &dyn Fn(&Snapshot) -> bool| -> Vec<usize> {
        let all = snapshots.iter().enumerate();
        all.filter(|(_, it)| same(it)).map(|it| it.0).collect()
    };
    let found = match which {
        Which::Id(id) => of(&|it| it.id == id),
        Which::Name(name) => {
            let mut found = of(&|it| it.name == name);
            found.extend(of(&|it| it.id == name && it.name != name));
            found
        }
    };
    match found[..] {
        [one] => Ok(one),
        [] => Err(Refusal::new(match snapshots.len() {
            0 => "it has no snapshots".to_owned(),
            _ => "it has no such snapshot".to_owned(),
        })),
        _ => {
            let ids: Vec<_> = found.iter().map(|at| snapshots[*at].id.as_str()).collect();
            let ids = ids.join(", ");
            let message = format!("it has several that this may mean, of the ids {ids}");
            Err(Refusal::new(message).help("say which one by its id"))
        }
    }
}

/// The id of the next snapshot: the number after the highest one, as QEMU gives them.
fn next_id(snapshots: &[Snapshot]) -> Result<String, Refusal> {
    let number = |id: &str| {
        let digits = id.bytes().take_while(u8::is_ascii_digit).count();
        match &id[..digits] {
            "" => 0,
            digits => digits.parse().unwrap_or(u64::MAX),
        }
    };
    let highest = snapshots.iter().map(|snapshot| number(&snapshot.id)).max();
    let next = highest.unwrap_or(0).checked_add(1);
    next.map(|next| next.to_string())
        .ok_or_else(|| Refusal::new("it has a snapshot of the highest id that there can be"))
}

/// Reads an image in which `wanted` finds nothing to refuse, and which is sound; refcounts that
/// the last writer had postponed are counted first.
fn sound(
    file: &File,
    progress: &mut dyn FnMut(u64, u64),
    wanted: impl Fn(&Subject) -> Result<(), Refusal>,
) -> Result<Subject, CheckError> {
    let mut subject = Subject::read(file)?;
    if subject.header.has(incompatible::CORRUPT) {
        return Err(damaged("it is marked as damaged".to_owned()).into());
    }
    if subject.header.has(incompatible::DATA_FILE) {
        let refusal = "it has an external data file, which cannot have snapshots";
        return Err(Refusal::new(refusal).into());
    }
    if subject.snapshot_table_len > MAX_TABLE {
        return Err(Refusal::new(format!(
            "its snapshot table has {} bytes, expected at most {MAX_TABLE}",
            subject.snapshot_table_len
        ))
        .into());
    }
    wanted(&subject)?;
    if subject.header.has(incompatible::DIRTY) {
        repair(file, Repair::All, progress)?;
        subject = Subject::read(file)?;
    }
    let report = subject.compare(file, progress)?.report.clone();
    if !report.is_sound() {
        let first = report.problems.iter().find(|problem| {
            use super::ProblemKind::{CheckError, Corruption, Overlap};
            matches!(problem.kind, Corruption | CheckError | Overlap)
        });
        let first = first.map_or("too much is wrong", |problem| &problem.what);
        return Err(damaged(format!("it is damaged: {first}")).into());
    }
    Ok(subject)
}

fn damaged(message: String) -> Refusal {
    Refusal::new(message).help("make a copy, and repair it with `qemu-img check -r all`")
}

#[cfg(test)]
mod tests;
