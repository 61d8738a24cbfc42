//! Where the files come from that a VM reads: what is not there is fetched or built, and what has
//! a digest is compared with it.
//!
//! Only `launcher up` and `launcher prepare` come here: no other command fetches or runs anything.

mod build;
mod fetch;

use std::io;
use std::path::Path;

use crate::config::{HostFile, Vm};
use crate::{Error, Result, digest, exit};

/// What has been done about a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// It was there.
    Present,
    /// It was fetched.
    Fetched,
    /// Its command has made it.
    Built,
    /// It is not there, and nothing says where it comes from.
    Absent,
}

/// Fetches and builds those files of a VM that are not there.
///
/// # Errors
///
/// The first one that cannot be had, with its place in the VM's file: exit code 1, or 2 if what
/// is fetched is not what the file says.
pub(crate) fn ensure(vm: &Vm) -> Result<()> {
    make(vm, false).map(drop)
}

/// As [`ensure`]; what has been done about each file of [`Vm::host_files`]. With `rebuild`, also
/// what is there is built.
pub(crate) fn make(vm: &Vm, rebuild: bool) -> Result<Vec<Made>> {
    let files = vm.host_files();
    let mut commands = build::Commands::new(&files, rebuild);
    let made = files.iter().map(|(key, file)| {
        if let Some(url) = &file.url {
            match is_there(&file.path) {
                true => Ok(Made::Present),
                false => fetch::fetch(key, file, url).map(|()| Made::Fetched),
            }
        } else if !file.build.is_empty() {
            commands.make(key, file)
        } else if is_there(&file.path) {
            Ok(Made::Present)
        } else {
            Ok(Made::Absent)
        }
    });
    made.collect::<Result<_>>()
        .map_err(|error| error.at(&vm.places))
}

/// Compares the files of a VM with the digests that its file says they have.
///
/// # Errors
///
/// All that differ, each with its place and both digests (exit code 2), or that cannot be read.
pub(crate) fn verify(vm: &Vm) -> Result<()> {
    as_one(differing(vm, |_| true))
}

/// As [`verify`], of one disk: its image and its backing files.
pub(crate) fn verify_block(vm: &Vm, index: usize) -> Result<()> {
    let block = &vm.block[index];
    as_one(differing(vm, |path| {
        block.path == path || block.backing.iter().any(|file| file.path == path)
    }))
}

fn as_one(wrong: Vec<Error>) -> Result<()> {
    if wrong.len() < 2 {
        return wrong.into_iter().next().map_or(Ok(()), Err);
    }
    let code = wrong.iter().map(|error| error.exit).max();
    let texts: Vec<_> = wrong.iter().map(ToString::to_string).collect();
    let mut all = Error::rendered(texts.join("\n\n"));
    all.exit = code.unwrap_or(exit::USAGE);
    Err(all)
}

/// What [`verify`] would say of the files that are there.
pub(crate) fn mistaken(vm: &Vm) -> Vec<Error> {
    differing(vm, is_there)
}

/// The errors of those files whose digest is not what the VM's file says.
fn differing(vm: &Vm, of_interest: impl Fn(&Path) -> bool) -> Vec<Error> {
    let files = vm.host_files();
    let files = files.iter().filter(|(_, file)| of_interest(&file.path));
    files
        .filter_map(|(key, file)| compare(vm, key, file).err())
        .map(|error| error.at(&vm.places))
        .collect()
}

fn compare(vm: &Vm, key: &str, file: &HostFile) -> Result<()> {
    let Some(expected) = file.sha256 else {
        return Ok(());
    };
    let found = digest::of_input(key, &file.path);
    let found = found.map_err(|error| error.about(format!("{key}.path")))?;
    if found == expected {
        return Ok(());
    }
    let path = file.path.display();
    let help = if file.url.is_some() {
        format!("remove {path}, and it is fetched again")
    } else if !file.build.is_empty() {
        let vm = vm.file.display();
        format!("if what it is made of has changed: `launcher prepare --rebuild {vm}`")
    } else {
        format!("if this is the file that is meant, write `sha256 = \"{found}\"`")
    };
    let message = format!("`sha256` is {expected}, but {path} has {found}");
    Err(Error::usage(message)
        .help(help)
        .about(format!("{key}.sha256")))
}

/// Whether there is a file. One that cannot be looked at is: opening it will say why it fails.
fn is_there(path: &Path) -> bool {
    match std::fs::metadata(path) {
        Ok(_) => true,
        Err(error) => !matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
        ),
    }
}
