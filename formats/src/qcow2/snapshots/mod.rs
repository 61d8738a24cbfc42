//! Internal snapshots of an image that no VM runs with: listed, created, applied, deleted (qcow2
//! specification, "Snapshots").
//!
//! Nothing that the file says is written over. L2 tables whose flags change, L1 tables, the
//! snapshot table and all refcounts that change are written to clusters that nothing uses; once
//! they are durable, one sector, the header's, switches to them. A power cut leaves the image as
//! it was or as it is to be, with no refcount wrong and no cluster leaked at any instant.

mod plan;
mod tables;
mod write;

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use super::check::io::{length, read_padded};
use super::check::{CheckError, Subject};
use super::header::{MAX_HEADER, MAX_L1_BYTES, MAX_SNAPSHOTS, autoclear, incompatible};
use super::repair::{self, Repair, repair};
use super::snapshot::{self, Snapshot};
use super::{Header, Refusal};
use crate::OpenError;
use crate::host_file::{LockedFile, text};
use plan::Plan;
use tables::{follow, read_l1, write_followers, write_l1};

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
/// the error. `progress` is told as by [`check`](super::check), once for every pass.
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

fn create_in(
    file: &File,
    name: &str,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Snapshot, CheckError> {
    check_name(name)?;
    let subject = sound(file, progress, |subject| {
        let snapshots = &subject.snapshots;
        if snapshots.iter().any(|snapshot| snapshot.name == name) {
            return Err(Refusal::new("it has a snapshot of that name already")
                .help("delete that one first, or choose another name"));
        }
        match snapshots.len() < MAX_SNAPSHOTS as usize {
            true => Ok(()),
            false => Err(Refusal::new(format!(
                "it has {MAX_SNAPSHOTS} snapshots, which is as many as there can be"
            ))
            .help("delete one")),
        }
    })?;
    let mut header = subject.header.clone();
    let active = (header.l1_table_offset, header.l1_size);
    let l1_len = u64::from(header.l1_size) * 8;
    let mut plan = plan(file, &subject)?;
    plan.add(&subject.count_uses(file, active, progress)?)?;
    let old = read_l1(file, header.l1_table_offset, header.l1_size)?;
    // Both tables share all L2 tables, so there are no flags in them that set them apart.
    let new = follow(&mut plan, file, &old, 2)?;
    let snapshot = Snapshot {
        l1_table_offset: plan.place(l1_len, 1)?,
        l1_size: header.l1_size,
        id: next_id(&subject.snapshots)?,
        name: name.to_owned(),
        date: SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default(),
        vm_clock: std::time::Duration::ZERO,
        vm_state_size: 0,
        disk_size: Some(header.size),
        icount: None,
    };
    if new != old {
        plan.remove_table(header.l1_table_offset, l1_len)?;
        header.l1_table_offset = plan.place(l1_len, 1)?;
    }
    let (mut bytes, _) = entries(file, &subject)?;
    bytes.extend(snapshot.to_bytes());
    replace_table(&mut plan, &subject, &mut header, &bytes, 1)?;
    commit(file, &mut plan, &mut header, |plan, header| {
        write_followers(plan, file, &old, &new)?;
        write_l1(plan, file, snapshot.l1_table_offset, &new)?;
        if header.l1_table_offset != subject.header.l1_table_offset {
            write_l1(plan, file, header.l1_table_offset, &new)?;
        }
        Ok(write::write(file, &bytes, header.snapshots_offset)?)
    })?;
    Ok(snapshot)
}

fn apply_in(
    file: &File,
    which: Which<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Snapshot, CheckError> {
    let subject = sound(file, progress, |subject| {
        find(&subject.snapshots, which)?;
        let bitmaps = subject.header.bitmaps.filter(|it| it.count > 0);
        match bitmaps.is_some() && subject.header.autoclear_features & autoclear::BITMAPS != 0 {
            true => Err(Refusal::new(
                "it has dirty bitmaps, which would not tell what changes now",
            )
            .help("remove them first: `qemu-img bitmap --remove`")),
            false => Ok(()),
        }
    })?;
    let snapshot = subject.snapshots[find(&subject.snapshots, which)?].clone();
    let mut header = subject.header.clone();
    // Version 2 may not tell; then the size never changed.
    let size = snapshot.disk_size.unwrap_or(header.size);
    let entries = header.l1_entries_for(size);
    if size > i64::MAX as u64 || entries * 8 > MAX_L1_BYTES {
        return Err(Refusal::new(format!(
            "the disk is said to have had {size} bytes, which needs an L1 table of more than \
             {MAX_L1_BYTES}"
        ))
        .into());
    }
    // The state of a VM lies past the end of the disk, where nothing would ever find it.
    let kept = u64::from(snapshot.l1_size).min(entries) as u32;
    let mut plan = plan(file, &subject)?;
    let active = (header.l1_table_offset, header.l1_size);
    plan.remove(&subject.count_uses(file, active, progress)?)?;
    plan.remove_table(header.l1_table_offset, u64::from(header.l1_size) * 8)?;
    let wanted = (snapshot.l1_table_offset, kept);
    plan.add(&subject.count_uses(file, wanted, progress)?)?;
    let mut old = read_l1(file, snapshot.l1_table_offset, kept)?;
    old.resize(entries as usize, 0);
    let new = follow(&mut plan, file, &old, 1)?;
    header.size = size;
    header.l1_size = entries as u32;
    header.l1_table_offset = plan.place(entries * 8, 1)?;
    commit(file, &mut plan, &mut header, |plan, header| {
        write_followers(plan, file, &old, &new)?;
        write_l1(plan, file, header.l1_table_offset, &new)
    })?;
    Ok(snapshot)
}

fn delete_in(
    file: &File,
    which: Which<'_>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Snapshot, CheckError> {
    let subject = sound(file, progress, |subject| {
        find(&subject.snapshots, which).map(|_| ())
    })?;
    let number = find(&subject.snapshots, which)?;
    let snapshot = subject.snapshots[number].clone();
    let mut header = subject.header.clone();
    let l1_len = u64::from(header.l1_size) * 8;
    let mut plan = plan(file, &subject)?;
    let gone = (snapshot.l1_table_offset, snapshot.l1_size);
    plan.remove(&subject.count_uses(file, gone, progress)?)?;
    plan.remove_table(snapshot.l1_table_offset, u64::from(snapshot.l1_size) * 8)?;
    let old = read_l1(file, header.l1_table_offset, header.l1_size)?;
    let new = follow(&mut plan, file, &old, 1)?;
    if new != old {
        plan.remove_table(header.l1_table_offset, l1_len)?;
        header.l1_table_offset = plan.place(l1_len, 1)?;
    }
    let (mut bytes, mut places) = entries(file, &subject)?;
    bytes.drain(places.swap_remove(number));
    replace_table(&mut plan, &subject, &mut header, &bytes, -1)?;
    commit(file, &mut plan, &mut header, |plan, header| {
        write_followers(plan, file, &old, &new)?;
        if header.l1_table_offset != subject.header.l1_table_offset {
            write_l1(plan, file, header.l1_table_offset, &new)?;
        }
        match bytes.is_empty() {
            true => Ok(()),
            false => Ok(write::write(file, &bytes, header.snapshots_offset)?),
        }
    })?;
    Ok(snapshot)
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

fn plan<'a>(file: &File, subject: &'a Subject) -> io::Result<Plan<'a>> {
    let device_len = match file.metadata()?.is_file() {
        true => None,
        false => Some(length(file)?),
    };
    Ok(Plan::new(&subject.header, &subject.stored, device_len))
}

/// The snapshot table as it is, and where its entries lie in it.
type Entries = (Vec<u8>, Vec<std::ops::Range<usize>>);

fn entries(file: &File, subject: &Subject) -> Result<Entries, CheckError> {
    let mut bytes = vec![0; subject.snapshot_table_len as usize];
    read_padded(file, subject.header.snapshots_offset, &mut bytes)?;
    let places = snapshot::places(&bytes, subject.header.nb_snapshots)?;
    Ok((bytes, places))
}

/// Finds a place for a snapshot table of `added` entries more.
fn replace_table(
    plan: &mut Plan<'_>,
    subject: &Subject,
    header: &mut Header,
    bytes: &[u8],
    added: i32,
) -> Result<(), CheckError> {
    if bytes.len() as u64 > MAX_TABLE {
        return Err(Refusal::new(format!(
            "its snapshot table would have {} bytes, expected at most {MAX_TABLE}",
            bytes.len()
        ))
        .help("delete a snapshot")
        .into());
    }
    plan.remove_table(header.snapshots_offset, subject.snapshot_table_len)?;
    header.snapshots_offset = plan.place(bytes.len() as u64, 1)?;
    header.nb_snapshots = header.nb_snapshots.saturating_add_signed(added);
    Ok(())
}

/// Carries a plan out: what is new is written by `tables` and durable before the header, which is
/// told of it, and what is no longer used is given back to the host at last.
fn commit(
    file: &File,
    plan: &mut Plan<'_>,
    header: &mut Header,
    tables: impl FnOnce(&Plan<'_>, &Header) -> Result<(), CheckError>,
) -> Result<(), CheckError> {
    plan.settle()?;
    plan.tell(header);
    header.autoclear_features &= repair::KEPT;
    let regular = file.metadata()?.is_file();
    let len = length(file)?;
    let written = tables(plan, header)
        .and_then(|()| plan.write(file))
        .and_then(|()| Ok(write::sync(file)?));
    if let Err(error) = written {
        if regular && length(file)? > len {
            // Nothing points to what was added, so it does no harm if it stays.
            let _ = write::truncate(file, len);
        }
        return Err(error);
    }
    switch(file, header)?;
    if regular && let Err(error) = give_back(file, plan, len) {
        tracing::debug!("space of an image is not given back to the host: {error}");
    }
    Ok(())
}

/// Has the header say what is true now. All that changes lies in one sector.
fn switch(file: &File, header: &Header) -> io::Result<()> {
    let mut bytes = [0; 96];
    read_padded(file, 0, &mut bytes)?;
    header.patch(&mut bytes);
    let end = if header.version >= 3 { 96 } else { 72 };
    write::write(file, &bytes[24..end], 24)?;
    write::sync(file)
}

/// Frees the host's space of clusters that nothing uses any more; `len` is how long the file was.
fn give_back(file: &File, plan: &Plan<'_>, len: u64) -> io::Result<()> {
    let bits = plan.geometry.cluster_bits;
    let (before, after) = plan.ends();
    // What someone has put behind the last cluster in use is theirs.
    let end = if len <= before { after } else { after.max(len) };
    if end < length(file)? {
        write::truncate(file, end)?;
    }
    let mut result = Ok(());
    plan.each_freed(|first, count| {
        if result.is_ok() && first << bits < end {
            result = write::punch(file, first << bits, count << bits);
        }
    });
    result
}

#[cfg(test)]
mod tests;
