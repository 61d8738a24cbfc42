//! `launcher disk check`.

use std::path::Path;
use std::time::Instant;

use clap::Args;
use formats::qcow2::{self, Repair};
use formats::{Image, Progress};

use super::image::{self, Which, at_block, format_of, index_of, lone, named};
use crate::cli::output::print;
use crate::cli::target::Target;
use crate::{Error, Result, exit, progress};

/// Check the structure of an image, and repair it
///
/// Every use of a cluster is counted and compared with the refcounts that are stored. Exits with
/// 1 when problems remain.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher disk check --path old.qcow2\n  launcher disk check vm.toml ROOT --repair\n  launcher disk check vm.toml 0"
)]
pub(super) struct Check {
    #[command(flatten)]
    which: Which,
    /// Repair what can be repaired. What might be somebody's data is never freed nor overwritten
    #[arg(long)]
    repair: bool,
}

impl Check {
    pub(super) fn run(self) -> Result<u8> {
        match (self.which.path, self.which.vm, self.which.disk) {
            (Some(path), ..) => {
                let format = format_of(&path, self.which.format.as_deref())?;
                let image = Image {
                    ro: !self.repair,
                    ..lone(&path)
                };
                check(&image, format.name, self.repair, &Error::from)
            }
            (None, vm, disk) => {
                let vm = Target::of(vm)?.config()?;
                let index = index_of(&vm, disk.as_deref().unwrap_or_default())?;
                let block = &vm.block[index];
                let format = named(&block.format)?;
                let image = Image {
                    ro: !self.repair,
                    ..image::image(block)
                };
                check(&image, format.name, self.repair, &|error| {
                    at_block(&vm, index, error)
                })
            }
        }
    }
}

fn check(
    image: &Image,
    format: &str,
    repair: bool,
    refused: &dyn Fn(formats::OpenError) -> Error,
) -> Result<u8> {
    let path = image.path.display();
    if !format.starts_with("qcow2") {
        let message = format!("an image of format `{format}` has no structure to check: `{path}`");
        return Err(Error::failed(message).help("every byte of it is the disk's own"));
    }
    let image = Image {
        o_direct: false,
        ..image.clone()
    };
    let ring = image::ring()?;
    let (_held, file) = image::locked(&ring, &image).map_err(refused)?;
    let bar = bar(&image.path);
    let mut progress = |done, of| bar(done, of);
    let report = match repair {
        true => qcow2::repair(&file, Repair::All, &mut progress),
        false => qcow2::check(&file, &mut progress),
    };
    let report =
        report.map_err(|error| Error::failed(format!("cannot check `{path}`: {error}")))?;
    drop(bar);
    print(&format!("{report}\n"))?;
    match report.is_clean() {
        true => Ok(exit::DONE),
        false => Ok(exit::FAILED),
    }
}

/// Shows how far a check is, in L2 tables, once it has taken a second.
pub(super) fn bar(path: &Path) -> impl Fn(u64, u64) {
    let (hook, start) = (progress::checking(), Instant::now());
    move |done, total| {
        hook(&Progress {
            path,
            done,
            total,
            elapsed: start.elapsed(),
        });
    }
}
