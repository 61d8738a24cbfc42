//! Reads what a VM is made of, and goes on where something is missing.

use std::path::{Component, Path, PathBuf};

use formats::OptionValue;

use super::chain;
use super::contents::{Disk, Input, Lock, Machine, VERSION};
use crate::config::{Block, HostFile, Vm};
use crate::digest::{self, Digest};
use crate::vm::{Device, Shape, shape};
use crate::{Error, Result};

/// Something of a VM that cannot be had.
#[derive(Debug)]
pub(super) struct Missing {
    /// The key that it would be at, as `block.0.sha256`.
    pub(super) key: String,
    pub(super) error: Error,
}

impl Lock {
    /// The lock of a VM as it is now, with what is missing of it. What is missing is in the lock
    /// with a value that stands for none.
    ///
    /// # Errors
    ///
    /// There is no such machine.
    pub(super) fn gather(vm: &Vm) -> Result<(Lock, Vec<Missing>)> {
        let folder = vm.file.parent().unwrap_or(Path::new(""));
        let mut gathering = Gathering {
            folder,
            missing: Vec::new(),
        };
        let boot = [
            ("kernel", vm.boot.kernel.as_ref()),
            ("initrd", vm.boot.initrd.as_ref()),
        ];
        let boot = boot.into_iter().filter_map(|(key, file)| {
            let input = gathering.input(&format!("boot.{key}"), file?);
            Some((key.to_owned(), input))
        });
        let boot = boot.collect();
        let disks = vm.block.iter().enumerate();
        let block = disks.map(|(index, block)| gathering.disk(index, block));
        let block = block.collect();
        let lock = Lock {
            version: VERSION,
            launcher: env!("CARGO_PKG_VERSION").to_owned(),
            from_block: vm.boot_disk(),
            machine: Machine::of(&shape(vm)?),
            boot,
            block,
        };
        Ok((lock, gathering.missing))
    }
}

impl Machine {
    fn of(shape: &Shape) -> Machine {
        let spaces: Vec<u8> = shape.pci.iter().flat_map(|it| it.config.clone()).collect();
        let listed = shape.pci.iter().map(|function| {
            let what = match function.device {
                Device::Disk(index) => format!("block.{index}"),
                other => other.to_string(),
            };
            (function.address.to_string(), what)
        });
        Machine {
            cpus: shape.cpus,
            memory: shape.memory,
            cmdline: shape.cmdline.clone(),
            acpi_tables: Digest::of_bytes(&shape.acpi),
            pci_config: Digest::of_bytes(&spaces),
            pci: listed.collect(),
        }
    }
}

/// Reads what a VM is made of, and goes on where something is missing.
struct Gathering<'a> {
    /// Of the VM's file.
    folder: &'a Path,
    missing: Vec<Missing>,
}

impl Gathering<'_> {
    fn missing(&mut self, key: &str, error: Error) {
        self.missing.push(Missing {
            key: key.to_owned(),
            error,
        });
    }

    fn digest(&mut self, key: &str, file: &HostFile) -> Digest {
        // One that is yet to be fetched will have this digest, or not be used.
        if let (Some(_), Some(sha256)) = (&file.url, file.sha256)
            && !file.path.exists()
        {
            return sha256;
        }
        digest::of_input(key, &file.path).unwrap_or_else(|error| {
            self.missing(key, error);
            Digest::of_bytes(b"")
        })
    }

    fn input(&mut self, key: &str, file: &HostFile) -> Input {
        Input {
            path: self.shown(&file.path),
            sha256: self.digest(key, file),
            format: None,
        }
    }

    fn disk(&mut self, index: usize, block: &Block) -> Disk {
        if block.is_served() {
            return self.served(block);
        }
        let key = |name: &str| format!("block.{index}.{name}");
        let fixed = block.ro || block.ephemeral;
        let image = block.image();
        let data_file = block.options.iter().find_map(|option| match option {
            ("data_file", OptionValue::Path(path)) if fixed => Some(path),
            _ => None,
        });
        let sha256 = fixed.then(|| self.digest(&key("path"), &block.file()));
        let data_file = data_file.map(HostFile::at);
        let data_file = data_file.map(|file| self.input(&key("data_file"), &file));
        let formats = chain::formats(&image, &block.format);
        let backing = block.backing.iter().enumerate();
        let backing = backing.map(|(at, file)| Input {
            format: formats.get(at).map(|format| (*format).to_owned()),
            ..self.input(&key(&format!("backing.{at}")), file)
        });
        let backing = backing.collect();
        // What a size is worth that the VM's file has not got, only the image tells.
        let size = match (block.size, fixed) {
            (Some(size), _) => Some(size),
            (None, true) => None,
            (None, false) => Some(chain::size(&image, &block.format).unwrap_or_else(|error| {
                self.missing(&key("size"), error);
                0
            })),
        };
        if let Err(error) = chain::is_named(&image, &block.format) {
            self.missing(&key("backing"), error);
        }
        Disk {
            path: self.shown(&block.path),
            id: block.id.clone(),
            format: block.format.clone(),
            ro: block.ro,
            ephemeral: block.ephemeral,
            sparse: Some(block.sparse),
            block_size: Some(block.block_size),
            queues: block.queues,
            size,
            sha256,
            data_file,
            backing,
        }
    }

    /// A disk of which another process knows what is in it.
    fn served(&self, block: &Block) -> Disk {
        Disk {
            path: self.shown(&block.path),
            id: None,
            format: block.format.clone(),
            ro: block.ro,
            ephemeral: block.ephemeral,
            sparse: None,
            block_size: None,
            queues: block.queues,
            size: None,
            sha256: None,
            data_file: None,
            backing: Vec::new(),
        }
    }

    /// A path as it is the same on every host: relative to the VM's file, or else the name alone.
    fn shown(&self, path: &Path) -> String {
        let inside = path.strip_prefix(self.folder).ok();
        let inside = inside.filter(|path| !path.has_root());
        let short = inside.or_else(|| path.file_name().map(Path::new));
        let parts = short.unwrap_or(path).components();
        let parts = parts.filter(|part| *part != Component::CurDir);
        let path: PathBuf = parts.collect();
        path.to_string_lossy().into_owned()
    }
}
