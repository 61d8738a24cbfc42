//! `launcher check`.

use std::path::PathBuf;

use clap::Args;

use super::output::{complain, print};
use crate::{Result, config, exit};

/// Check the TOML files of VMs and show every mistake
#[derive(Args)]
#[command(after_help = "Example:\n  launcher check configs/*/vm.toml")]
pub(super) struct Check {
    /// TOML files of VMs, or the folders of their vm.toml [default: vm.toml]
    vm: Vec<PathBuf>,
}

impl Check {
    pub(super) fn run(self) -> Result<u8> {
        let mut vms: Vec<_> = self.vm.into_iter().map(Some).collect();
        if vms.is_empty() {
            vms.push(None);
        }
        let mut code = exit::DONE;
        for file in vms.into_iter().map(super::file) {
            match config::load(&file) {
                Ok(_) => print(&format!("{}: ok\n", file.display()))?,
                Err(error) => {
                    if code != exit::DONE {
                        complain(&"");
                    }
                    complain(&error);
                    code = error.exit;
                }
            }
        }
        Ok(code)
    }
}
