//! Repairing an image. At every instant the file is no worse than before: refcounts and flags
//! are put right one by one where they are, or written anew where there was nothing, and then the
//! header is switched. What might be someone's data is never freed nor written over.

mod entries;
mod rebuild;
mod refcounts;
mod write;

use std::fs::File;

use super::check::{CheckError, Report, Subject, check};
use super::header::{autoclear, incompatible};
use write::write;

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Leaked clusters are freed.
    Leaks,
    /// Refcounts and the flags that follow from them are put right too.
    All,
}

/// Bits of `autoclear_features` that hold on when metadata is written by one who knows of them.
pub(super) const KEPT: u64 = autoclear::BITMAPS | autoclear::RAW_DATA_FILE;

/// Repairs an image, which nobody else may use meanwhile, and checks it again: the report is of
/// the image as it is now.
///
/// An entry that leads nowhere, or a cluster that two claim, stays as it is and is reported: there
/// is no knowing who is right. Leaked clusters stay too while something leads nowhere, for they
/// may be what it meant. The image is marked as clean and not corrupt once it is.
///
/// `progress` is told as by [`check`], once for every pass.
pub fn repair(
    file: &File,
    what: Repair,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report, CheckError> {
    let before = mend(file, what, progress)?;
    let mut after = check(file, progress)?;
    after.corruptions_fixed = before.corruptions.saturating_sub(after.corruptions);
    after.leaks_fixed = before.leaks.saturating_sub(after.leaks);
    if after.is_sound() {
        mark_sound(file)?;
    }
    Ok(after)
}

/// Returns what was wrong before.
fn mend(
    file: &File,
    what: Repair,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report, CheckError> {
    let subject = Subject::read(file)?;
    let walk = subject.compare(file, progress)?;
    let before = walk.report.clone();
    if before.is_clean() {
        return Ok(before);
    }
    let (entries, rebuild) = (walk.entries, walk.rebuild);
    if what == Repair::Leaks {
        if before.leaks > 0 && !walk.lost {
            clear_autoclear(file, &subject)?;
            refcounts::store(&subject, &walk, refcounts::Direction::Down)?;
        }
        return Ok(before);
    }
    clear_autoclear(file, &subject)?;
    if entries {
        // What these entries say is clear, whatever the refcounts are.
        entries::mend(&subject, &walk, entries::What::Contents)?;
    }
    drop(walk);
    if rebuild {
        rebuild::rebuild(file, &subject, progress)?;
    } else {
        let walk = subject.compare(file, progress)?;
        refcounts::store(&subject, &walk, refcounts::Direction::Both)?;
    }
    // The flags follow from the refcounts as they are now.
    let subject = Subject::read(file)?;
    let walk = subject.compare(file, progress)?;
    if walk.report.corruptions > 0 {
        entries::mend(&subject, &walk, entries::What::Flags)?;
    }
    Ok(before)
}

/// Features that others may have added do not survive a change that does not know of them.
fn clear_autoclear(file: &File, subject: &Subject) -> Result<(), CheckError> {
    let bits = subject.header.autoclear_features;
    if subject.header.version >= 3 && bits & !KEPT != 0 {
        write(file, &(bits & KEPT).to_be_bytes(), 88)?;
        file.sync_data()?;
    }
    Ok(())
}

/// Takes away the bits that say that something is wrong.
fn mark_sound(file: &File) -> Result<(), CheckError> {
    let header = Subject::read(file)?.header;
    let wrong = incompatible::DIRTY | incompatible::CORRUPT;
    if header.incompatible_features & wrong != 0 {
        // What makes it sound is durable first.
        file.sync_data()?;
        let bits = header.incompatible_features & !wrong;
        write(file, &bits.to_be_bytes(), 72)?;
    }
    Ok(file.sync_data()?)
}

#[cfg(test)]
mod tests;
