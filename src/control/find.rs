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
                tracing::warn!("{}", error.message());
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::control::place::Claim;

    struct Host(tempfile::TempDir);

    impl Host {
        fn new() -> Self {
            Host(tempfile::tempdir().unwrap())
        }

        /// Runs a VM whose file has no name in it, or one that it has been given.
        fn up(&self, file: &str, named: Option<&str>, started_ms: u64) -> Claim {
            let file = self.path(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, "").unwrap();
            let file = file.canonicalize().unwrap();
            let stem = file.file_stem().unwrap().to_str().unwrap();
            let owner = Owner {
                pid: 1,
                name: named.unwrap_or(stem).to_owned(),
                file: file.clone(),
                started_ms,
                laid: Default::default(),
            };
            let place = Place::under(&self.base(), named, &file).unwrap();
            place.claim(&owner).unwrap()
        }

        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn base(&self) -> PathBuf {
            self.path("launcher")
        }

        fn find(&self, vm: impl AsRef<OsStr>) -> Result<(Place, Option<Owner>)> {
            find_under(&self.base(), vm)
        }
    }

    #[test]
    fn a_vm_is_found_by_its_name_its_file_and_the_folder_of_that() {
        let host = Host::new();
        let _web = host.up("web/vm.toml", Some("web"), 1);
        let _other = host.up("other/vm.toml", None, 2);
        let by_name = host.find("web").unwrap();
        assert_eq!(by_name.0.key(), "web");
        assert_eq!(by_name.1.as_ref().unwrap().name, "web");
        assert_eq!(host.find(host.path("web/vm.toml")).unwrap(), by_name);
        assert_eq!(host.find(host.path("web")).unwrap(), by_name);
    }

    #[test]
    fn a_vm_is_found_by_its_file_although_its_name_has_changed() {
        let host = Host::new();
        let _claim = host.up("vm.toml", Some("old"), 1);
        let (place, owner) = host.find(host.path("vm.toml")).unwrap();
        assert_eq!((place.key(), owner.is_some()), ("old", true));
    }

    #[test]
    fn a_name_that_fits_several_lists_their_files() {
        let host = Host::new();
        let _a = host.up("a/vm.toml", None, 1);
        let b = host.up("b/vm.toml", None, 2);
        let error = host.find("vm").unwrap_err();
        assert_eq!(error.exit, exit::USAGE);
        let text = error.to_string();
        assert!(
            text.starts_with("error: `vm` fits 2 running VMs: `vm-"),
            "{text}"
        );
        assert!(
            text.contains("a/vm.toml, `vm-") && text.contains("b/vm.toml\n"),
            "{text}"
        );
        // The folder's name says which, and so does the end of the other.
        let (place, _) = host.find(host.path("a/vm.toml")).unwrap();
        assert_eq!(host.find(place.key()).unwrap().0, place);
        drop(b);
        assert_eq!(host.find("vm").unwrap().0, place);
    }

    #[test]
    fn a_vm_that_has_ended_is_found_and_has_no_owner() {
        let host = Host::new();
        drop(host.up("a/vm.toml", None, 1));
        drop(host.up("b/vm.toml", None, 3));
        drop(host.up("c/vm.toml", None, 2));
        let (place, owner) = host.find("vm").unwrap();
        assert_eq!(owner, None);
        // The last one.
        assert_eq!(host.find(host.path("b/vm.toml")).unwrap(), (place, None));
    }

    #[test]
    fn a_file_that_never_ran_has_a_place_and_no_owner() {
        let host = Host::new();
        drop(host.up("a/vm.toml", None, 1));
        let file = host.path("new.toml");
        let (place, owner) = host.find(&file).unwrap();
        assert!(place.key().starts_with("new-") && owner.is_none());
    }

    #[test]
    fn a_name_that_nobody_has_is_not_running() {
        let host = Host::new();
        let error = host.find("nobody").unwrap_err();
        assert_eq!(error.exit, exit::NOT_RUNNING);
        let text = error.to_string();
        assert!(
            text.starts_with("error: no VM of the name `nobody` is running\nhelp: "),
            "{text}"
        );
    }
}
