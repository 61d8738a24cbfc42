//! `launcher disk check`.

use clap::Args;
use formats::Image;
use formats::qcow2::{self, ProblemKind, Repair, Report};
use serde::Serialize;

use super::format::is_qcow2;
use super::image::{locked, ring};
use super::which::{Found, Which};
use crate::cli::output::{print, print_json};
use crate::{Error, Result, exit, progress};

/// Check the structure of an image, and repair it
///
/// Every use of a cluster is counted and compared with the refcounts that are stored. Exits with
/// 1 when problems remain.
#[derive(Args)]
#[command(after_help = "Examples:\n  launcher disk check vm.toml 0\n  \
                  launcher disk check vm.toml ROOT --repair\n  \
                  launcher disk check --path old.qcow2 --json")]
pub(super) struct Check {
    #[command(flatten)]
    which: Which,
    /// Repair what can be repaired. What might be somebody's data is never freed nor overwritten
    #[arg(long)]
    repair: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a check found, as programs see it.
#[derive(Serialize)]
struct Checked<'a> {
    path: String,
    format: &'static str,
    corruptions: u64,
    leaks: u64,
    check_errors: u64,
    overlaps: u64,
    corruptions_fixed: u64,
    leaks_fixed: u64,
    #[serde(flatten)]
    allocation: Allocation,
    problems: Vec<Problem<'a>>,
    /// How many there are that `problems` does not have.
    more_problems: u64,
}

#[derive(Serialize)]
struct Problem<'a> {
    kind: &'static str,
    what: &'a str,
}

/// How the clusters of an image lie in its file.
#[derive(Serialize)]
pub(super) struct Allocation {
    total_clusters: u64,
    allocated_clusters: u64,
    fragmented_clusters: u64,
    compressed_clusters: u64,
    /// Offset of the end of the last cluster in use.
    image_end_offset: u64,
    /// Whether a check finds nothing wrong.
    clean: bool,
}

impl Check {
    pub(super) fn run(self) -> Result<u8> {
        let found = self.which.find()?;
        if !is_qcow2(found.format) {
            let (format, path) = (found.format.name, found.path().display());
            let message =
                format!("an image of format `{format}` has no structure to check: `{path}`");
            return Err(Error::failed(message).help("every byte of it is the disk's own"));
        }
        let report = checked(&found, self.repair)?;
        match self.json {
            true => print_json(&Checked::of(&found, &report))?,
            false => print(&format!("{report}\n"))?,
        }
        match report.is_clean() {
            true => Ok(exit::DONE),
            false => Ok(exit::FAILED),
        }
    }
}

/// Checks a qcow2 image under its lock: an error if somebody writes to it, or it is too damaged
/// to be counted.
pub(super) fn checked(found: &Found, repair: bool) -> Result<Report> {
    if repair {
        found.changeable()?;
    }
    let image = Image {
        ro: !repair,
        o_direct: false,
        lock: true,
        ..found.image.clone()
    };
    let ring = ring()?;
    let (_held, file) = locked(&ring, &image).map_err(|error| found.refused(error))?;
    let mut bar = progress::checking(found.path());
    let report = match repair {
        true => qcow2::repair(&file, Repair::All, &mut bar),
        false => qcow2::check(&file, &mut bar),
    };
    let path = found.path().display();
    report.map_err(|error| Error::failed(format!("cannot check `{path}`: {error}")))
}

impl<'a> Checked<'a> {
    fn of(found: &Found, report: &'a Report) -> Checked<'a> {
        let problems = report.problems.iter().map(|problem| Problem {
            kind: match problem.kind {
                ProblemKind::Corruption => "corruption",
                ProblemKind::Leak => "leak",
                ProblemKind::CheckError => "check_error",
                ProblemKind::Overlap => "overlap",
            },
            what: &problem.what,
        });
        Checked {
            path: found.path().display().to_string(),
            format: found.format.name,
            corruptions: report.corruptions,
            leaks: report.leaks,
            check_errors: report.check_errors,
            overlaps: report.overlaps,
            corruptions_fixed: report.corruptions_fixed,
            leaks_fixed: report.leaks_fixed,
            allocation: Allocation::from(report),
            problems: problems.collect(),
            more_problems: report.more_problems,
        }
    }
}

impl From<&Report> for Allocation {
    fn from(report: &Report) -> Self {
        Allocation {
            total_clusters: report.total_clusters,
            allocated_clusters: report.allocated_clusters,
            fragmented_clusters: report.fragmented_clusters,
            compressed_clusters: report.compressed_clusters,
            image_end_offset: report.image_end_offset,
            clean: report.is_clean(),
        }
    }
}

impl Allocation {
    pub(super) fn shown(&self) -> String {
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
