//! `launcher disk`: the images of VMs.

mod bench;
mod check;
mod convert;
mod create;
mod format;
mod image;
mod info;
mod list;
mod look;
mod resize;
mod save;
mod serve;
mod snapshot;
mod snapshots;
mod which;

use clap::{Args, Subcommand};

use crate::Result;
pub(super) use format::{format_of, raw_name};

/// List, resize, create, convert, check, snapshot, serve and measure the disks of VMs
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher disk list web\n  launcher disk resize web 0 +1GiB\n  \
                  launcher disk info --path old.qcow2"
)]
pub(super) struct Disk {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    List(list::List),
    Info(info::Info),
    Resize(resize::Resize),
    Create(create::Create),
    Convert(convert::Convert),
    Check(check::Check),
    Snapshot(snapshot::Snapshot),
    Serve(serve::Serve),
    Bench(bench::Bench),
}

impl Disk {
    pub(super) fn run(self) -> Result<u8> {
        match self.command {
            Command::List(list) => list.run(),
            Command::Info(info) => info.run(),
            Command::Resize(resize) => resize.run(),
            Command::Create(create) => create.run(),
            Command::Convert(convert) => convert.run(),
            Command::Check(check) => check.run(),
            Command::Snapshot(snapshot) => snapshot.run(),
            Command::Serve(serve) => serve.run(),
            Command::Bench(bench) => bench.run(),
        }
    }
}
