//! `launcher disk serve`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use formats::Image;
use libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::format::{format_of, raw_name};
use super::image::at_block;
use super::which::{has_image, index_of};
use crate::cli::output::complain;
use crate::cli::target::Target;
use crate::cli::up;
use crate::config::size;
use crate::devices::virtio::blk::{Blk, BlkHandle, BlkOptions};
use crate::serve::Server;
use crate::signals::Signals;
use crate::{Error, Result, exit, sources, vm};

/// Serve a disk to another VMM: a vhost-user-blk device at a socket
///
/// An image, or a disk of a VM that does not run, with all options that its file gives it. One
/// front end at a time; when it goes, the next may come. SIGTERM or SIGINT flushes the image,
/// closes it and ends the server. SIGHUP has it look at the size again: what the VM's file says,
/// or how long a raw image is by now; the guest sees the new size at once.
#[derive(Args)]
#[command(
    after_help = "In QEMU, whose guest memory must be shared, with `size` the guest's:\n  \
                  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=ram,size=1G,share=on \\\n    \
                  -machine q35,memory-backend=ram -chardev socket,id=disk0,path=disk.sock,reconnect-ms=1000 \\\n    \
                  -device vhost-user-blk-pci,chardev=disk0,num-queues=1\n\n\
                  Examples:\n  launcher disk serve disk.qcow2 --socket disk.sock\n  \
                  launcher disk serve vm.toml ROOT --socket /run/root.sock\n  \
                  launcher disk serve /dev/sdb --format raw --o-direct --queues 4 --socket disk.sock"
)]
pub(super) struct Serve {
    /// The image; or, before an INDEX, the TOML file of a VM, the folder of its vm.toml, or its
    /// name
    #[arg(value_name = "PATH|VM")]
    what: PathBuf,
    /// A disk of that VM: its index over `[[block]]` from 0, or its id
    #[arg(value_name = "INDEX|ID")]
    disk: Option<String>,
    /// Where to listen
    #[arg(long, value_name = "SOCKET")]
    socket: PathBuf,
    #[command(flatten)]
    lone: Lone,
}

/// How an image is served that no VM's file describes.
#[derive(Args)]
struct Lone {
    /// Format of the image [default: the one that its extension stands for]
    #[arg(short, long, conflicts_with = "disk")]
    format: Option<String>,
    /// Read-only
    #[arg(long, conflicts_with = "disk")]
    ro: bool,
    /// O_DIRECT: the host's page cache is passed by
    #[arg(long, conflicts_with = "disk")]
    o_direct: bool,
    /// Logical block size in bytes [default: 512]
    #[arg(long, value_name = "N", conflicts_with = "disk")]
    block_size: Option<u32>,
    /// Serial number, as the guest sees it: 20 characters at most
    #[arg(long, conflicts_with = "disk")]
    id: Option<String>,
    /// Number of virtqueues [default: 1]
    #[arg(long, value_name = "N", conflicts_with = "disk")]
    queues: Option<u16>,
    /// Longest time in microseconds, up to 1000, that the disk's thread looks for requests before
    /// it sleeps; it does so only as long as requests come that soon. 0: never [default: 50]
    #[arg(long, value_name = "N", conflicts_with = "disk",
          value_parser = clap::value_parser!(u32).range(..=1000))]
    poll_us: Option<u32>,
    /// CPUs of the host that the disk's thread runs on, as 2,3 [default: any]
    #[arg(
        long,
        value_name = "CPU,…",
        conflicts_with = "disk",
        value_delimiter = ','
    )]
    cpus: Vec<u16>,
}

/// A disk that is open, and what is said of it.
struct Opened {
    disk: Blk,
    path: PathBuf,
    format: String,
    ro: bool,
}

impl Serve {
    pub(super) fn run(self) -> Result<u8> {
        let opened = match &self.disk {
            None => self.lone.open(&self.what)?,
            Some(disk) => of_vm(&self.what, disk)?,
        };
        let Opened {
            disk,
            path,
            format,
            ro,
        } = opened;
        // Until here a signal ends us at once: nothing was written yet.
        let mut signals = Signals::catch_only(&[SIGTERM, SIGINT, SIGHUP, SIGQUIT])?;
        let size = size::show(disk.handle().size());
        let server = Server::new(disk, &self.socket)?;
        complain(&format!(
            "serving {} ({format}, {size}{}) at {}",
            path.display(),
            if ro { ", read-only" } else { "" },
            self.socket.display()
        ));
        let raw = raw_name(&format);
        server.run(&mut signals, move |handle| {
            let looked = self.wanted(raw.then_some(&path));
            let said = looked.and_then(|wanted| match wanted {
                Some(wanted) => resize(handle, wanted),
                None => Ok("nothing says another size for the disk".to_owned()),
            });
            match said {
                Ok(said) => complain(&said),
                Err(error) => complain(&error),
            }
        })?;
        Ok(exit::DONE)
    }

    /// The size that the disk is to have by now: what the VM's file says, or how long a raw image
    /// is.
    fn wanted(&self, raw: Option<&PathBuf>) -> Result<Option<u64>> {
        if let Some(disk) = &self.disk {
            let vm = Target::of(Some(self.what.clone()))?.config()?;
            let declared = vm.block[index_of(&vm, disk)?].size;
            if declared.is_some() {
                return Ok(declared);
            }
        }
        let Some(path) = raw else { return Ok(None) };
        let failed =
            |error: std::io::Error| Error::unopenable(&format!("`{}`", path.display()), &error);
        let mut file = std::fs::File::open(path).map_err(failed)?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))
            .map(Some)
            .map_err(failed)
    }
}

/// Makes a disk as large as it is to be. A smaller one would cut off what its guest uses.
fn resize(handle: &BlkHandle, wanted: u64) -> Result<String> {
    let from = handle.size();
    let (shown, now) = (size::show(wanted), size::show(from));
    match wanted.cmp(&from) {
        std::cmp::Ordering::Equal => Ok(format!("the disk has {shown} already")),
        std::cmp::Ordering::Less => Err(Error::failed(format!(
            "the disk has {now}, and is not made as small as {shown} while it is served"
        ))
        .help("stop the server, then `launcher disk resize` with `--shrink`")),
        std::cmp::Ordering::Greater => match handle.resize(wanted) {
            Ok(()) => Ok(format!("the disk has grown from {now} to {shown}")),
            Err(error) => Err(Error::failed(format!(
                "the disk cannot grow from {now} to {shown}: {error}"
            ))),
        },
    }
}

impl Lone {
    fn open(&self, path: &Path) -> Result<Opened> {
        if self.format.is_none() && path.extension().is_some_and(|it| it == "toml") {
            let shown = path.display();
            let message =
                format!("`{shown}` is the file of a VM, expected an image, or a disk too");
            let help = format!("name the disk: `launcher disk serve {shown} 0 --socket SOCKET`");
            return Err(Error::usage(message).help(help));
        }
        let format = format_of(path, self.format.as_deref(), Some("format"))?;
        let image = Image::new(path);
        let image = Image {
            ro: self.ro,
            o_direct: self.o_direct,
            block_size: self.block_size.unwrap_or(image.block_size),
            format_written: self.format.is_some(),
            ..image
        };
        let disk = Blk::open(BlkOptions {
            image,
            format,
            ephemeral: false,
            id: self.id.clone(),
            queues: self.queues.unwrap_or(1),
            engine: up::engine()?,
            poll: self.poll_us.map(u64::from).map(Duration::from_micros),
            cpus: self.cpus.clone(),
        })?;
        Ok(Opened {
            disk,
            path: path.to_owned(),
            format: format.name.to_owned(),
            ro: self.ro,
        })
    }
}

/// Opens a disk of a VM that does not run.
fn of_vm(named: &Path, disk: &str) -> Result<Opened> {
    let target = Target::of(Some(named.to_owned()))?;
    let config = target.config()?;
    let index = index_of(&config, disk)?;
    let block = has_image(&config, index)?;
    if target.is_running() {
        let name = target.name();
        let message = format!("`{name}` is running: it serves its disk {disk} itself");
        let mut error = Error::failed(message).help(format!("stop it with `launcher stop {name}`"));
        error.exit = exit::ALREADY_RUNNING;
        return Err(error);
    }
    sources::verify_block(&config, index)?;
    let disk = vm::open_disk(block, up::engine()?);
    Ok(Opened {
        disk: disk.map_err(|error| at_block(&config, index, error))?,
        path: block.path.clone(),
        format: block.format.clone(),
        ro: block.ro,
    })
}
