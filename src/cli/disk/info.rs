//! `launcher disk info`.

use clap::Args;
use serde::Serialize;

use super::check::{Allocation, checked};
use super::format::format_of;
use super::look::{Look, look, one_line};
use super::snapshots::listing;
use super::which::{Found, Which};
use crate::cli::output::{print, print_json, rough, table};
use crate::config::size;
use crate::{Result, exit};

/// Show what an image is: sizes, format, backing files, snapshots
///
/// Works on running VMs too: the image is read without a lock, and only what a running VM does
/// not change behind the reader's back. How fragmented it is can only be told while nobody
/// writes to it.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher disk info vm.toml ROOT\n  launcher disk info --path old.qcow2 --json\n  launcher disk info vm.toml 0"
)]
pub(super) struct Info {
    #[command(flatten)]
    which: Which,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// All that is known of an image.
#[derive(Serialize)]
struct Known {
    #[serde(flatten)]
    look: Look,
    /// Whether a VM that runs has it.
    running: bool,
    /// The backing files that the VM's file names, in the chain's order.
    backing: Vec<Look>,
    /// None while somebody may write to it, and for formats that do not allocate.
    allocation: Option<Allocation>,
    /// Why the clusters of a qcow2 image were not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_counted: Option<String>,
}

impl Info {
    pub(super) fn run(self) -> Result<u8> {
        let known = Known::of(self.which.find()?)?;
        match self.json {
            true => print_json(&known)?,
            false => print(&known.shown())?,
        }
        Ok(exit::DONE)
    }
}

impl Known {
    fn of(found: Found) -> Result<Known> {
        let running = found.is_running();
        let mut seen = look(found.path(), found.format, running)?;
        if let Some(size) = found.live_size() {
            seen.size = Some(size);
        }
        let said = |look: &Look| look.qcow2.as_ref()?.backing_format.clone();
        let mut backing: Vec<Look> = Vec::new();
        for path in &found.image.backing {
            let format = said(backing.last().unwrap_or(&seen));
            let format = format_of(path, format.as_deref(), None)?;
            backing.push(look(path, format, running)?);
        }
        let (allocation, not_counted) = match seen.qcow2 {
            None => (None, None),
            Some(_) if running => (None, Some("a running VM may write to it".to_owned())),
            Some(_) => match checked(&found, false) {
                Ok(report) => (Some(Allocation::from(&report)), None),
                Err(error) => (None, Some(one_line(&error))),
            },
        };
        Ok(Known {
            look: seen,
            running,
            backing,
            allocation,
            not_counted,
        })
    }

    fn shown(&self) -> String {
        let mut rows = Vec::new();
        let mut row = |what: &str, value: String| rows.push([what.to_owned(), value]);
        let look = &self.look;
        row("image", look.path.clone());
        row("format", look.format.to_owned());
        row(
            "size",
            look.size
                .map_or("not known while it is in use".into(), exact),
        );
        match look.host_size {
            Some(host) => row("on host", exact(host)),
            None => row(
                "on host",
                format!("a block device of {}", exact(look.file_size)),
            ),
        }
        if let Some(qcow2) = &look.qcow2 {
            row("version", qcow2.version.to_string());
            row("clusters", size::show(qcow2.cluster_size));
            row("refcounts", format!("{} bits", qcow2.refcount_bits));
            row("compression", qcow2.compression_type.to_owned());
            let features = match &qcow2.features[..] {
                [] => "none".to_owned(),
                features => features.join(", "),
            };
            row("features", features);
            if let Some(file) = &qcow2.data_file {
                row("data file", file.escape_debug().to_string());
            }
            if let Some(file) = &qcow2.backing_file {
                let format = qcow2.backing_format.as_deref().unwrap_or("not said");
                let (file, format) = (file.escape_debug(), format.escape_debug());
                row("backing file", format!("{file} (format: {format})"));
            }
            if qcow2.bitmaps > 0 {
                row("bitmaps", qcow2.bitmaps.to_string());
            }
        }
        for backing in &self.backing {
            let sizes = format!(
                "{}, {} on the host",
                backing.size.map_or("?".into(), size::show),
                backing.host_size.map_or("?".into(), rough)
            );
            row(
                "based on",
                format!("{} ({}, {sizes})", backing.path, backing.format),
            );
        }
        if let Some(counted) = &self.allocation {
            row("allocation", counted.shown());
        } else if let Some(why) = &self.not_counted {
            row("allocation", format!("not counted: {why}"));
        }
        let mut text = table(&rows);
        if let Some(qcow2) = &look.qcow2
            && !qcow2.snapshots.is_empty()
        {
            text += &format!("\n{}", listing(&qcow2.snapshots));
        }
        text
    }
}

/// A size with its bytes, where a unit alone does not say them.
fn exact(bytes: u64) -> String {
    let rough = rough(bytes);
    match rough == size::show(bytes) {
        true => rough,
        false => format!("{rough} ({bytes} bytes)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_says_its_bytes_where_the_unit_does_not() {
        assert_eq!(exact(8 << 30), "8GiB");
        assert_eq!(exact((8 << 30) + 512), "8GiB (8589935104 bytes)");
        assert_eq!(exact(100), "100 bytes");
    }
}
