//! Which disk a command means.

use std::path::{Path, PathBuf};

use clap::Args;
use formats::{Format, Image, OpenError};

use super::format::{format_of, named};
use super::image::{at_block, image, lone};
use crate::cli::target::Target;
use crate::config::{Block, Vm};
use crate::{Error, Result};

/// A disk of a VM, or an image of none.
///
/// The VM is always written where a disk is: with a default, `VM INDEX` would be told from
/// `INDEX SIZE` by how many words there are.
#[derive(Args)]
pub(super) struct Which {
    /// TOML file of the VM, the folder of its vm.toml, or its name
    #[arg(required_unless_present = "path", conflicts_with = "path")]
    pub(super) vm: Option<PathBuf>,
    /// The disk: its index over `[[block]]` from 0, or its id
    #[arg(
        value_name = "INDEX|ID",
        required_unless_present = "path",
        conflicts_with = "path"
    )]
    pub(super) disk: Option<String>,
    #[command(flatten)]
    pub(super) lone: Lone,
}

/// An image that no VM's file describes.
#[derive(Args)]
pub(super) struct Lone {
    /// An image, instead of a VM's disk
    #[arg(long, value_name = "IMAGE")]
    pub(super) path: Option<PathBuf>,
    /// Format of that image [default: the one that its extension stands for]
    #[arg(short, long, requires = "path")]
    format: Option<String>,
}

/// The disk that is meant.
pub(super) struct Found {
    /// To be read only.
    pub(super) image: Image,
    pub(super) format: &'static Format,
    /// Whose it is.
    of: Option<OfVm>,
}

struct OfVm {
    target: Target,
    vm: Vm,
    index: usize,
}

impl Which {
    /// An image of no VM, or, with `disk`, a disk of one.
    pub(super) fn of(what: &Path, disk: Option<String>, format: Option<String>) -> Which {
        let what = Some(what.to_owned());
        let (vm, path) = match disk {
            Some(_) => (what, None),
            None => (None, what),
        };
        let lone = Lone { path, format };
        Which { vm, disk, lone }
    }

    /// Finds the disk in its VM's file, or the format of the image that is named.
    pub(super) fn find(self) -> Result<Found> {
        if let Some(path) = &self.lone.path {
            return Ok(Found {
                image: lone(path),
                format: format_of(path, self.lone.format.as_deref(), Some("format"))?,
                of: None,
            });
        }
        let target = Target::of(self.vm)?;
        let vm = target.config()?;
        let index = index_of(&vm, self.disk.as_deref().unwrap_or_default())?;
        let block = has_image(&vm, index)?;
        Ok(Found {
            image: Image {
                ro: true,
                ..image(block)
            },
            format: named(&block.format)?,
            of: Some(OfVm { target, vm, index }),
        })
    }
}

impl Found {
    pub(super) fn path(&self) -> &Path {
        &self.image.path
    }

    /// Its part of the VM's file.
    pub(super) fn block(&self) -> Option<&Block> {
        self.of.as_ref().map(|of| &of.vm.block[of.index])
    }

    /// Whether it is of a VM that runs.
    pub(super) fn is_running(&self) -> bool {
        self.of.as_ref().is_some_and(|of| of.target.is_running())
    }

    /// The size that a running VM says it has.
    pub(super) fn live_size(&self) -> Option<u64> {
        let of = self.of.as_ref()?;
        Some(of.target.disks()?.get(of.index)?.size)
    }

    /// Where it is, if its VM's file lets it be changed while the VM does not run.
    pub(super) fn changeable(&self) -> Result<&Path> {
        let path = self.path().display();
        let what = match self.block() {
            Some(block) if block.ro => "`ro = true`, which is not changed",
            Some(block) if !block.lock => "`lock = false`: nothing tells whether a VM uses it",
            _ => return Ok(self.path()),
        };
        let message = format!("`{path}` is the image of a disk with {what}");
        let help = format!("to change it all the same, name the image: `--path {path}`");
        Err(Error::failed(message).help(help))
    }

    /// The error of opening its image.
    pub(super) fn refused(&self, error: OpenError) -> Error {
        match &self.of {
            Some(of) => at_block(&of.vm, of.index, error),
            None => error.into(),
        }
    }
}

/// Whether a disk is named by its index: by digits alone, while "+1" would parse as well.
pub(super) fn is_index(disk: &str) -> bool {
    disk.bytes().all(|byte| byte.is_ascii_digit())
}

/// The place of a disk in the VM's file, by its index or its `id`.
pub(super) fn index_of(vm: &Vm, disk: &str) -> Result<usize> {
    let by_index = disk.parse().ok().filter(|_| is_index(disk));
    let by_index = by_index.filter(|index| *index < vm.block.len());
    let by_id = || {
        let mut ids = vm.block.iter().map(|block| block.id.as_deref());
        ids.position(|id| id == Some(disk))
    };
    by_index.or_else(by_id).ok_or_else(|| {
        let file = vm.file.display();
        let message = format!("{file} has no disk {disk:?}, expected its index or its `id`");
        let error = Error::usage(message);
        match vm.block.len() {
            0 => error.help("it has no disk at all: add a `[[block]]`"),
            count => {
                let ids: Vec<_> = vm.block.iter().filter_map(|it| it.id.as_deref()).collect();
                let ids = match &ids[..] {
                    [] => "none has an `id`".to_owned(),
                    ids => format!("the ids are {}", ids.join(", ")),
                };
                error.help(format!("its disks are 0 to {}; {ids}", count - 1))
            }
        }
    })
}

/// A disk that has its image here.
///
/// # Errors
///
/// Another process serves it.
pub(super) fn has_image(vm: &Vm, index: usize) -> Result<&Block> {
    let block = &vm.block[index];
    if !block.is_served() {
        return Ok(block);
    }
    let socket = block.path.display();
    let message = format!("disk {index} is served by another process, at `{socket}`");
    Err(Error::failed(message)
        .help("that one has the image: name it instead, or the VM in whose file it is")
        .about(format!("block.{index}.vhost_user"))
        .at(&vm.places))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config;

    #[test]
    fn an_index_is_digits_alone() {
        assert!(is_index("0") && is_index("10"));
        assert!(!is_index("+1") && !is_index("-1") && !is_index("1a"));
    }

    fn vm(text: &str) -> Vm {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.toml");
        fs::write(&file, format!("[boot]\nkernel = 'k'\n{text}")).unwrap();
        config::load(&file, &config::Choice::default()).unwrap()
    }

    #[test]
    fn a_disk_is_its_index_or_its_id() {
        let vm =
            vm("[[block]]\npath = 'a.img'\nid = 'ROOT'\n[[block]]\npath = 'b.img'\nid = '7'\n");
        assert_eq!(index_of(&vm, "0").unwrap(), 0);
        assert_eq!(index_of(&vm, "1").unwrap(), 1);
        assert_eq!(index_of(&vm, "ROOT").unwrap(), 0);
        assert_eq!(index_of(&vm, "7").unwrap(), 1);
        for wrong in ["2", "-1", "root", ""] {
            let error = index_of(&vm, wrong).unwrap_err();
            assert_eq!(error.exit, 2);
            let text = error.to_string();
            assert!(
                text.ends_with("help: its disks are 0 to 1; the ids are ROOT, 7"),
                "{text}"
            );
        }
    }
}
