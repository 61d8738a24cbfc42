//! What each change makes of the tables.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::time::{Duration, SystemTime};

use super::super::check::io::{length, read_padded};
use super::super::check::{CheckError, Subject};
use super::super::header::{MAX_L1_BYTES, MAX_SNAPSHOTS, autoclear};
use super::super::snapshot::{self, Snapshot};
use super::super::{Header, Refusal};
use super::commit::commit;
use super::plan::Plan;
use super::tables::{follow, read_l1, write_followers, write_l1};
use super::write::write;
use super::{MAX_TABLE, Which, check_name, find, next_id, sound};

pub(super) fn create_in(
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
        vm_clock: Duration::ZERO,
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
        Ok(write(file, &bytes, header.snapshots_offset)?)
    })?;
    Ok(snapshot)
}

pub(super) fn apply_in(
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

pub(super) fn delete_in(
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
            false => Ok(write(file, &bytes, header.snapshots_offset)?),
        }
    })?;
    Ok(snapshot)
}

fn plan<'a>(file: &File, subject: &'a Subject) -> io::Result<Plan<'a>> {
    let device_len = match file.metadata()?.is_file() {
        true => None,
        false => Some(length(file)?),
    };
    Ok(Plan::new(&subject.header, &subject.stored, device_len))
}

/// The snapshot table as it is, and where its entries lie in it.
type Entries = (Vec<u8>, Vec<Range<usize>>);

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
