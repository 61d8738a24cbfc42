//! What a lock file says.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Place;
use super::gather::Missing;
use super::text::{bytes, hex, maybe_bytes, maybe_hex};
use crate::config::{self, Vm};
use crate::digest::Digest;
use crate::{Error, Result};

/// The version of what this launcher writes, and reads.
pub(super) const VERSION: u32 = 1;

/// A lock file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    pub(super) version: u32,
    /// The version of the launcher that wrote it. Another one is no drift.
    pub(super) launcher: String,
    /// The index of the disk that has kernel and initrd, if one has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) from_block: Option<usize>,
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
    /// What a backing file is read as: the same bytes are another disk in another format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) format: Option<String>,
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
    /// None, as the block size, where another process serves the disk and knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) sparse: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) block_size: Option<u32>,
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

impl Lock {
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

    /// Reads the lock of a VM.
    ///
    /// # Errors
    ///
    /// It is not there, not readable as a lock, or of another version.
    pub(super) fn read(place: &Place) -> Result<Lock> {
        let (shown, vm, command) = (place.lock.display(), place.vm.display(), place.command());
        if !place.lock.exists() {
            return Err(
                Error::usage(format!("{vm} has no lock file: {shown} is not there"))
                    .help(format!("write it with `{command}`")),
            );
        }
        let damaged = |why: String| {
            Error::usage(format!("{shown} is no lock file: {why}"))
                .help(format!("restore it, or write it anew with `{command}`"))
        };
        let bytes = config::text(&place.lock)?;
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
                "another launcher wrote it: use that one, or write it anew with `{command}`"
            ))),
            None => Err(damaged("it has no `version`".into())),
        }
    }

    /// As it is written.
    ///
    /// # Errors
    ///
    /// It cannot be expressed as TOML.
    pub(super) fn text(&self, place: &Place) -> Result<String> {
        let name = place.vm.file_name().unwrap_or_default().to_string_lossy();
        let name: String = name.chars().filter(|c| !c.is_control()).collect();
        let command = place.command_there();
        let body = toml::to_string(self)
            .map_err(|error| Error::failed(format!("cannot write a lock file: {error}")))?;
        Ok(format!(
            "# What {name} boots, and the machine its guest finds. `{command}` renews \
             it.\n\n{body}"
        ))
    }
}
