//! `launcher disk info`.

use std::fmt::Write;
use std::path::Path;

use clap::Args;
use formats::qcow2::{self, Report};
use formats::{Format, Image};
use serde::Serialize;

use super::check::bar;
use super::image::{self, Which, format_of, index_of, lone, named, ring};
use super::look::{Listed, Look, look, one_line};
use crate::cli::output::{print, print_json, rough, table};
use crate::cli::target::Target;
use crate::config::size;
use crate::{Error, Result, exit};

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

/// How the clusters of an image lie in its file.
#[derive(Serialize)]
struct Allocation {
    total_clusters: u64,
    allocated_clusters: u64,
    fragmented_clusters: u64,
    compressed_clusters: u64,
    /// Offset of the end of the last cluster in use.
    image_end_offset: u64,
    /// Whether `launcher disk check` has nothing to say.
    clean: bool,
}

impl Info {
    pub(super) fn run(self) -> Result<u8> {
        let known = match (self.which.path, self.which.vm, self.which.disk) {
            (Some(path), ..) => {
                let format = format_of(&path, self.which.format.as_deref())?;
                Known::of(&lone(&path), format, false)?
            }
            (None, vm, disk) => {
                let target = Target::of(vm)?;
                let vm = target.config()?;
                let index = index_of(&vm, disk.as_deref().unwrap_or_default())?;
                let block = &vm.block[index];
                let image = Image {
                    ro: true,
                    ..image::image(block)
                };
                let mut known = Known::of(&image, named(&block.format)?, target.is_running())?;
                if let Some(disk) = target.disks().as_ref().and_then(|disks| disks.get(index)) {
                    known.look.size = Some(disk.size);
                }
                known
            }
        };
        match self.json {
            true => print_json(&known)?,
            false => print(&known.shown())?,
        }
        Ok(exit::DONE)
    }
}

impl Known {
    fn of(image: &Image, format: &'static Format, running: bool) -> Result<Known> {
        let look_at = look(&image.path, format, running)?;
        let mut backing = Vec::new();
        let mut said = look_at
            .qcow2
            .as_ref()
            .and_then(|it| it.backing_format.clone());
        for path in &image.backing {
            let format = format_of(path, said.as_deref())?;
            let found = look(path, format, running)?;
            said = found
                .qcow2
                .as_ref()
                .and_then(|it| it.backing_format.clone());
            backing.push(found);
        }
        let (allocation, not_counted) = match look_at.qcow2 {
            None => (None, None),
            Some(_) if running => (None, Some("a running VM may write to it".to_owned())),
            Some(_) => match allocation(image) {
                Ok(counted) => (Some(counted), None),
                Err(error) => (None, Some(one_line(&error))),
            },
        };
        Ok(Known {
            look: look_at,
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
        if let Some(qcow2) = &look.qcow2 {
            text += &snapshots(&qcow2.snapshots);
        }
        text
    }
}

impl Allocation {
    fn of(report: &Report) -> Allocation {
        Allocation {
            total_clusters: report.total_clusters,
            allocated_clusters: report.allocated_clusters,
            fragmented_clusters: report.fragmented_clusters,
            compressed_clusters: report.compressed_clusters,
            image_end_offset: report.image_end_offset,
            clean: report.is_clean(),
        }
    }

    fn shown(&self) -> String {
        let percent = |part: u64, of: u64| part as f64 * 100.0 / of.max(1) as f64;
        let mut text = format!(
            "{} of {} clusters ({:.2}%), {:.2}% of them fragmented, {:.2}% compressed",
            self.allocated_clusters,
            self.total_clusters,
            percent(self.allocated_clusters, self.total_clusters),
            percent(self.fragmented_clusters, self.allocated_clusters),
            percent(self.compressed_clusters, self.allocated_clusters)
        );
        if !self.clean {
            text += "; it has problems: see `launcher disk check`";
        }
        text
    }
}

/// How an image's clusters lie, counted under a reader's lock: an error if somebody writes to it,
/// or it is too damaged to be counted.
fn allocation(image: &Image) -> Result<Allocation> {
    let image = Image {
        o_direct: false,
        lock: true,
        ..image.clone()
    };
    let ring = ring()?;
    let (_held, file) = image::locked(&ring, &image)?;
    let bar = bar(Path::new(&image.path));
    let report = qcow2::check(&file, &mut |done, of| bar(done, of));
    let report = report.map_err(|error| Error::failed(error.to_string()))?;
    Ok(Allocation::of(&report))
}

/// A size with its bytes, where a unit alone does not say them.
fn exact(bytes: u64) -> String {
    let rough = rough(bytes);
    match rough == size::show(bytes) {
        true => rough,
        false => format!("{rough} ({bytes} bytes)"),
    }
}

/// The table of snapshots, below a blank line.
fn snapshots(all: &[Listed]) -> String {
    if all.is_empty() {
        return String::new();
    }
    let mut rows = vec![["SNAPSHOT", "NAME", "DISK SIZE", "VM STATE", "TAKEN"].map(str::to_owned)];
    for snapshot in all {
        rows.push([
            snapshot.id.escape_debug().to_string(),
            snapshot.name.escape_debug().to_string(),
            snapshot.disk_size.map_or("?".into(), size::show),
            rough(snapshot.vm_state_size),
            date(snapshot.date),
        ]);
    }
    let mut text = "\n".to_owned();
    let _ = write!(text, "{}", table(&rows));
    text
}

/// A second of Unix time as ISO 8601 has it, in UTC.
fn date(seconds: u64) -> String {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March here, so that a leap day is the last of its year; 719468 days are
    // from the first of March of the year 0 to the beginning of 1970.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = match month < 10 {
        true => (era * 400 + year, month + 3),
        false => (era * 400 + year + 1, month - 9),
    };
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_that_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00Z"),
            (951_782_399, "2000-02-28 23:59:59Z"),
            (951_782_400, "2000-02-29 00:00:00Z"),
            (1_709_164_800, "2024-02-29 00:00:00Z"),
            (4_107_542_400, "2100-03-01 00:00:00Z"),
            (1_700_000_000, "2023-11-14 22:13:20Z"),
        ] {
            assert_eq!(date(seconds), text);
        }
        // The table of an image may say anything.
        let _ = date(u64::from(u32::MAX) * 1000);
    }

    #[test]
    fn a_size_says_its_bytes_where_the_unit_does_not() {
        assert_eq!(exact(8 << 30), "8GiB");
        assert_eq!(exact((8 << 30) + 512), "8GiB (8589935104 bytes)");
        assert_eq!(exact(100), "100 bytes");
    }
}
