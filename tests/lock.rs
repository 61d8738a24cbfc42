//! `launcher lock`, and `launcher up --locked`, as a user runs them.

#![allow(clippy::unwrap_used)]

mod names;
mod program;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use self::names::names;
use self::program::{Done, launcher};

const VM: &str = "cpus = 2\n[boot]\nkernel = \"vmlinuz\"\n[[block]]\npath = \"root.img\"\n\
                  ro = true\nroot = true\nid = \"ROOT\"\n[[block]]\npath = \"data.qcow2\"\n\
                  size = \"64MiB\"\n";

/// A VM's folder, in a folder of its own.
struct Place {
    all: tempfile::TempDir,
    vm: PathBuf,
}

impl Place {
    fn new(name: &str) -> Place {
        let all = tempfile::tempdir().unwrap();
        let vm = all.path().join(name);
        fs::create_dir_all(&vm).unwrap();
        for (name, text) in [("vm.toml", VM), ("vmlinuz", "a kernel"), ("root.img", "")] {
            fs::write(vm.join(name), text).unwrap();
        }
        fs::write(vm.join("root.img"), vec![7; 1 << 20]).unwrap();
        Place { all, vm }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.vm.join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = launcher(&self.vm, self.all.path(), arguments);
        command.env("XDG_CACHE_HOME", self.all.path().join("cache"));
        command
    }

    fn launcher(&self, arguments: &[&str]) -> Done {
        self.command(arguments).output().unwrap().into()
    }
}

#[test]
fn a_vm_is_locked_and_checked() {
    let place = Place::new("vm");
    let done = place.launcher(&["lock"]);
    assert_eq!(
        (done.code, &*done.out, &*done.err),
        (0, "wrote vm.lock\n", "")
    );
    let done = place.launcher(&["lock"]);
    assert_eq!((done.code, &*done.out), (0, "vm.lock is up to date\n"));
    let done = place.launcher(&["lock", "--check", "vm.toml"]);
    assert_eq!(
        (done.code, &*done.out, &*done.err),
        (0, "vm.toml: as vm.lock has it\n", "")
    );
    // Nothing was created but the lock: no disk either.
    assert_eq!(
        names(&place.vm),
        ["root.img", "vm.lock", "vm.toml", "vmlinuz"]
    );
}

#[test]
fn drift_is_said_and_the_lock_left_alone() {
    let place = Place::new("vm");
    place.launcher(&["lock"]);
    let lock = fs::read(place.path("vm.lock")).unwrap();
    fs::write(place.path("vmlinuz"), "another").unwrap();
    for arguments in [&["lock", "--check"][..], &["up", "--locked"]] {
        let done = place.launcher(arguments);
        assert_eq!((done.code, &*done.out), (2, ""), "{done:?}");
        assert!(
            done.err.starts_with(
                "error: vm.toml is not as vm.lock has it: 1 difference\n  boot.kernel (vmlinuz), \
                 sha256\n    locked  "
            ),
            "{done:?}"
        );
    }
    assert_eq!(fs::read(place.path("vm.lock")).unwrap(), lock);
    assert!(!place.path("data.qcow2").exists());
}

#[test]
fn up_locked_without_a_lock_says_how_to_write_it() {
    let done = Place::new("vm").launcher(&["up", "--locked", "--detach"]);
    assert_eq!(done.code, 2, "{done:?}");
    assert_eq!(
        done.err,
        "error: vm.toml has no lock file: vm.lock is not there\nhelp: write it with `launcher lock \
         vm.toml`\n"
    );
}

#[test]
fn up_locked_goes_on_where_nothing_has_drifted() {
    let place = Place::new("vm");
    place.launcher(&["lock"]);
    let done = place.launcher(&["up", "--locked", "--force"]);
    // What comes next is wrong: the kernel is none, or there is no KVM.
    assert!(!done.err.contains("lock"), "{done:?}");
    assert!(
        done.err.contains("is no kernel") || done.err.contains("/dev/kvm"),
        "{done:?}"
    );
}

#[test]
fn a_lock_is_the_same_in_another_folder_and_environment() {
    let (here, there) = (Place::new("vm"), Place::new("deep/in/another folder"));
    here.launcher(&["lock"]);
    let mut command = there.command(&["lock"]);
    command
        .arg(there.path("vm.toml"))
        .current_dir("/")
        .env_clear()
        .env("LC_ALL", "de_DE.UTF-8")
        .env("TZ", "Asia/Tokyo")
        .env("LAUNCHER_IO", "threads");
    let done = Done::from(command.output().unwrap());
    assert_eq!((done.code, &*done.err), (0, ""), "{done:?}");
    let text = |place: &Place| fs::read_to_string(place.path("vm.lock")).unwrap();
    assert_eq!(text(&here), text(&there));
    // And one checks the other.
    fs::copy(here.path("vm.lock"), there.path("vm.lock")).unwrap();
    assert_eq!(there.launcher(&["lock", "--check"]).code, 0);
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error() {
    let place = Place::new("vm");
    fs::create_dir(place.path("vm.lock")).unwrap();
    let done = place.launcher(&["lock"]);
    assert_eq!(done.code, 1, "{done:?}");
    assert!(
        done.err.starts_with("error: cannot write vm.lock: "),
        "{done:?}"
    );
    let done = place.launcher(&["lock", "--check"]);
    assert_eq!(done.code, 2, "{done:?}");
    assert!(done.err.contains("vm.lock is a directory"), "{done:?}");
}

#[test]
fn a_profile_has_a_lock_of_its_own() {
    let place = Place::new("vm");
    fs::write(
        place.path("vm.toml"),
        format!("{VM}[profile.big]\nmemory = \"2GiB\"\n"),
    )
    .unwrap();
    place.launcher(&["lock"]);
    let done = place.launcher(&["up", "--locked", "-p", "big"]);
    assert_eq!(
        (done.code, &*done.err),
        (
            2,
            "error: vm.toml has no lock file: vm@big.lock is not there\nhelp: write it with \
             `launcher lock -p big vm.toml`\n"
        )
    );
    let done = place.launcher(&["lock", "-p", "big"]);
    assert_eq!((done.code, &*done.out), (0, "wrote vm@big.lock\n"));
    let text = fs::read_to_string(place.path("vm@big.lock")).unwrap();
    assert!(
        text.contains("`launcher lock -p big vm.toml` renews it.\n"),
        "{text}"
    );
    assert!(text.contains("memory = \"2GiB\"\n"), "{text}");
    for arguments in [&["lock", "--check"][..], &["lock", "--check", "-p", "big"]] {
        assert_eq!(place.launcher(arguments).code, 0);
    }
    // A value that is set is one of the file's.
    let done = place.launcher(&["lock", "--check", "--set", "memory=3GiB"]);
    assert_eq!(done.code, 2);
    assert!(
        done.err
            .contains("\n  memory\n    locked  512MiB\n    found   3GiB\n"),
        "{done:?}"
    );
    assert!(
        done.err
            .contains("`launcher lock --set memory=3GiB vm.toml`"),
        "{done:?}"
    );
}
