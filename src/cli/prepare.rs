//! `launcher prepare`.

use std::path::PathBuf;

use clap::Args;

use super::choice::Chosen;
use super::output::{print, table};
use super::target::Target;
use crate::config::{HostFile, Vm};
use crate::sources::{self, Made};
use crate::{Error, Result, config, exit};

/// Fetch and build the files of a VM that are not there, and verify those with a digest
///
/// `launcher up` does the same before it boots.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher prepare vm.toml\n  launcher prepare --rebuild vm.toml"
)]
pub(super) struct Prepare {
    /// TOML file of the VM, or the folder of its vm.toml [default: vm.toml]
    vm: Option<PathBuf>,
    /// Run the commands of `build` even if their files are there; not while the VM runs
    #[arg(long)]
    rebuild: bool,
    #[command(flatten)]
    chosen: Chosen,
}

impl Prepare {
    pub(super) fn run(self) -> Result<u8> {
        if self.rebuild {
            not_running(&Target::of(self.vm.clone())?)?;
        }
        let vm = config::load(&super::file(self.vm), &self.chosen.choice())?;
        let made = sources::make(&vm, self.rebuild)?;
        let files = vm.host_files();
        let files = || files.iter().zip(&made);
        for ((key, file), made) in files() {
            is_had(&vm, key, file, *made)?;
        }
        sources::verify(&vm)?;
        let rows: Vec<_> = files()
            .map(|((key, file), made)| {
                let path = file.path.display().to_string();
                [key.clone(), said(file, *made), path]
            })
            .collect();
        print(&table(&rows))?;
        Ok(exit::DONE)
    }
}

/// Refuses to write the files of a VM that has them open.
fn not_running(target: &Target) -> Result<()> {
    if !target.is_running() {
        return Ok(());
    }
    let name = target.name();
    let message = format!("`{name}` is running: its files are not built again");
    let mut error = Error::failed(message).help(format!("stop it with `launcher stop {name}`"));
    error.exit = exit::ALREADY_RUNNING;
    Err(error)
}

/// Refuses a file that is not there, that nothing makes and that `up` does not create.
fn is_had(vm: &Vm, key: &str, file: &HostFile, made: Made) -> Result<()> {
    let mut disks = vm.block.iter();
    let created = disks.any(|block| block.path == file.path && block.size.is_some());
    if made != Made::Absent || created {
        return Ok(());
    }
    let message = format!(
        "{} is not there, and nothing says where it comes from",
        file.path.display()
    );
    let help = "add a `url` with its `sha256`, or a command that makes it as `build`";
    Err(Error::usage(message)
        .help(help)
        .about(format!("{key}.path"))
        .at(&vm.places))
}

/// What has been done about a file.
fn said(file: &HostFile, made: Made) -> String {
    let made = match made {
        Made::Present => "present",
        Made::Fetched => "fetched",
        Made::Built => "built",
        Made::Absent => "absent, `up` creates it",
    };
    match file.sha256 {
        Some(_) => format!("{made}, verified"),
        None => made.to_owned(),
    }
}
