//! `launcher disk snapshot`.

mod listing;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use formats::qcow2::snapshots::{self, Which};
use formats::{find, for_extension};

use crate::cli::output::{complain, print, print_json};
use crate::config::{self, Block, Vm, size};
use crate::{Error, Result, exit};
use listing::{Listed, listing, shown, utc};

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
    after_help = "Example:\n  launcher disk snapshot create vm.toml 0 before-upgrade"
)]
struct Create {
    #[command(flatten)]
    named: Named,
}

/// List the snapshots of a disk; of a running VM's too
#[derive(Args)]
#[command(
    override_usage = "launcher disk snapshot list [--json] <VM> <INDEX|ID>\n       \
                      launcher disk snapshot list [--json] --path <IMAGE>",
    after_help = "Example:\n  launcher disk snapshot list vm.toml 0"
)]
struct List {
    #[command(flatten)]
    image: Image,
    /// TOML file of the VM, or its folder, and the disk: its index over [[block]] from 0, or its id
    #[arg(value_name = "VM INDEX|ID", num_args = 0..=2)]
    words: Vec<String>,
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
    named: Named,
    /// NAME is the snapshot's id
    #[arg(long)]
    id: bool,
}

/// Delete a snapshot; the disk stays as it is
#[derive(Args)]
#[command(
    override_usage = "launcher disk snapshot delete [--id] <VM> <INDEX|ID> <NAME>\n       \
                      launcher disk snapshot delete [--id] --path <IMAGE> <NAME>",
    after_help = "Example:\n  launcher disk snapshot delete vm.toml 0 before-upgrade"
)]
struct Delete {
    #[command(flatten)]
    named: Named,
    /// NAME is the snapshot's id
    #[arg(long)]
    id: bool,
}

/// An image that no VM's file describes.
#[derive(Args)]
struct Image {
    /// An image, instead of a VM's disk
    #[arg(long, value_name = "IMAGE")]
    path: Option<PathBuf>,
    /// Format of that image [default: the one that its extension stands for]
    #[arg(long, requires = "path")]
    format: Option<String>,
}

/// A disk, and the name of a snapshot of it.
#[derive(Args)]
struct Named {
    #[command(flatten)]
    image: Image,
    /// TOML file of the VM, or its folder; the disk: its index over [[block]] from 0, or its id;
    /// and the snapshot's name. With --path the name alone
    #[arg(value_name = "VM INDEX|ID NAME", required = true, num_args = 1..=3)]
    words: Vec<String>,
}

/// A disk that a command line means.
struct Disk {
    path: PathBuf,
    /// Its part of a VM's file, if that describes it.
    block: Option<Block>,
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
        let (disk, name) = self.named.disk()?;
        let snapshot = snapshots::create(disk.changeable()?, &name, &mut |_, _| {})?;
        print(&format!(
            "created snapshot `{}`, id {}, in {}\n",
            shown(&snapshot.name),
            shown(&snapshot.id),
            disk.path.display()
        ))
    }
}

impl List {
    fn run(self) -> Result<()> {
        let disk = match (self.image.path, &self.words[..]) {
            (Some(path), []) => Disk::lone(path, self.image.format.as_deref())?,
            (None, [vm, disk]) => Disk::of_vm(vm, disk)?,
            (Some(_), _) => return Err(with_path("nothing else")),
            (None, _) => return Err(wanted("a VM and the index or id of a disk")),
        };
        let snapshots = snapshots::list(&disk.path)?;
        match self.json {
            true => print_json(&snapshots.iter().map(Listed::from).collect::<Vec<_>>()),
            false => print(&listing(&snapshots)),
        }
    }
}

impl Apply {
    fn run(self) -> Result<()> {
        let (disk, name) = self.named.disk()?;
        let path = disk.changeable()?;
        let snapshot = snapshots::apply(path, which(&name, self.id), &mut |_, _| {})?;
        print(&format!(
            "{} is as in snapshot `{}` of {}\n",
            path.display(),
            shown(&snapshot.name),
            utc(snapshot.date)
        ))?;
        if snapshot.vm_state_size > 0 {
            complain(&"note: the state of the VM that is in the snapshot was not restored");
        }
        let declared = disk.block.as_ref().and_then(|block| block.size);
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
        let (disk, name) = self.named.disk()?;
        let path = disk.changeable()?;
        let snapshot = snapshots::delete(path, which(&name, self.id), &mut |_, _| {})?;
        print(&format!(
            "deleted snapshot `{}`, id {}, from {}\n",
            shown(&snapshot.name),
            shown(&snapshot.id),
            path.display()
        ))
    }
}

fn which(name: &str, id: bool) -> Which<'_> {
    match id {
        true => Which::Id(name),
        false => Which::Name(name),
    }
}

impl Named {
    /// The disk, and the name of a snapshot.
    fn disk(self) -> Result<(Disk, String)> {
        match (self.image.path, &self.words[..]) {
            (Some(path), [name]) => {
                let disk = Disk::lone(path, self.image.format.as_deref())?;
                Ok((disk, name.clone()))
            }
            (None, [vm, disk, name]) => Ok((Disk::of_vm(vm, disk)?, name.clone())),
            (Some(_), _) => Err(with_path("the snapshot's name alone")),
            (None, _) => Err(wanted(
                "a VM, the index or id of a disk, and a snapshot's name",
            )),
        }
    }
}

fn with_path(what: &str) -> Error {
    Error::usage(format!("with `--path` goes {what}, no VM and no disk"))
}

fn wanted(what: &str) -> Error {
    Error::usage(format!("expected {what}"))
        .help("see `launcher disk snapshot --help`; for an image without a VM: `--path IMAGE`")
}

impl Disk {
    /// An image that no VM's file describes. Its format is never guessed from content.
    fn lone(path: PathBuf, format: Option<&str>) -> Result<Disk> {
        let name = match format {
            Some(name) => find(name).map(|format| format.name).ok_or_else(|| {
                Error::usage(format!(
                    "`--format` is {name:?}, expected the name of a format"
                ))
                .help("see `launcher formats`")
            })?,
            None => {
                let extension = path.extension().and_then(|extension| extension.to_str());
                let found = extension.and_then(for_extension).map(|format| format.name);
                found.ok_or_else(|| {
                    let shown = path.display();
                    Error::usage(format!(
                        "the name `{shown}` does not tell the image's format"
                    ))
                    .help("add `--format qcow2` if it is qcow2")
                })?
            }
        };
        has_snapshots(&path, name)?;
        Ok(Disk { path, block: None })
    }

    fn of_vm(vm: &str, disk: &str) -> Result<Disk> {
        let vm = config::load(&crate::cli::file(Some(PathBuf::from(vm))))?;
        let block = block_of(&vm, disk)?.clone();
        has_snapshots(&block.path, &block.format)?;
        Ok(Disk {
            path: block.path.clone(),
            block: Some(block),
        })
    }

    /// Where it is, if it may be changed.
    fn changeable(&self) -> Result<&Path> {
        let path = self.path.display();
        match &self.block {
            Some(block) if block.ro => Err(Error::failed(format!(
                "`{path}` is the image of a disk with `ro = true`, which is not changed"
            ))
            .help(format!(
                "to change it all the same, name the image: `--path {path}`"
            ))),
            Some(block) if !block.lock => Err(Error::failed(format!(
                "`{path}` is the image of a disk with `lock = false`: nothing tells whether a VM \
                 uses it"
            ))
            .help(format!("if none does, name the image: `--path {path}`"))),
            _ => Ok(&self.path),
        }
    }
}

/// A disk by its index or its `id`.
fn block_of<'a>(vm: &'a Vm, disk: &str) -> Result<&'a Block> {
    let index: Option<usize> = disk.parse().ok();
    let by_index = index.and_then(|index| vm.block.get(index));
    let by_id = || vm.block.iter().find(|it| it.id.as_deref() == Some(disk));
    by_index.or_else(by_id).ok_or_else(|| {
        let file = vm.file.display();
        let error = Error::usage(format!(
            "{file} has no disk {disk:?}, expected its index or its `id`"
        ));
        match vm.block.len() {
            0 => error.help("it has no disk at all: add a `[[block]]`"),
            1 => error.help("its only disk is 0"),
            count => error.help(format!("its disks are 0 to {}", count - 1)),
        }
    })
}

fn has_snapshots(path: &Path, format: &str) -> Result<()> {
    match format {
        "qcow2" => Ok(()),
        _ => Err(Error::usage(format!(
            "`{}` is {format}, which has no snapshots, expected qcow2",
            path.display()
        ))),
    }
}
