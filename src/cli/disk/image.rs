//! Which image a command means, and how it is opened.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use clap::Args;
use formats::{Engine, Format, HostFile, Image, OpenError, Ring, find, for_extension, raw_for};

use crate::config::{Block, Vm};
use crate::{Error, Result};

/// A disk of a VM, or an image of none.
#[derive(Args)]
pub(super) struct Which {
    /// TOML file of the VM, the folder of its vm.toml, or the name of a running VM
    #[arg(required_unless_present = "path", conflicts_with = "path")]
    pub(super) vm: Option<PathBuf>,
    /// The disk: its index over [[block]] from 0, or its id
    #[arg(
        value_name = "INDEX|ID",
        required_unless_present = "path",
        conflicts_with = "path"
    )]
    pub(super) disk: Option<String>,
    /// An image, instead of a VM's disk
    #[arg(long, value_name = "IMAGE")]
    pub(super) path: Option<PathBuf>,
    /// Format of that image [default: the one that its extension stands for]
    #[arg(long, requires = "path")]
    pub(super) format: Option<String>,
}

/// The place of a disk in the VM's file, by its index or its `id`.
pub(super) fn index_of(vm: &Vm, disk: &str) -> Result<usize> {
    let by_index = disk.parse().ok().filter(|index| *index < vm.block.len());
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

/// The format of an image that no VM's file describes: the one written out, or its extension's.
pub(super) fn format_of(path: &Path, written: Option<&str>) -> Result<&'static Format> {
    let names = || {
        let names: Vec<_> = formats::formats()?
            .iter()
            .map(|format| format.name)
            .collect();
        Ok::<_, Error>(format!("this build has {}", names.join(", ")))
    };
    match written {
        // Thin: nothing is allocated of what is only looked at.
        Some(name) if name == raw_for(false) => named(raw_for(true)),
        Some(name) => match find(name) {
            Some(format) => Ok(format),
            None => {
                let message = format!("`--format` is {name:?}, expected the name of a format");
                Err(Error::usage(message).help(names()?))
            }
        },
        None => {
            let extension = path.extension().and_then(|extension| extension.to_str());
            match extension.and_then(for_extension) {
                Some(format) => thin(format),
                None => {
                    let shown = path.display();
                    let message = format!("the name `{shown}` does not tell the image's format");
                    Err(Error::usage(message).help(format!("add `--format`: {}", names()?)))
                }
            }
        }
    }
}

/// The format that opens the same images and allocates nothing.
pub(super) fn thin(format: &'static Format) -> Result<&'static Format> {
    match format.name == raw_for(false) {
        true => named(raw_for(true)),
        false => Ok(format),
    }
}

/// Whether images of this format are the bytes of the disk.
pub(super) fn raw_name(name: &str) -> bool {
    name == raw_for(true) || name == raw_for(false)
}

/// A format of a VM's file, which has been checked already.
pub(super) fn named(name: &str) -> Result<&'static Format> {
    find(name).ok_or_else(|| {
        Error::usage(format!("format `{name}` is not in this build")).help("see `launcher formats`")
    })
}

/// An image as a VM's file describes it, of whatever size it is.
pub(super) fn image(block: &Block) -> Image {
    Image {
        path: block.path.clone(),
        ro: block.ro,
        sparse: block.sparse,
        o_direct: block.o_direct,
        block_size: block.block_size,
        lock: block.lock,
        size: None,
        backing: block.backing.clone(),
        format_written: block.format_written,
        options: block.options.clone(),
    }
}

/// An image that no VM's file describes, to be read under a lock.
pub(super) fn lone(path: &Path) -> Image {
    Image {
        path: path.to_owned(),
        ro: true,
        sparse: true,
        o_direct: false,
        block_size: 512,
        lock: true,
        size: None,
        backing: Vec::new(),
        format_written: true,
        options: Vec::new(),
    }
}

/// What carries out the I/O of this command.
pub(super) fn ring() -> Result<Ring> {
    use crate::cli::up;
    let engine = match std::env::var_os(up::VARIABLE) {
        None => Engine::Auto,
        Some(value) => up::engine(&value.to_string_lossy())?,
    };
    Ring::new(engine).map_err(|error| Error::failed(format!("cannot set up I/O: {error}")))
}

/// Opens the file of an image under its lock: for reading, with the writers shut out, or for
/// writing with everybody shut out. The lock lasts as long as the [`HostFile`].
pub(super) fn locked(ring: &Ring, image: &Image) -> Result<(HostFile, File), OpenError> {
    let file = HostFile::open(ring, image)?;
    let same = file.file().as_fd().try_clone_to_owned();
    let same = same.map_err(|error| OpenError {
        message: format!("cannot open `{}`: {error}", image.path.display()),
        help: None,
        key: OpenError::HOST,
    })?;
    Ok((file, File::from(same)))
}

/// The error of opening a disk's image, shown at the key of the VM's file that is at fault.
pub(super) fn at_block(vm: &Vm, index: usize, error: OpenError) -> Error {
    let key = match error.key {
        OpenError::HOST => "path",
        key => key,
    };
    let about = format!("block.{index}.{key}");
    Error::from(error).about(about).at(&vm.places)
}

/// What the user reads of a host's error: without the number.
pub(super) fn text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config;

    fn vm(text: &str) -> Vm {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.toml");
        fs::write(&file, format!("[boot]\nkernel = 'k'\n{text}")).unwrap();
        config::load(&file).unwrap()
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

    #[test]
    fn the_format_is_written_out_or_follows_from_the_extension() {
        let name = |path: &str, written| {
            format_of(Path::new(path), written)
                .map(|format| format.name)
                .map_err(|error| error.to_string())
        };
        assert_eq!(name("a.qcow2", None).unwrap(), "qcow2");
        assert_eq!(name("a.img", None).unwrap(), "sparse-raw");
        assert_eq!(name("a.img", Some("qcow2")).unwrap(), "qcow2");
        assert_eq!(name("a", Some("raw")).unwrap(), "sparse-raw");
        assert!(
            name("a", None)
                .unwrap_err()
                .contains("add `--format`: this build has qcow2")
        );
        assert!(
            name("a", Some("qcow"))
                .unwrap_err()
                .contains("`--format` is \"qcow\"")
        );
    }
}
