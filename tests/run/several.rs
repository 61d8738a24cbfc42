//! `launcher up` of several VMs, and how they are ended.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::kernel::*;
use crate::vm::eventually;

/// A folder with kernels, VMs of them, and what runs.
struct Fleet(TempDir);

impl Fleet {
    fn new() -> Fleet {
        let fleet = Fleet(tempfile::tempdir().unwrap());
        for (name, code) in [
            ("up", [print("host login: "), halt()].concat()),
            ("silent", halt()),
            ("off", power_off()),
        ] {
            fs::write(fleet.path(name), bzimage(&code)).unwrap();
        }
        fleet
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A VM whose file lies in the folder `vms`.
    fn vm(&self, file: &str, kernel: &str, lines: &str) {
        let path = self.path("vms").join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let kernel = self.path(kernel);
        let text = format!("memory = '16MiB'\nboot.kernel = {kernel:?}\n{lines}\n");
        fs::write(path, text).unwrap();
    }

    /// Exit code, the sorted lines of standard output, and standard error.
    fn launcher(&self, arguments: &[&str]) -> (i32, Vec<String>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_launcher"))
            .args(arguments)
            .current_dir(self.path(""))
            .env_remove("LAUNCHER_LOG")
            .env("XDG_RUNTIME_DIR", self.path(""))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        let mut lines: Vec<_> = out.lines().map(str::to_owned).collect();
        lines.sort();
        let err = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), lines, err)
    }

    fn up(&self, arguments: &[&str]) -> (i32, Vec<String>, String) {
        self.launcher(&[&["up", "--force"], arguments].concat())
    }

    fn running(&self) -> Vec<String> {
        let (_, lines, _) = self.launcher(&["ps"]);
        let words = lines.iter().filter_map(|line| line.split(' ').next());
        let names = words.filter(|name| !["NAME", "no"].contains(name));
        names.map(str::to_owned).collect()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.launcher(&["kill", "--all", "vms"]);
    }
}

#[test]
fn each_vm_of_a_folder_runs_and_all_are_ended() {
    let fleet = Fleet::new();
    fleet.vm("a.toml", "up", "");
    fleet.vm("b/vm.toml", "up", "name = 'bee'");
    fleet.vm("c.toml", "up", "");
    let (code, out, err) = fleet.up(&["--all", "vms", "--wait", "boot"]);
    assert_eq!((code, &*err), (0, ""));
    assert_eq!(out, ["a is up", "bee is up", "c is up"]);
    assert_eq!(fleet.running(), ["a", "bee", "c"]);
    let (code, out, _) = fleet.launcher(&["kill", "vms/c.toml"]);
    assert_eq!((code, out.len()), (0, 1));
    eventually("its process ends", || fleet.running() == ["a", "bee"]);
    // One that does not run is no failure.
    let (code, out, err) = fleet.launcher(&["kill", "--all", "vms"]);
    assert_eq!((code, &*err), (0, ""));
    let forced = |name| format!("{name} was ended by force: an order to kill it");
    assert_eq!(out, ["a", "bee"].map(forced));
    eventually("their processes end", || fleet.running().is_empty());
    let (code, _, err) = fleet.launcher(&["stop", "--all", "vms"]);
    assert_eq!(code, 3);
    assert!(
        err.starts_with("error: no VM of the folder vms is running\n"),
        "{err}"
    );
}

#[test]
fn files_are_named_one_by_one_too() {
    let fleet = Fleet::new();
    fleet.vm("a.toml", "silent", "");
    fleet.vm("b.toml", "silent", "");
    let (code, out, err) = fleet.up(&["vms/a.toml", "vms/b.toml"]);
    assert_eq!((code, &*err), (0, ""));
    assert_eq!(out, ["a runs", "b runs"]);
    let (code, _, err) = fleet.up(&["vms/a.toml", "vms/b.toml"]);
    assert_eq!(code, 4);
    assert!(err.contains("`a` is already running: process "), "{err}");
}

#[test]
fn none_starts_if_one_file_is_wrong() {
    let fleet = Fleet::new();
    fleet.vm("a.toml", "up", "");
    fleet.vm("b.toml", "up", "cpus = 0");
    fleet.vm("c.toml", "up", "name = ''");
    let (code, out, err) = fleet.up(&["--all", "vms"]);
    assert_eq!((code, out.len()), (2, 0));
    assert!(
        err.contains("`cpus` is 0") && err.contains("`name` is ''"),
        "{err}"
    );
    assert!(fleet.running().is_empty());
}

#[test]
fn a_file_that_several_share_is_built_once() {
    let fleet = Fleet::new();
    for file in ["a.toml", "b.toml"] {
        let path = fleet.path("vms").join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let build = "['sh', '-c', 'echo built >> log; cp ../silent built']";
        let text = format!("boot.kernel = {{ path = 'built', build = {build} }}\n");
        fs::write(path, text).unwrap();
    }
    let (code, out, err) = fleet.up(&["--all", "vms"]);
    assert_eq!(
        (code, &*out),
        (0, &["a runs", "b runs"].map(str::to_owned)[..]),
        "{err}"
    );
    assert_eq!(
        fs::read_to_string(fleet.path("vms/log")).unwrap(),
        "built\n"
    );
}

#[test]
fn none_starts_if_a_file_of_one_is_another_than_it_says() {
    let fleet = Fleet::new();
    fleet.vm("a.toml", "up", "");
    let digest = "0".repeat(64);
    let text = format!("boot.kernel = {{ path = '../up', sha256 = '{digest}' }}\n");
    fs::write(fleet.path("vms/b.toml"), text).unwrap();
    let (code, out, err) = fleet.up(&["--all", "vms"]);
    assert_eq!((code, out.len()), (2, 0));
    assert!(err.contains(&digest), "{err}");
    assert!(fleet.running().is_empty());
}

#[test]
fn none_starts_if_two_have_the_same_name() {
    let fleet = Fleet::new();
    fleet.vm("a.toml", "up", "name = 'web'");
    fleet.vm("b.toml", "up", "name = 'web'");
    let (code, _, err) = fleet.up(&["vms/a.toml", "vms/b.toml"]);
    assert_eq!(code, 2);
    assert_eq!(
        err,
        "error: vms/a.toml and vms/b.toml are both called `web`\n\
         help: give one of them another `name`: socket and logs go by it\n"
    );
    let (code, _, err) = fleet.up(&["vms/a.toml", "./vms/a.toml"]);
    assert_eq!(code, 2);
    assert!(err.contains("is named twice, expected once"), "{err}");
    let (code, _, err) = fleet.up(&["vms/a.toml", "vms/b.toml", "--name", "x"]);
    assert_eq!(
        (code, &*err),
        (2, "error: `--name` is given for 2 VMs, expected one\n")
    );
    assert!(fleet.running().is_empty());
}

#[test]
fn one_that_fails_is_told_and_the_others_run() {
    let fleet = Fleet::new();
    fleet.vm("a.toml", "up", "");
    fleet.vm("b.toml", "up", "[[block]]\npath = 'missing.img'");
    fleet.vm("c.toml", "off", "");
    let (code, out, err) = fleet.up(&["--all", "vms", "--wait", "boot"]);
    assert_eq!(out, ["a is up"]);
    assert_eq!(code, 2, "that of the first in their order: {err}");
    assert!(
        err.contains("`b` of vms/b.toml:\nerror: cannot open `vms/missing.img`: No such file"),
        "{err}"
    );
    assert!(
        err.contains("`c` of vms/c.toml:\nerror: the guest ended before it was up"),
        "{err}"
    );
    assert_eq!(fleet.running(), ["a"]);
}

#[test]
fn a_guest_that_is_not_up_in_time_is_told_and_runs_on() {
    let fleet = Fleet::new();
    fleet.vm("a.toml", "silent", "");
    fleet.vm("b.toml", "up", "");
    let (code, out, err) = fleet.up(&["--all", "vms", "--wait=boot", "--wait-timeout=2s"]);
    assert_eq!((code, &*out), (1, &["b is up".to_owned()][..]));
    assert!(
        err.contains("the guest is not up after 2s; it runs on"),
        "{err}"
    );
    assert_eq!(fleet.running(), ["a", "b"]);
}

#[test]
fn a_folder_with_one_vm_is_a_fleet_of_one() {
    let fleet = Fleet::new();
    fleet.vm("a.toml", "silent", "");
    assert_eq!(fleet.up(&["--all", "vms"]).1, ["a runs"]);
}
