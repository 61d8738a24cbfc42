//! From what the user calls a VM to its place.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::place::{self, Owner, Place};
use crate::{Error, Result, exit};

/// The place of the VM that an argument names: a path to its TOML file (it has a `/`, ends in
/// `.toml` or is there as a file) or the folder with its vm.toml, or the name of a VM that runs.
/// With it who runs it: `None` if it has ended, or never ran.
///
/// # Errors
///
/// The name fits several VMs, or none that is known ([`exit::NOT_RUNNING`]).
pub fn find(vm: impl AsRef<OsStr>) -> Result<(Place, Option<Owner>)> {
    find_under(&place::base(), vm)
}

/// As [`find`], among the places below another folder than that of the user's session.
///
/// # Errors
///
/// As [`find`].
pub fn find_under(base: &Path, vm: impl AsRef<OsStr>) -> Result<(Place, Option<Owner>)> {
    let vm = vm.as_ref();
    let known = known(base)?;
    if is_path(vm) {
        return of_file(base, known, vm);
    }
    let name = vm.to_string_lossy();
    let fits = |known: &Known| known.owner.name == name || known.place.key() == name;
    match the_one(known, &name, fits)? {
        Some(found) => Ok(found),
        // A folder in the working directory, as a shell completes it.
        None if Path::new(vm).join("vm.toml").is_file() => of_file(base, self::known(base)?, vm),
        None => Err(unknown(&name)),
    }
}

/// A place, who holds or held it, and whether it is still held.
struct Known {
    place: Place,
    owner: Owner,
    runs: bool,
}

fn known(base: &Path) -> Result<Vec<Known>> {
    let mut known = Vec::new();
    for place in Place::all_under(base)? {
        let (owner, runs) = match place.owner() {
            Ok(Some(owner)) => (Some(owner), true),
            Ok(None) => (place.last_owner(), false),
            // One folder that is broken is no reason not to find another.
            Err(error) => {
                tracing::warn!("{error}");
                continue;
            }
        };
        known.extend(owner.map(|owner| Known { place, owner, runs }));
    }
    Ok(known)
}

fn of_file(base: &Path, known: Vec<Known>, vm: &OsStr) -> Result<(Place, Option<Owner>)> {
    let file = place::canonical(&file(vm))?;
    let fits = |known: &Known| known.owner.file == file;
    match the_one(known, &vm.to_string_lossy(), fits)? {
        Some(found) => Ok(found),
        None => Ok((Place::under(base, None, &file)?, None)),
    }
}

/// The one that runs, or else the one that ended last.
fn the_one(
    mut known: Vec<Known>,
    vm: &str,
    fits: impl Fn(&Known) -> bool,
) -> Result<Option<(Place, Option<Owner>)>> {
    known.retain(fits);
    if known.iter().any(|known| known.runs) {
        known.retain(|known| known.runs);
    }
    known.sort_by_key(|known| known.owner.started_ms);
    match known.as_slice() {
        [several @ .., _] if !several.is_empty() && known.iter().all(|known| known.runs) => {
            Err(ambiguous(vm, &known))
        }
        _ => Ok(known.pop().map(|known| {
            let owner = Some(known.owner).filter(|_| known.runs);
            (known.place, owner)
        })),
    }
}

fn is_path(vm: &OsStr) -> bool {
    let bytes = vm.as_encoded_bytes();
    bytes.contains(&b'/')
        || bytes.ends_with(b".toml")
        || matches!(bytes, b"." | b"..")
        || Path::new(vm).is_file()
}

fn file(vm: &OsStr) -> PathBuf {
    let path = PathBuf::from(vm);
    match path.is_dir() {
        true => path.join("vm.toml"),
        false => path,
    }
}

fn ambiguous(vm: &str, known: &[Known]) -> Error {
    let files: Vec<_> = known
        .iter()
        .map(|Known { place, owner, .. }| {
            let file = owner.file.display();
            format!("`{}` from {file}", place.key())
        })
        .collect();
    let count = files.len();
    Error::usage(format!(
        "`{vm}` fits {count} running VMs: {}",
        files.join(", ")
    ))
    .help("say which with its file, or the name in front of it")
}

fn unknown(name: &str) -> Error {
    let mut error = Error::failed(format!("no VM of the name `{name}` is running")).help(
        "`launcher ps` lists those that are; a file that is meant ends in .toml or has a `/`",
    );
    error.exit = exit::NOT_RUNNING;
    error
}
