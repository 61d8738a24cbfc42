//! The VMs of a folder.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::text;
use crate::{Error, Result, config};

/// The files of a folder's VMs, sorted: each `*.toml` in it, and the `vm.toml` of each folder in
/// it. A file that another of them extends is no VM of its own.
///
/// # Errors
///
/// The folder cannot be read, or there are none.
pub(super) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |error: io::Error| {
        let text = text(&error);
        Error::usage(format!(
            "cannot read the folder {}: {text}",
            folder.display()
        ))
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden {
            continue;
        }
        let inner = path.join("vm.toml");
        if path.is_file() && path.extension().is_some_and(|it| it == "toml") {
            files.push(path);
        } else if inner.is_file() {
            files.push(inner);
        }
    }
    let bases: HashSet<_> = files.iter().flat_map(|file| bases(file)).collect();
    files.retain(|file| !file.canonicalize().is_ok_and(|file| bases.contains(&file)));
    files.sort();
    match files.is_empty() {
        false => Ok(files),
        true => {
            let folder = folder.display();
            let message = format!("there is no VM in the folder {folder}");
            Err(Error::usage(message)
                .help("a VM is a file `NAME.toml` in it, or a folder in it with a `vm.toml`"))
        }
    }
}

/// The files that a file extends. One that cannot be read is told of when it is loaded.
fn bases(file: &Path) -> Vec<PathBuf> {
    let bases = config::extends(file).into_iter();
    bases.filter_map(|path| path.canonicalize().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let folder = folder(files);
        let found = super::files(folder.path()).unwrap();
        found
            .iter()
            .map(|file| {
                let file = file.strip_prefix(folder.path()).unwrap();
                file.to_str().unwrap().to_owned()
            })
            .collect()
    }

    #[test]
    fn vms_are_the_files_and_the_folders_with_a_vm_toml_sorted() {
        let files = ["b.toml", "a/vm.toml", "c/other.toml", "readme", ".x.toml"];
        assert_eq!(
            found(&files.map(|file| (file, ""))),
            ["a/vm.toml", "b.toml"]
        );
    }

    #[test]
    fn a_file_that_others_extend_is_no_vm() {
        let one = "extends = ['base.toml']";
        let two = "extends = '../base.toml'";
        let files = [("base.toml", ""), ("one.toml", one), ("two/vm.toml", two)];
        assert_eq!(found(&files), ["one.toml", "two/vm.toml"]);
    }

    #[test]
    fn a_file_that_is_extended_by_a_damaged_one_is_no_vm_either() {
        let files = [
            ("base.toml", ""),
            ("one.toml", "extends = 'base.toml'\ncpus\n"),
        ];
        assert_eq!(found(&files), ["one.toml"]);
    }

    #[test]
    fn a_file_that_is_too_large_is_not_read() {
        let folder = folder(&[("one.toml", ""), ("big.toml", "extends = 'one.toml'")]);
        let big = fs::File::options()
            .write(true)
            .open(folder.path().join("big.toml"));
        big.unwrap().set_len(1 << 40).unwrap();
        assert_eq!(files(folder.path()).unwrap().len(), 2);
    }

    #[test]
    fn a_folder_without_vms_is_an_error() {
        let folder = folder(&[("readme", "")]);
        let error = files(folder.path()).unwrap_err();
        assert_eq!(error.exit, 2);
        let error = files(&folder.path().join("none")).unwrap_err();
        assert!(error.to_string().ends_with("No such file or directory"));
    }
}
