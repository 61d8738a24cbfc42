//! What differs between a VM and its lock.

use std::collections::BTreeSet;
use std::fmt::{Display, Write};

use super::Place;
use super::contents::{Disk, Input, Lock};
use super::gather::Missing;
use crate::config::{Vm, size};
use crate::{Error, Result};

/// A VM as it is now.
pub(super) struct Found {
    lock: Lock,
    missing: Vec<Missing>,
    /// Of each disk, whether the VM's file has its `size`.
    sized: Vec<bool>,
}

/// All that differs.
#[derive(Debug, Default)]
pub(crate) struct Drift {
    differences: Vec<Difference>,
    /// The launcher that wrote the lock, if it is another.
    writer: Option<String>,
}

/// One thing that differs.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    /// The key of the VM's file, or of the machine.
    key: String,
    locked: String,
    found: String,
}

const NOTHING: &str = "nothing";

impl Found {
    pub(super) fn of(vm: &Vm) -> Result<Found> {
        let (lock, missing) = Lock::gather(vm)?;
        Ok(Found {
            lock,
            missing,
            sized: vm.block.iter().map(|block| block.size.is_some()).collect(),
        })
    }
}

impl Drift {
    /// Compares all of them, in the order of the lock file.
    pub(super) fn between(lock: &Lock, found: Found) -> Drift {
        let mut drift = Drift {
            writer: (lock.launcher != found.lock.launcher).then(|| lock.launcher.clone()),
            ..Drift::default()
        };
        drift.machine(lock, &found.lock);
        drift.boot(lock, &found);
        let count = lock.block.len().max(found.lock.block.len());
        for index in 0..count {
            let (locked, now) = (lock.block.get(index), found.lock.block.get(index));
            match (locked, now) {
                (Some(locked), Some(now)) => drift.disk(index, locked, now, &found),
                (locked, now) => {
                    let path = |disk: Option<&Disk>| {
                        disk.map_or(NOTHING.into(), |disk| format!("a disk, {}", disk.path))
                    };
                    drift.add(format!("block.{index}"), path(locked), path(now));
                }
            }
        }
        drift
    }

    /// Whether the VM is as its lock has it.
    pub(crate) fn is_none(&self) -> bool {
        self.differences.is_empty()
    }

    /// What is worth a word though it is no drift.
    pub(crate) fn note(&self) -> Option<String> {
        let (writer, own) = (self.writer.as_ref()?, env!("CARGO_PKG_VERSION"));
        Some(format!(
            "launcher {writer} wrote the lock, this is {own}: the machine is the same"
        ))
    }

    /// All that differs, for the user.
    pub(crate) fn error(&self, place: &Place) -> Error {
        let (file, lock) = (place.vm.display(), place.lock.display());
        let mut message = match self.differences.len() {
            1 => format!("{file} is not as {lock} has it: 1 difference"),
            count => format!("{file} is not as {lock} has it: {count} differences"),
        };
        for Difference { key, locked, found } in &self.differences {
            let _ = write!(
                message,
                "\n  {key}\n    locked  {locked}\n    found   {found}"
            );
        }
        if let Some(writer) = &self.writer {
            let own = env!("CARGO_PKG_VERSION");
            let _ = write!(
                message,
                "\n  launcher {writer} wrote the lock, this is {own}"
            );
        }
        Error::usage(message).help(format!(
            "if that is what you want, renew the lock with `{}`; else put back what was \
             locked",
            place.command()
        ))
    }

    fn add(&mut self, key: impl Into<String>, locked: impl Display, found: impl Display) {
        self.differences.push(Difference {
            key: key.into(),
            locked: locked.to_string(),
            found: found.to_string(),
        });
    }

    fn compare<T: PartialEq + Display>(&mut self, key: impl Into<String>, locked: T, found: T) {
        if locked != found {
            self.add(key, locked, found);
        }
    }

    fn machine(&mut self, lock: &Lock, found: &Lock) {
        let (locked, found) = (&lock.machine, &found.machine);
        self.compare("cpus", locked.cpus, found.cpus);
        if locked.memory != found.memory {
            let (locked, found) = (size::show(locked.memory), size::show(found.memory));
            self.add("memory", locked, found);
        }
        if locked.cmdline != found.cmdline {
            let key = "the kernel's command line";
            self.add(key, shown(&locked.cmdline), shown(&found.cmdline));
        }
        let addresses: BTreeSet<_> = locked.pci.keys().chain(found.pci.keys()).collect();
        let before = self.differences.len();
        for address in addresses {
            let at = |pci: &std::collections::BTreeMap<String, String>| {
                pci.get(address).map_or(NOTHING.into(), |it| shown(it))
            };
            self.compare(
                format!("PCI address {}", shown(address)),
                at(&locked.pci),
                at(&found.pci),
            );
        }
        // Where another device is, there are other registers.
        if self.differences.len() == before {
            let key = "PCI configuration spaces, sha256";
            self.compare(key, locked.pci_config, found.pci_config);
        }
        let key = "ACPI tables, sha256";
        self.compare(key, locked.acpi_tables, found.acpi_tables);
    }

    fn boot(&mut self, lock: &Lock, found: &Found) {
        let disk = |index: Option<usize>| index.map_or(NOTHING.into(), |it| format!("disk {it}"));
        let (was, is) = (disk(lock.from_block), disk(found.lock.from_block));
        self.compare("boot.from_block", was, is);
        for key in ["kernel", "initrd"] {
            let (locked, now) = (lock.boot.get(key), found.lock.boot.get(key));
            self.input(&format!("boot.{key}"), locked, now, found);
        }
    }

    /// A file that the VM does not write.
    fn input(&mut self, key: &str, locked: Option<&Input>, now: Option<&Input>, found: &Found) {
        match (locked, now) {
            (Some(locked), Some(now)) => {
                self.digest(key, &now.path, Some(locked.sha256), Some(now.sha256), found);
                let format = |input: &Input| input.format.as_deref().map_or(NOTHING.into(), shown);
                let title = format!("{key} ({}), format", shown(&now.path));
                self.compare(title, format(locked), format(now));
            }
            (None, None) => {}
            (locked, now) => {
                let path = |input: Option<&Input>| {
                    input.map_or(NOTHING.into(), |input| shown(&input.path))
                };
                self.add(key, path(locked), path(now));
            }
        }
    }

    fn digest<D: Display + PartialEq>(
        &mut self,
        key: &str,
        path: &str,
        locked: Option<D>,
        now: Option<D>,
        found: &Found,
    ) {
        let title = format!("{key} ({}), sha256", shown(path));
        let text = |digest: &Option<D>| digest.as_ref().map_or(NOTHING.into(), D::to_string);
        if let Some(missing) = found.missing(key) {
            self.add(title, text(&locked), missing.error.message());
        } else if locked != now {
            self.add(title, text(&locked), text(&now));
        }
    }

    fn disk(&mut self, index: usize, locked: &Disk, now: &Disk, found: &Found) {
        let key = |name: &str| format!("block.{index}.{name}");
        let id = |disk: &Disk| disk.id.as_deref().map_or(NOTHING.into(), shown);
        self.compare(key("id"), id(locked), id(now));
        self.compare(key("format"), shown(&locked.format), shown(&now.format));
        self.compare(key("ro"), locked.ro, now.ro);
        self.compare(key("ephemeral"), locked.ephemeral, now.ephemeral);
        let (was, is) = (told(locked.sparse), told(now.sparse));
        self.compare(key("sparse"), was, is);
        let (was, is) = (told(locked.block_size), told(now.block_size));
        self.compare(key("block_size"), was, is);
        self.compare(key("queues"), locked.queues, now.queues);
        self.size(index, locked, now, found);
        if (locked.sha256.is_some(), now.sha256.is_some()) != (false, false) {
            let key = key("path");
            self.digest(&key, &now.path, locked.sha256, now.sha256, found);
        }
        let (was, is) = (locked.data_file.as_ref(), now.data_file.as_ref());
        self.input(&key("data_file"), was, is, found);
        for at in 0..locked.backing.len().max(now.backing.len()) {
            let (was, is) = (locked.backing.get(at), now.backing.get(at));
            self.input(&key(&format!("backing.{at}")), was, is, found);
        }
        if let Some(missing) = found.missing(&key("backing")) {
            self.add(key("backing"), "every file named", missing.error.message());
        }
    }

    /// An image that its VM grew is no drift: only a size that its file has is a promise.
    fn size(&mut self, index: usize, locked: &Disk, now: &Disk, found: &Found) {
        let key = format!("block.{index}.size");
        let text = |size: Option<u64>| size.map_or("the image's".to_owned(), size::show);
        if let Some(missing) = found.missing(&key) {
            return self.add(key, text(locked.size), missing.error.message());
        }
        let sized = found.sized.get(index).copied().unwrap_or_default();
        let grown = !sized && locked.size.is_some() && now.size >= locked.size;
        if locked.size != now.size && !grown {
            self.add(key, text(locked.size), text(now.size));
        }
    }
}

impl Found {
    fn missing(&self, key: &str) -> Option<&Missing> {
        self.missing.iter().find(|missing| missing.key == key)
    }
}

/// What only the process that serves a disk may know.
fn told(value: Option<impl Display>) -> String {
    value.map_or("the server's".to_owned(), |value| value.to_string())
}

/// Text of a lock file, harmless on a terminal.
fn shown(text: &str) -> String {
    text.chars()
        .flat_map(|c| match c.is_control() {
            true => c.escape_debug().collect::<Vec<_>>(),
            false => vec![c],
        })
        .collect()
}
