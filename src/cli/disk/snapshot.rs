//! `launcher disk snapshot`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use formats::qcow2::snapshots;

use super::snapshots::{Listed, listing, shown, utc};
use super::which::{Found, Lone, Which};
use crate::cli::output::{complain, print, print_json};
use crate::config::size;
use crate::{Error, Result, exit, progress};

/// Keep what a disk holds now inside its qcow2 image, and bring it back
///
/// Only `list` works while a VM uses the image.
#[derive(Args)]
#[command(after_help = "Example:\n  launcher disk snapshot create vm.toml 0 before-upgrade")]
pub(super) struct Snapshot {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Create(Create),
    List(List),
    Apply(Apply),
    Delete(Delete),
}

/// Keep what a disk holds now as a snapshot
#[derive(Args)]
#[command(
    override_usage = "launcher disk snapshot create <VM> <INDEX|ID> <NAME>\n       \
                      launcher disk snapshot create --path <IMAGE> <NAME>",
    after_help = "Examples:\n  launcher disk snapshot create vm.toml 0 before-upgrade\n  \
                  launcher disk snapshot create --path root.qcow2 before-upgrade"
)]
struct Create {
    #[command(flatten)]
    named: Named,
}

/// List the snapshots of a disk, of a running VM too
#[derive(Args)]
#[command(after_help = "Examples:\n  launcher disk snapshot list vm.toml 0\n  \
                  launcher disk snapshot list --path root.qcow2 --json")]
struct List {
    #[command(flatten)]
    which: Which,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Make a disk what it was when a snapshot was created: what it holds now is lost
#[derive(Args)]
#[command(
    override_usage = "launcher disk snapshot apply [--id] <VM> <INDEX|ID> <NAME>\n       \
                      launcher disk snapshot apply [--id] --path <IMAGE> <NAME>",
    after_help = "Example:\n  launcher disk snapshot apply vm.toml 0 before-upgrade"
)]
struct Apply {
    #[command(flatten)]
    one: One,
}

/// Delete a snapshot; the disk stays as it is
#[derive(Args)]
#[command(
    override_usage = "launcher disk snapshot delete [--id] <VM> <INDEX|ID> <NAME>\n       \
                      launcher disk snapshot delete [--id] --path <IMAGE> <NAME>",
    after_help = "Examples:\n  launcher disk snapshot delete vm.toml 0 before-upgrade\n  \
                  launcher disk snapshot delete vm.toml 0 --id 3"
)]
struct Delete {
    #[command(flatten)]
    one: One,
}

/// A disk, and the name of a snapshot of it.
#[derive(Args)]
struct Named {
    /// TOML file of the VM, the folder of its vm.toml, or its name; with --path, the
    /// snapshot's NAME instead
    #[arg(value_name = "VM")]
    first: String,
    /// The disk: its index over `[[block]]` from 0, or its id
    #[arg(
        value_name = "INDEX|ID",
        required_unless_present = "path",
        conflicts_with = "path"
    )]
    disk: Option<String>,
    /// Name of the snapshot
    #[arg(required_unless_present = "path", conflicts_with = "path")]
    name: Option<String>,
    #[command(flatten)]
    lone: Lone,
}

/// A snapshot that there is.
#[derive(Args)]
struct One {
    #[command(flatten)]
    named: Named,
    /// NAME is the snapshot's id
    #[arg(long)]
    id: bool,
}

impl Snapshot {
    pub(super) fn run(self) -> Result<u8> {
        match self.command {
            Command::Create(create) => create.run()?,
            Command::List(list) => list.run()?,
            Command::Apply(apply) => apply.run()?,
            Command::Delete(delete) => delete.run()?,
        }
        Ok(exit::DONE)
    }
}

impl Create {
    fn run(self) -> Result<()> {
        let (disk, name) = self.named.find()?;
        let path = disk.changeable()?;
        let snapshot = snapshots::create(path, &name, &mut progress::reading(path))?;
        print(&format!(
            "created snapshot `{}`, id {}, in {}\n",
            shown(&snapshot.name),
            shown(&snapshot.id),
            path.display()
        ))
    }
}

impl List {
    fn run(self) -> Result<()> {
        let disk = with_snapshots(self.which)?;
        let snapshots = snapshots::list(disk.path())?;
        let listed: Vec<_> = snapshots.iter().map(Listed::from).collect();
        match self.json {
            true => print_json(&listed),
            false => print(&listing(&listed)),
        }
    }
}

impl Apply {
    fn run(self) -> Result<()> {
        let (disk, name) = self.one.named.find()?;
        let path = disk.changeable()?;
        let which = which(&name, self.one.id);
        let snapshot = snapshots::apply(path, which, &mut progress::reading(path))?;
        print(&format!(
            "{} is as in snapshot `{}` of {}\n",
            path.display(),
            shown(&snapshot.name),
            utc(snapshot.date)
        ))?;
        if snapshot.vm_state_size > 0 {
            complain(&"note: the state of the VM that is in the snapshot was not restored");
        }
        let declared = disk.block().and_then(|block| block.size);
        if let (Some(declared), Some(now)) = (declared, snapshot.disk_size)
            && declared != now
        {
            let then = match declared < now {
                true => "refuses the larger image",
                false => "grows it to that",
            };
            complain(&format!(
                "note: the disk has {} again, but its `size` is {}: the next `launcher up` {then}",
                size::show(now),
                size::show(declared)
            ));
        }
        Ok(())
    }
}

impl Delete {
    fn run(self) -> Result<()> {
        let (disk, name) = self.one.named.find()?;
        let path = disk.changeable()?;
        let which = which(&name, self.one.id);
        let snapshot = snapshots::delete(path, which, &mut progress::reading(path))?;
        print(&format!(
            "deleted snapshot `{}`, id {}, from {}\n",
            shown(&snapshot.name),
            shown(&snapshot.id),
            path.display()
        ))
    }
}

fn which(name: &str, id: bool) -> snapshots::Which<'_> {
    match id {
        true => snapshots::Which::Id(name),
        false => snapshots::Which::Name(name),
    }
}

impl Named {
    /// The disk, and the name of a snapshot.
    fn find(self) -> Result<(Found, String)> {
        let (vm, name) = match self.name {
            Some(name) => (Some(PathBuf::from(self.first)), name),
            None => (None, self.first),
        };
        let which = Which {
            vm,
            disk: self.disk,
            lone: self.lone,
        };
        Ok((with_snapshots(which)?, name))
    }
}

/// A disk whose image can have snapshots.
fn with_snapshots(which: Which) -> Result<Found> {
    let found = which.find()?;
    match found.format.name {
        "qcow2" => Ok(found),
        name => Err(Error::usage(format!(
            "`{}` is {name}, which has no snapshots, expected qcow2",
            found.path().display()
        ))),
    }
}
