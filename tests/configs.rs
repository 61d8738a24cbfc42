//! What is checked in under configs/ carries its lock: the machine of each VM is the one that its lock has.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The lock files of all configurations.
fn locks() -> Vec<PathBuf> {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let folders = fs::read_dir(configs).unwrap();
    let files = folders.flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap());
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| extension == "lock")
    });
    files.sort();
    files
}

/// Copies the TOML files and the lock files of a configuration, and makes files of those names that its
/// lock has: their content is not what was locked.
fn stand_in(config: &Path, lock: &toml::Table, folder: &Path) {
    for file in fs::read_dir(config).unwrap() {
        let file = file.unwrap().path();
        if ["toml", "lock"]
            .iter()
            .any(|e| file.extension().is_some_and(|x| x == *e))
        {
            fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
        }
    }
    let text = |table: &toml::Value, key: &str| {
        let value = table.get(key).and_then(toml::Value::as_str);
        value.map(str::to_owned)
    };
    for (_, file) in lock["boot"].as_table().unwrap() {
        let path = folder.join(text(file, "path").unwrap());
        match path.extension().is_none() && path.ends_with("rootfs") {
            true => fs::create_dir(path).unwrap(),
            false => fs::write(path, "something else").unwrap(),
        }
    }
    let none = Vec::new();
    let tables = |table: &toml::Value, key: &str| {
        let tables = table.get(key).and_then(toml::Value::as_array);
        tables.unwrap_or(&none).clone()
    };
    for disk in tables(&toml::Value::Table(lock.clone()), "block") {
        let inputs = tables(&disk, "backing");
        let read = inputs.iter().chain(disk.get("sha256").map(|_| &disk));
        for input in read {
            let path = folder.join(text(input, "path").unwrap());
            File::create(path).unwrap().set_len(16 << 20).unwrap();
        }
        // An image whose size the configuration does not say is there.
        let path = folder.join(text(&disk, "path").unwrap());
        if !path.exists() && path.extension().is_some_and(|extension| extension == "img") {
            File::create(path).unwrap().set_len(2 << 30).unwrap();
        }
    }
}

#[test]
fn every_configuration_carries_its_lock() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    for folder in fs::read_dir(configs).unwrap() {
        for file in fs::read_dir(folder.unwrap().path()).unwrap() {
            let file = file.unwrap().path();
            let is_vm = file
                .extension()
                .is_some_and(|extension| extension == "toml")
                && file.file_stem().is_some_and(|stem| stem != "base");
            if is_vm {
                assert!(file.with_extension("lock").is_file(), "{}", file.display());
            }
        }
    }
}

#[test]
fn the_machine_of_a_configuration_is_the_one_that_its_lock_has() {
    let locks = locks();
    assert!(locks.len() >= 8, "{locks:?}");
    for file in locks {
        let folder = tempfile::tempdir().unwrap();
        let lock: toml::Table = fs::read_to_string(&file).unwrap().parse().unwrap();
        stand_in(file.parent().unwrap(), &lock, folder.path());
        let vm = folder
            .path()
            .join(file.with_extension("toml").file_name().unwrap());
        let output = Command::new(env!("CARGO_BIN_EXE_launcher"))
            .args(["lock", "--check"])
            .arg(&vm)
            .env("XDG_CACHE_HOME", folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let differences = said
            .lines()
            .filter(|line| line.starts_with("  ") && !line.starts_with("    "));
        // What is in the files is another matter: it is not in the repository.
        let others: Vec<_> = differences
            .filter(|line| !line.ends_with(", sha256"))
            .collect();
        assert!(others.is_empty(), "{}: {said}", file.display());
        let has_digests = fs::read_to_string(&file).unwrap().contains("sha256 = ");
        assert_eq!(
            output.status.code(),
            Some(if has_digests { 2 } else { 0 }),
            "{said}"
        );
    }
}
