//! The virtio devices of a VM: opened once, and plugged into every machine that it boots.

use std::iter;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use formats::{Engine, OpenError};

use super::machine::SharedDevice;
use crate::config::{Block, Vm};
use crate::devices::vhost_user::{VhostUser, VhostUserHandle, VhostUserOptions};
use crate::devices::virtio::blk::{Blk, BlkHandle, BlkOptions};
use crate::devices::virtio::rng::Rng;
use crate::{Error, Result, control};

/// One device of a VM.
#[derive(Clone, Copy)]
pub(super) enum Function<'a> {
    /// The entropy source.
    Entropy,
    /// A disk, by its index.
    Disk(usize, &'a Block),
}

/// The devices of a VM, in the order of their PCI addresses: the entropy source, then the disks.
pub(super) fn functions(config: &Vm) -> impl Iterator<Item = Function<'_>> {
    let disks = config.block.iter().enumerate();
    iter::once(Function::Entropy).chain(disks.map(|(index, block)| Function::Disk(index, block)))
}

/// The devices, in the order of their PCI addresses.
pub(crate) struct Devices {
    all: Vec<SharedDevice>,
    disks: Vec<Plugged>,
}

struct Plugged {
    path: String,
    disk: Disk,
}

/// A disk, as whoever has opened it keeps it.
enum Disk {
    Own(Arc<Mutex<Blk>>, BlkHandle),
    Served(Arc<Mutex<VhostUser>>, VhostUserHandle),
}

/// Acts on a disk, or watches it, from any thread.
#[derive(Clone)]
pub(crate) enum DiskHandle {
    /// Its image is open here.
    Own(BlkHandle),
    /// Another process serves it.
    Served(VhostUserHandle),
}

impl DiskHandle {
    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            DiskHandle::Own(disk) => disk.size(),
            DiskHandle::Served(disk) => disk.size(),
        }
    }
}

impl Disk {
    fn open(block: &Block, engine: Engine) -> Result<Disk, OpenError> {
        if block.is_served() {
            let disk = open_served(block)?;
            let handle = disk.handle();
            return Ok(Disk::Served(Arc::new(Mutex::new(disk)), handle));
        }
        let disk = open_disk(block, engine)?;
        let handle = disk.handle();
        Ok(Disk::Own(Arc::new(Mutex::new(disk)), handle))
    }

    fn device(&self) -> SharedDevice {
        match self {
            Disk::Own(disk, _) => Arc::clone(disk) as _,
            Disk::Served(disk, _) => Arc::clone(disk) as _,
        }
    }

    fn handle(&self) -> DiskHandle {
        match self {
            Disk::Own(_, handle) => DiskHandle::Own(handle.clone()),
            Disk::Served(_, handle) => DiskHandle::Served(handle.clone()),
        }
    }
}

impl Devices {
    /// Opens what the configuration names.
    pub(crate) fn open(config: &Vm, engine: Engine) -> Result<Devices> {
        let mut devices = Devices {
            all: Vec::new(),
            disks: Vec::new(),
        };
        for function in functions(config) {
            let (index, block) = match function {
                Function::Entropy => {
                    devices.all.push(Arc::new(Mutex::new(Rng::new())));
                    continue;
                }
                Function::Disk(index, block) => (index, block),
            };
            let disk = Disk::open(block, engine).map_err(|error| at_disk(index, block, error))?;
            devices.all.push(disk.device());
            devices.disks.push(Plugged {
                path: block.path.display().to_string(),
                disk,
            });
        }
        Ok(devices)
    }

    /// All devices, to plug in.
    pub(crate) fn all(&self) -> &[SharedDevice] {
        &self.all
    }

    /// The disks, in the order of the configuration.
    pub(crate) fn disks(&self) -> impl Iterator<Item = DiskHandle> {
        self.disks.iter().map(|plugged| plugged.disk.handle())
    }

    /// The VM ends: what takes long, a resize or a server that hangs, is not waited for.
    pub(crate) fn give_up(&self) {
        for Plugged { disk, .. } in &self.disks {
            match disk {
                Disk::Own(_, handle) => handle.give_up(),
                Disk::Served(_, handle) => handle.give_up(),
            }
        }
    }

    /// Makes what the guest has written durable. A disk that fails is no reason to do without
    /// the next machine: its driver will hear of it. One that another process serves is that
    /// process's to flush, and is not closed now.
    pub(crate) fn flush(&self) {
        for Plugged { path, disk } in &self.disks {
            if let Disk::Own(_, handle) = disk
                && let Err(error) = handle.flush()
            {
                tracing::error!("cannot flush {path}: {error}");
            }
        }
    }

    /// Flushes and closes all disks: every one, whatever happens to another.
    pub(crate) fn close(self) -> Result<()> {
        drop(self.all);
        let mut failures = Vec::new();
        for Plugged { path, disk } in self.disks {
            let disk = match disk {
                Disk::Own(disk, _) => disk,
                // Its process flushes and closes the image when that ends.
                Disk::Served(..) => continue,
            };
            let closed = match Arc::try_unwrap(disk) {
                Ok(disk) => disk
                    .into_inner()
                    .unwrap_or_else(PoisonError::into_inner)
                    .close(),
                Err(_) => Err(std::io::Error::other("it is still plugged in")),
            };
            if let Err(error) = closed {
                failures.push(format!("{path}: {error}"));
            }
        }
        match failures.is_empty() {
            true => Ok(()),
            false => Err(
                Error::failed(format!("cannot flush a disk: {}", failures.join("; ")))
                    .help("what the guest wrote last may be lost; check the host's disk"),
            ),
        }
    }
}

/// The error of a disk that cannot be opened, with its key in the VM's file.
pub(super) fn at_disk(index: usize, block: &Block, error: OpenError) -> Error {
    let key = match error.key {
        OpenError::HOST if block.is_served() => "vhost_user",
        OpenError::HOST => "path",
        key => key,
    };
    Error::from(error).about(format!("block.{index}.{key}"))
}

/// Connects to the process that serves a disk.
pub(super) fn open_served(block: &Block) -> Result<VhostUser, OpenError> {
    /// A server whose queue of connections is full is not waited for any longer.
    const PATIENCE: Duration = Duration::from_secs(1);
    let socket = block.path.clone();
    VhostUser::open(VhostUserOptions {
        connect: Box::new(move || control::connect(&socket, PATIENCE)),
        socket: block.path.clone(),
        queues: block.queues,
        ro: block.ro,
    })
}

/// Opens a disk of a VM's file. The key of an error is that of the disk's table, or
/// [`OpenError::HOST`].
pub(crate) fn open_disk(block: &Block, engine: Engine) -> Result<Blk, OpenError> {
    let format = formats::find(&block.format).ok_or_else(|| OpenError {
        message: format!("format `{}` is not in this build", block.format),
        help: Some("see `launcher formats`".into()),
        key: "format",
    })?;
    Blk::open(BlkOptions {
        image: block.image(),
        format,
        ephemeral: block.ephemeral,
        id: block.id.clone(),
        queues: block.queues,
        engine,
        poll: block.poll_us.map(u64::from).map(Duration::from_micros),
        cpus: block.cpus.clone(),
    })
}

#[cfg(test)]
mod tests;
