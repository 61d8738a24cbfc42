//! Where a lock file is, and the command that writes it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::config::Choice;
use crate::{Error, Result};

/// The place of a VM's lock: `vm.lock` beside `vm.toml`. A VM with profiles is another, and has a
/// lock of its own: `vm@fast.lock`.
#[derive(Debug)]
pub(crate) struct Place {
    /// The lock file.
    pub(crate) lock: PathBuf,
    /// The VM's own.
    pub(crate) vm: PathBuf,
    /// What is chosen, as arguments of a command, each with a blank behind it.
    chosen: String,
}

impl Place {
    /// The place for a VM's file and what is laid over it.
    ///
    /// # Errors
    ///
    /// The file has the name that its lock would have, or a profile has one that is no part of a
    /// file's.
    pub(crate) fn of(file: &Path, choice: &Choice) -> Result<Place> {
        let mut name = file.file_stem().unwrap_or_default().to_owned();
        let mut chosen = String::new();
        for profile in &choice.profiles {
            if profile.contains('/') || profile.contains(char::is_control) || profile.len() > 64 {
                let message =
                    format!("the profile {profile:?} cannot be in the name of a lock file");
                return Err(Error::usage(message)
                    .help("name it with letters and digits, 64 of them at most"));
            }
            name.push("@");
            name.push(profile);
            chosen += &format!("-p {} ", quoted(profile));
        }
        for set in &choice.set {
            chosen += &format!("--set {} ", quoted(set));
        }
        name.push(OsString::from(".lock"));
        let lock = file.with_file_name(name);
        if lock == file {
            let message = format!("{} has the name of a lock file", file.display());
            return Err(Error::usage(message).help("give the VM's file the extension .toml"));
        }
        Ok(Place {
            lock,
            vm: file.to_owned(),
            chosen,
        })
    }

    /// The command that writes the lock, from the current folder.
    pub(super) fn command(&self) -> String {
        format!("launcher lock {}{}", self.chosen, self.vm.display())
    }

    /// The same from the folder of the VM's file.
    pub(super) fn command_there(&self) -> String {
        let name = self.vm.file_name().unwrap_or_default().to_string_lossy();
        let command = format!("launcher lock {}{}", self.chosen, quoted(&name));
        command.chars().filter(|c| !c.is_control()).collect()
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_.,=/:@+%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(file: &str, profiles: &[&str], set: &[&str]) -> Result<Place> {
        let owned = |words: &[&str]| words.iter().map(|it| (*it).to_owned()).collect();
        let choice = Choice {
            profiles: owned(profiles),
            set: owned(set),
            ..Choice::default()
        };
        Place::of(Path::new(file), &choice)
    }

    #[test]
    fn the_lock_is_beside_the_vm_s_file() {
        let lock = |file| place(file, &[], &[]).unwrap().lock;
        assert_eq!(lock("vm.toml"), Path::new("vm.lock"));
        assert_eq!(lock("a/web.toml"), Path::new("a/web.lock"));
        assert_eq!(lock("a/my.web.toml"), Path::new("a/my.web.lock"));
    }

    #[test]
    fn profiles_have_a_lock_of_their_own_and_values_do_not() {
        let place = place("a/vm.toml", &["fast", "debug"], &["cpus=4"]).unwrap();
        assert_eq!(place.lock, Path::new("a/vm@fast@debug.lock"));
        assert_eq!(
            place.command(),
            "launcher lock -p fast -p debug --set cpus=4 a/vm.toml"
        );
        assert_eq!(
            place.command_there(),
            "launcher lock -p fast -p debug --set cpus=4 vm.toml"
        );
    }

    #[test]
    fn the_command_can_be_given_to_a_shell() {
        let place = place("vm.toml", &[], &["boot.cmdline=it's quiet"]).unwrap();
        assert_eq!(
            place.command(),
            r"launcher lock --set 'boot.cmdline=it'\''s quiet' vm.toml"
        );
    }

    #[test]
    fn what_is_no_place_for_a_lock_is_refused() {
        let error = place("a/vm.lock", &[], &[]).unwrap_err();
        let message = "a/vm.lock has the name of a lock file";
        assert_eq!((error.exit, error.message()), (2, message));
        for profile in ["../a", "a\nb"] {
            let error = place("vm.toml", &[profile], &[]).unwrap_err();
            let message = format!("the profile {profile:?} cannot be in the name of a lock file");
            assert_eq!((error.exit, error.message()), (2, &*message));
        }
    }
}
