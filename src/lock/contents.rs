//! What a lock file says.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use formats::OptionValue;
use serde::{Deserialize, Serialize};

use super::chain;
use crate::config::{self, Block, HostFile, Vm};
use crate::digest::{self, Digest};
use crate::vm::{Device, Shape, shape};
use crate::{Error, Result};

/// The version of what this launcher writes, and reads.
const VERSION: u32 = 1;

/// A lock file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    version: u32,
    /// The version of the launcher that wrote it. Another one is no drift.
    pub(super) launcher: String,
    pub(super) machine: Machine,
    /// What is booted, by the key of `[boot]`.
    pub(super) boot: BTreeMap<String, Input>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) block: Vec<Disk>,
}

/// The machine that the guest finds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Machine {
    pub(super) cpus: u32,
    #[serde(with = "bytes")]
    pub(super) memory: u64,
    pub(super) cmdline: String,
    /// Of the ACPI tables as they lie in memory.
    #[serde(with = "hex")]
    pub(super) acpi_tables: Digest,
    /// Of the configuration spaces at power-on, in the order of their addresses.
    #[serde(with = "hex")]
    pub(super) pci_config: Digest,
    /// What is at each PCI address.
    pub(super) pci: BTreeMap<String, String>,
}

/// A file that the VM never writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Input {
    /// For the reader: the digest says which file it is.
    pub(super) path: String,
    #[serde(with = "hex")]
    pub(super) sha256: Digest,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Disk {
    /// For the reader.
    pub(super) path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    pub(super) format: String,
    pub(super) ro: bool,
    pub(super) ephemeral: bool,
    pub(super) sparse: bool,
    pub(super) block_size: u32,
    pub(super) queues: u16,
    /// Of the disk as the guest finds it; none where the image's digest says as much.
    #[serde(default, with = "maybe_bytes", skip_serializing_if = "Option::is_none")]
    pub(super) size: Option<u64>,
    /// Of an image that the VM never writes.
    #[serde(default, with = "maybe_hex", skip_serializing_if = "Option::is_none")]
    pub(super) sha256: Option<Digest>,
    /// The external data file of an image that the VM never writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) data_file: Option<Input>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) backing: Vec<Input>,
}

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
            ("kernel", Some(&vm.boot.kernel)),
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
            machine: Machine::of(&shape(vm)?),
            boot,
            block,
        };
        Ok((lock, gathering.missing))
    }

    /// The lock of a VM as it is now.
    ///
    /// # Errors
    ///
    /// Something of it cannot be read: the first that cannot.
    pub(super) fn of(vm: &Vm) -> Result<Lock> {
        let (lock, missing) = Lock::gather(vm)?;
        match missing.into_iter().next() {
            None => Ok(lock),
            Some(Missing { key, error }) => Err(error.about(key).at(&vm.places)),
        }
    }

    /// Reads the lock of the VM's file `of`.
    ///
    /// # Errors
    ///
    /// It is not there, not readable as a lock, or of another version.
    pub(super) fn read(place: &Path, of: &Path) -> Result<Lock> {
        let (shown, vm) = (place.display(), of.display());
        if !place.exists() {
            return Err(
                Error::usage(format!("{vm} has no lock file: {shown} is not there"))
                    .help(format!("write it with `launcher lock {vm}`")),
            );
        }
        let damaged = |why: String| {
            Error::usage(format!("{shown} is no lock file: {why}")).help(format!(
                "restore it, or write it anew with `launcher lock {vm}`"
            ))
        };
        let bytes = config::text(place)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| damaged("it is no text".into()))?;
        let at = |error: toml::de::Error| {
            let line = error.span().map(|span| {
                let before = text.get(..span.start).unwrap_or_default();
                format!("line {}: ", before.matches('\n').count() + 1)
            });
            let message = error.message().lines().next().unwrap_or_default();
            damaged(line.unwrap_or_default() + message)
        };
        let table: toml::Table = toml::from_str(text).map_err(at)?;
        match table.get("version").and_then(toml::Value::as_integer) {
            Some(version) if version == i64::from(VERSION) => toml::from_str(text).map_err(at),
            Some(version) => Err(Error::usage(format!(
                "{shown} has `version` {version}, expected {VERSION}"
            ))
            .help(format!(
                "another launcher wrote it: use that one, or write it anew with `launcher lock {vm}`"
            ))),
            None => Err(damaged("it has no `version`".into())),
        }
    }

    /// As it is written.
    ///
    /// # Errors
    ///
    /// It cannot be expressed as TOML.
    pub(super) fn text(&self, vm: &Vm) -> Result<String> {
        let name = vm.file.file_name().unwrap_or_default().to_string_lossy();
        let name: String = name.chars().filter(|c| !c.is_control()).collect();
        let body = toml::to_string(self)
            .map_err(|error| Error::failed(format!("cannot write a lock file: {error}")))?;
        Ok(format!(
            "# What {name} boots, and the machine its guest finds. `launcher lock {name}` renews \
             it.\n\n{body}"
        ))
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
        digest::of(&file.path).unwrap_or_else(|error| {
            self.missing(key, error);
            Digest::of_bytes(b"")
        })
    }

    fn input(&mut self, key: &str, file: &HostFile) -> Input {
        Input {
            path: self.shown(&file.path),
            sha256: self.digest(key, file),
        }
    }

    fn disk(&mut self, index: usize, block: &Block) -> Disk {
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
        let backing = block.backing.iter().enumerate();
        let backing = backing.map(|(at, file)| self.input(&key(&format!("backing.{at}")), file));
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
            sparse: block.sparse,
            block_size: block.block_size,
            queues: block.queues,
            size,
            sha256,
            data_file,
            backing,
        }
    }

    /// A path as it is the same on every host: relative to the VM's file, or else the name alone.
    fn shown(&self, path: &Path) -> String {
        let inside = path.strip_prefix(self.folder).ok();
        let inside = inside.filter(|path| !path.has_root());
        let short = inside.or_else(|| path.file_name().map(Path::new));
        let parts = short.unwrap_or(path).components();
        let parts = parts.filter(|part| *part != Component::CurDir);
        let path: std::path::PathBuf = parts.collect();
        path.to_string_lossy().into_owned()
    }
}

/// A digest as hex digits.
mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::digest::Digest;

    pub(super) fn serialize<S: Serializer>(digest: &Digest, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Digest, D::Error> {
        let text = String::deserialize(from)?;
        let wrong = |why| D::Error::custom(format!("the digest {text:?} is none: {why}"));
        text.parse().map_err(wrong)
    }
}

/// As [`hex`], for one that may be absent.
mod maybe_hex {
    use serde::{Deserializer, Serializer};

    use crate::digest::Digest;

    pub(super) fn serialize<S: Serializer>(
        digest: &Option<Digest>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match digest {
            Some(digest) => super::hex::serialize(digest, to),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Digest>, D::Error> {
        super::hex::deserialize(from).map(Some)
    }
}

/// A size with a unit, where one leaves a whole number.
mod bytes {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::config::size;

    pub(super) fn serialize<S: Serializer>(bytes: &u64, to: S) -> Result<S::Ok, S::Error> {
        match bytes.is_multiple_of(1024) && *bytes > 0 {
            true => to.serialize_str(&size::show(*bytes)),
            false => to.serialize_str(&bytes.to_string()),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        size::parse(&text).map_err(|why| D::Error::custom(format!("{text:?} is no size: {why}")))
    }
}

/// As [`bytes`], for one that may be absent.
mod maybe_bytes {
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => super::bytes::serialize(bytes, to),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
        super::bytes::deserialize(from).map(Some)
    }
}
