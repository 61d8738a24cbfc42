//! A plan carried out.

use std::fs::File;
use std::io;

use super::super::Header;
use super::super::check::CheckError;
use super::super::check::io::{length, read_padded};
use super::super::repair;
use super::plan::Plan;
use super::write;
use crate::host_file::text;

/// Carries a plan out: what is new is written by `tables` and durable before the header, which is
/// told of it, and what is no longer used is given back to the host at last.
pub(super) fn commit(
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
    switch(file, header).map_err(|error| {
        // Which of the two the host has at last is not known, but each of them is whole.
        let text = text(&error);
        io::Error::new(
            error.kind(),
            format!("it may be done, but not durably: {text}"),
        )
    })?;
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
