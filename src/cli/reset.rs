//! `launcher reset`.

use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;

use clap::Args;
use formats::Ring;

use super::choice::Chosen;
use super::output::{print, rough, table};
use super::target::Target;
use super::up;
use crate::config::Vm;
use crate::reset::{Exchange, Overlay, Plan};
use crate::{Error, Result, exit};

/// Return a VM's disks to their base: what they hold beyond it is dropped
///
/// Each disk that the VM writes, and that has `backing`, becomes a new and empty overlay: made as
/// the old one was, with the `size` of the VM's file, or else the old one's. Disks without
/// `backing` are left alone. The VM must not run. All new images are made before the first takes
/// its place; each does at once, and keeps owner and mode of the old one.
#[derive(Args)]
#[command(after_help = "Examples:\n  launcher reset vm.toml\n  launcher reset --yes vm.toml")]
pub(super) struct Reset {
    /// TOML file of the VM, the folder of its vm.toml, or its name [default: vm.toml]
    vm: Option<PathBuf>,
    /// Do not ask. Needed where there is no terminal to ask on, and for an overlay with internal
    /// snapshots: these were made to be kept, and go too
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    chosen: Chosen,
}

impl Reset {
    pub(super) fn run(self) -> Result<u8> {
        let target = Target::of(self.vm.clone())?;
        if target.is_running() {
            let name = target.name();
            let mut error = Error::failed(format!("`{name}` is running"))
                .help(format!("stop it first: `launcher stop {name}`"));
            error.exit = exit::ALREADY_RUNNING;
            return Err(error);
        }
        let vm = target.config_with(&self.chosen.choice())?;
        // Nobody starts it meanwhile.
        let place = super::place(&vm)?;
        let _claim = place.claim(&up::owner(&vm, self.chosen.laid()))?;
        let plans = plans(&vm)?;
        print(&shown(&plans))?;
        let overlays: Vec<_> = plans
            .into_iter()
            .filter_map(|(index, _, plan)| match plan {
                Plan::Drop(overlay) => Some((index, *overlay)),
                Plan::Leave(_) => None,
            })
            .collect();
        if overlays.is_empty() {
            print("nothing to reset\n")?;
            return Ok(exit::DONE);
        }
        self.consent(&overlays)?;
        let ring = Ring::new(up::engine()?)
            .map_err(|error| Error::failed(format!("cannot set up I/O: {error}")))?;
        let mut exchanges: Vec<Exchange> = Vec::new();
        let count = overlays.len();
        for (index, overlay) in overlays {
            let prepared = overlay.prepare(&ring);
            exchanges.push(prepared.map_err(|error| refused(&vm, index, error))?);
        }
        exchanges.into_iter().try_for_each(Exchange::finish)?;
        let disks = if count == 1 { "disk" } else { "disks" };
        print(&format!("reset {count} {disks}\n"))?;
        Ok(exit::DONE)
    }

    /// Makes sure that the user wants it.
    fn consent(&self, overlays: &[(usize, Overlay)]) -> Result<()> {
        if self.yes {
            return Ok(());
        }
        let kept = |(_, overlay): &&(usize, Overlay)| overlay.snapshots() > 0;
        if let Some((_, overlay)) = overlays.iter().find(kept) {
            let (path, count) = (overlay.path().display(), snapshots(overlay.snapshots()));
            let message = format!("`{path}` has {count}, which would go too");
            return Err(Error::usage(message)
                .help("say `--yes` if they may; `launcher disk snapshot list` shows them"));
        }
        if !io::stdin().is_terminal() {
            let message =
                "what the disks hold would be dropped, and there is no terminal to ask on";
            return Err(Error::usage(message).help("say `--yes` if it may be"));
        }
        print("Drop what they hold? [y/N] ")?;
        let mut answer = String::new();
        // A line is what a terminal gives at most at once.
        io::stdin()
            .lock()
            .read_line(&mut answer)
            .map_err(|error| Error::failed(format!("cannot read the answer: {error}")))?;
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Error::failed("nothing was changed")),
        }
    }
}

/// What would happen to each disk: its index, its image, its plan.
fn plans(vm: &Vm) -> Result<Vec<(usize, String, Plan)>> {
    let disks = vm.block.iter().enumerate();
    disks
        .map(|(index, block)| {
            let plan = Plan::of(block).map_err(|error| refused(vm, index, error))?;
            Ok((index, block.path.display().to_string(), plan))
        })
        .collect()
}

fn shown(plans: &[(usize, String, Plan)]) -> String {
    let rows: Vec<_> = plans
        .iter()
        .map(|(index, path, plan)| {
            let what = match plan {
                Plan::Leave(why) => format!("left alone: {why}"),
                Plan::Drop(overlay) => {
                    let base = overlay.base().display();
                    let size = rough(overlay.host_size());
                    match overlay.snapshots() {
                        0 => format!("{size} would be dropped: back to {base}"),
                        count => format!(
                            "{size} and {} would be dropped: back to {base}",
                            snapshots(count)
                        ),
                    }
                }
            };
            [format!("disk {index}"), path.clone(), what]
        })
        .collect();
    table(&rows)
}

fn snapshots(count: u32) -> String {
    match count {
        1 => "1 internal snapshot".to_owned(),
        count => format!("{count} internal snapshots"),
    }
}

fn refused(vm: &Vm, index: usize, error: formats::OpenError) -> Error {
    let key = match error.key {
        formats::OpenError::HOST => "path",
        key => key,
    };
    let about = format!("block.{index}.{key}");
    Error::from(error).about(about).at(&vm.places)
}
