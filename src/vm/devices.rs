//! The virtio devices of a VM: opened once, and plugged into every machine that it boots.

use std::iter;
use std::sync::{Arc, Mutex, PoisonError};

use formats::{Engine, OpenError};

use super::machine::SharedDevice;
use crate::config::{Block, Vm};
use crate::devices::virtio::blk::{Blk, BlkHandle, BlkOptions};
use crate::devices::virtio::rng::Rng;
use crate::{Error, Result};

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
    disk: Arc<Mutex<Blk>>,
    handle: BlkHandle,
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
            let disk = open_disk(block, engine).map_err(|error| {
                let key = match error.key {
                    OpenError::HOST => "path",
                    key => key,
                };
                Error::from(error).about(format!("block.{index}.{key}"))
            })?;
            let handle = disk.handle();
            let disk = Arc::new(Mutex::new(disk));
            devices.all.push(Arc::clone(&disk) as SharedDevice);
            devices.disks.push(Plugged {
                path: block.path.display().to_string(),
                disk,
                handle,
            });
        }
        Ok(devices)
    }

    /// All devices, to plug in.
    pub(crate) fn all(&self) -> &[SharedDevice] {
        &self.all
    }

    /// The disks, in the order of the configuration.
    pub(crate) fn disks(&self) -> impl Iterator<Item = BlkHandle> {
        self.disks.iter().map(|plugged| plugged.handle.clone())
    }

    /// The VM ends: a resize that takes long is not waited for.
    pub(crate) fn give_up(&self) {
        for Plugged { handle, .. } in &self.disks {
            handle.give_up();
        }
    }

    /// Makes what the guest has written durable. A disk that fails is no reason to do without
    /// the next machine: its driver will hear of it.
    pub(crate) fn flush(&self) {
        for Plugged { path, handle, .. } in &self.disks {
            if let Err(error) = handle.flush() {
                tracing::error!("cannot flush {path}: {error}");
            }
        }
    }

    /// Flushes and closes all disks: every one, whatever happens to another.
    pub(crate) fn close(self) -> Result<()> {
        drop(self.all);
        let mut failures = Vec::new();
        for Plugged { path, disk, .. } in self.disks {
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
    })
}

#[cfg(test)]
mod tests;
