//! `launcher check`.

use std::path::PathBuf;

use clap::Args;

use super::choice::Chosen;
use super::output::{complain, print};
use super::up;
use crate::config::Vm;
use crate::{Result, config, exit, sources, vm};

/// Check the files of VMs, and the host's files that they name, and show every problem
///
/// The kernel is loaded, images are opened as they would be, and read, digests are compared:
/// nothing is created, written, fetched or executed, but that digests are kept in the user's cache.
/// Files that `launcher up` would fetch or build first are no problem, and neither is that a VM runs.
/// Exits with 2 if there is a problem.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher check web/vm.toml\n  launcher check --quick configs/*/vm.toml"
)]
pub(super) struct Check {
    /// TOML files of VMs, or the folders of their vm.toml [default: vm.toml]
    vm: Vec<PathBuf>,
    #[command(flatten)]
    chosen: Chosen,
    /// Look at the TOML files alone
    #[arg(long)]
    quick: bool,
}

impl Check {
    pub(super) fn run(self) -> Result<u8> {
        let mut vms: Vec<_> = self.vm.into_iter().map(Some).collect();
        if vms.is_empty() {
            vms.push(None);
        }
        let choice = self.chosen.choice();
        let mut code = exit::DONE;
        for file in vms.into_iter().map(super::file) {
            let problems = match config::load(&file, &choice) {
                Ok(_) if self.quick => Vec::new(),
                Ok(vm) => {
                    let mut problems = vm::check(&vm, up::engine()?, runs(&vm))?;
                    problems.extend(sources::mistaken(&vm));
                    problems
                }
                Err(error) => vec![error],
            };
            if problems.is_empty() {
                print(&format!("{}: ok\n", file.display()))?;
            }
            for problem in problems {
                if code != exit::DONE {
                    complain(&"");
                }
                complain(&problem);
                code = exit::USAGE;
            }
        }
        Ok(code)
    }
}

/// Whether the VM of this file runs. Where that cannot be told, its disks' locks will.
fn runs(vm: &Vm) -> bool {
    let owner = super::place(vm).and_then(|place| place.owner());
    let file = vm.file.canonicalize().unwrap_or_else(|_| vm.file.clone());
    matches!(owner, Ok(Some(owner)) if owner.file == file)
}
