//! The text of a new vm.toml: every key that there is, with the words of its documentation.

use std::path::Path;

use super::found::{Found, Kernel};
use crate::config::{Absent, KEYS, Key, Takes, size};
use crate::{Error, Result};

/// What the command line says besides the files.
pub(super) struct Settings {
    pub(super) cpus: Option<u32>,
    /// In bytes.
    pub(super) memory: Option<u64>,
}

/// A key that is set: its name, its value as TOML, and a note on it.
struct Set {
    key: &'static str,
    value: String,
    note: Option<&'static str>,
}

impl Set {
    fn new(key: &'static str, value: impl Into<String>) -> Set {
        Set {
            key,
            value: value.into(),
            note: None,
        }
    }
}

/// The text, for a file in `dir`.
pub(super) fn text(dir: &Path, found: &Found, settings: &Settings) -> Result<String> {
    let mut top = Vec::new();
    if let Some(cpus) = settings.cpus {
        top.push(Set::new("cpus", cpus.to_string()));
    }
    if let Some(memory) = settings.memory {
        top.push(Set::new("memory", of_size(memory)));
    }
    let mut boot = match &found.kernel {
        Kernel::File(kernel) => vec![path("kernel", dir, kernel)?],
        Kernel::Hosts(kernel) => vec![Set {
            note: Some(
                "This is the kernel of the host that the file was made on, by an absolute path: \
                 elsewhere, put another in its place.",
            ),
            ..path("kernel", dir, kernel)?
        }],
        Kernel::Disk(index) => vec![Set::new("from_block", index.to_string())],
    };
    if let Some(initrd) = &found.initrd {
        boot.push(path("initrd", dir, initrd)?);
    }
    // Of the disk that is booted from, launcher finds the partition itself.
    let root = super::root(found).filter(|_| !matches!(found.kernel, Kernel::Disk(_)));
    let parameter = root.and_then(|index| found.disks[index].root_parameter(index));
    if let Some(parameter) = parameter {
        boot.push(Set {
            note: Some("The root file system is in a partition of its disk."),
            ..Set::new("cmdline", quoted(&parameter))
        });
    }
    let mut text = "# A VM: `launcher up` boots it, `launcher explain KEY` says more of a key. \
                    Lines in comments\n# are defaults, or examples where there is no default.\n"
        .to_owned();
    let values = |key: &&Key| !matches!(key.takes, Takes::Table(_) | Takes::Tables(_));
    for key in KEYS.iter().filter(values) {
        option(key, &top, &mut text);
    }
    for key in KEYS {
        match key.takes {
            Takes::Table(keys) => {
                let set = if key.name == "boot" { &boot[..] } else { &[] };
                text += &format!("\n{}[{}]\n", comment(&key.meaning()), key.name);
                keys.iter().for_each(|key| option(key, set, &mut text));
            }
            Takes::Tables(keys) if key.name == "block" => {
                blocks(key, keys, dir, found, &mut text)?;
            }
            _ => {}
        }
    }
    Ok(text)
}

/// The disks: of the first, all that could be said of it.
fn blocks(key: &Key, keys: &[Key], dir: &Path, found: &Found, text: &mut String) -> Result<()> {
    let disks = &found.disks;
    *text += &format!("\n{}", comment(&key.meaning()));
    if disks.is_empty() {
        *text += "# [[block]]\n# path = \"disk.img\"\n";
    }
    let root = super::root(found);
    for (index, disk) in disks.iter().enumerate() {
        let mut set = vec![path("path", dir, &disk.path)?];
        if disk.format_named {
            set.push(Set::new("format", quoted(disk.format)));
        }
        if disk.ro {
            set.push(Set::new("ro", "true"));
        }
        if root == Some(index) {
            set.push(Set::new("root", "true"));
        }
        let backing = disk.backing.iter().map(|file| path("backing", dir, file));
        match &backing.collect::<Result<Vec<_>>>()?[..] {
            [] => {}
            files => {
                let files: Vec<_> = files.iter().map(|file| &*file.value).collect();
                set.push(Set::new("backing", format!("[{}]", files.join(", "))));
            }
        }
        match index {
            0 => {
                *text += "[[block]]\n";
                keys.iter().for_each(|key| option(key, &set, text));
            }
            _ => {
                *text += "\n[[block]]\n";
                set.iter()
                    .for_each(|set| *text += &format!("{} = {}\n", set.key, set.value));
            }
        }
    }
    Ok(())
}

/// A key with what it does; in a comment if it is not set.
fn option(key: &Key, set: &[Set], text: &mut String) {
    if !text.ends_with("]\n") {
        *text += "\n";
    }
    *text += &comment(&key.meaning());
    match set.iter().find(|set| set.key == key.name) {
        Some(set) => {
            *text += &set.note.map(comment).unwrap_or_default();
            *text += &format!("{} = {}\n", key.name, set.value);
        }
        None => {
            let value = match key.absent {
                Absent::Value(default) => default,
                _ => key.example,
            };
            if let Absent::Words(words) = key.absent {
                *text += &comment(&format!("Default: {words}."));
            }
            *text += &format!("# {} = {value}\n", key.name);
        }
    }
}

/// Text in comments of at most 100 characters a line.
fn comment(text: &str) -> String {
    let lines = crate::cli::explain::wrapped(text, 98);
    lines.lines().map(|line| format!("# {line}\n")).collect()
}

/// A path as the file writes it: relative to its folder if it is in there, absolute otherwise.
fn path(key: &'static str, dir: &Path, path: &Path) -> Result<Set> {
    let failed =
        |error: std::io::Error| Error::unopenable(&format!("`{}`", path.display()), &error);
    // The last part may be a link, which is meant.
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let name = path.file_name().unwrap_or_default();
    let whole = folder.canonicalize().map_err(failed)?.join(name);
    let dir = dir.canonicalize().map_err(failed)?;
    let (written, note) = match whole.strip_prefix(&dir) {
        Ok(relative) => (relative, None),
        Err(_) => (
            &*whole,
            Some("An absolute path: it is not below this file's folder."),
        ),
    };
    let text = written.to_str().ok_or_else(|| {
        Error::usage(format!(
            "`{}` is no UTF-8, which TOML is",
            written.display()
        ))
    })?;
    Ok(Set {
        key,
        value: match text.starts_with("~/") {
            // That would be the home folder.
            true => quoted(&format!("./{text}")),
            false => quoted(text),
        },
        note,
    })
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// A size as the file writes it.
fn of_size(bytes: u64) -> String {
    match bytes.is_multiple_of(1024) && bytes > 0 {
        true => quoted(&size::show(bytes)),
        false => bytes.to_string(),
    }
}
