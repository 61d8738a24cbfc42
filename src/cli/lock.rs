//! `launcher lock`.

use std::path::PathBuf;

use clap::Args;

use super::choice::Chosen;
use super::output::{complain, print};
use crate::lock::{self, Place};
use crate::{Result, config, exit};

/// Lock what a VM boots from, and the machine its guest finds
///
/// Writes the lock file beside the VM's: `vm.lock` for `vm.toml`. It has the digests of all files
/// that the VM never writes (kernel, initrd, read-only and ephemeral images, backing files),
/// format and size of the others, vCPUs, memory, the kernel's command line, what is at each PCI
/// address, and the digests of the ACPI tables and of the PCI configuration spaces. Check it in:
/// `launcher up --locked` then boots the same VM everywhere, or says what differs. docs/lock.md
/// says what counts as a difference. A VM with profiles is another VM, with a lock of its own:
/// `vm@NAME.lock`.
#[derive(Args)]
#[command(after_help = "Examples:\n  launcher lock vm.toml\n  launcher lock --check vm.toml")]
pub(super) struct Lock {
    /// TOML file of the VM, or the folder of its vm.toml [default: vm.toml]
    vm: Option<PathBuf>,
    /// Write nothing: compare the VM with its lock, and exit with 2 if anything differs, which is
    /// said. Nothing is executed or fetched
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    chosen: Chosen,
}

impl Lock {
    pub(super) fn run(self) -> Result<u8> {
        let choice = self.chosen.choice();
        let vm = config::load(&super::file(self.vm), &choice)?;
        let place = Place::of(&vm.file, &choice)?;
        let (file, shown) = (vm.file.display(), place.lock.display());
        if !self.check {
            let what = match lock::write(&vm, &place)? {
                true => format!("wrote {shown}\n"),
                false => format!("{shown} is up to date\n"),
            };
            print(&what)?;
            return Ok(exit::DONE);
        }
        let drift = lock::compare(&vm, &place)?;
        if !drift.is_none() {
            return Err(drift.error(&place));
        }
        if let Some(note) = drift.note() {
            complain(&format!("note: {note}"));
        }
        print(&format!("{file}: as {shown} has it\n"))?;
        Ok(exit::DONE)
    }
}
