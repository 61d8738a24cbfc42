//! `launcher reset`, with qemu-img as the judge of what it leaves.

#![allow(clippy::unwrap_used)]

mod program;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use formats::{Engine, HostFile, Image, Ring};
use launcher::control::{Laid, Owner, Place};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use tempfile::TempDir;

use self::program::{Done, launcher};

const VM: &str = "\
name = 'web'
[boot]
kernel = 'k'
[[block]]
path = 'root.qcow2'
backing = 'base.raw'
[[block]]
path = 'data.img'
[[block]]
path = 'more.qcow2'
backing = ['root-base.qcow2', 'base.raw']
";

struct Folder(TempDir);

impl Folder {
    /// A VM with two overlays that hold something, and a disk without a base.
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        folder.write("vm.toml", VM);
        let base: Vec<u8> = (0..4_u32 << 20).map(|i| (i / 7 % 251) as u8).collect();
        fs::write(folder.path("base.raw"), base).unwrap();
        folder.write("data.img", &"d".repeat(512));
        folder.qemu("qemu-img create -q -f qcow2 -b base.raw -F raw root-base.qcow2");
        folder.qemu("qemu-io -f qcow2 root-base.qcow2 -c 'write -P 3 1M 1M'");
        folder.qemu(
            "qemu-img create -q -f qcow2 -b base.raw -F raw \
             -o cluster_size=128k,extended_l2=on,lazy_refcounts=on,compression_type=zstd,refcount_bits=8 \
             root.qcow2",
        );
        folder.qemu("qemu-img create -q -f qcow2 -b root-base.qcow2 -F qcow2 more.qcow2 8M");
        for name in ["root", "more"] {
            folder.qemu(&format!(
                "qemu-io -f qcow2 {name}.qcow2 -c 'write -P 9 0 2M'"
            ));
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Runs a program of QEMU's, which must succeed; what it prints.
    #[track_caller]
    fn qemu(&self, line: &str) -> String {
        let output = Command::new("sh")
            .args(["-c", line])
            .current_dir(self.0.path())
            .output()
            .unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {out}{err}");
        assert!(!out.contains("failed"), "{line}: {out}");
        out
    }

    fn command(&self, arguments: &[&str]) -> Command {
        launcher(self.0.path(), self.0.path(), arguments)
    }

    fn reset(&self, arguments: &[&str]) -> Done {
        let arguments = [&["reset"], arguments].concat();
        self.command(&arguments).output().unwrap().into()
    }

    /// A reset that must be refused, and change nothing.
    #[track_caller]
    fn refused(&self, arguments: &[&str], code: i32) -> String {
        let images = ["root.qcow2", "more.qcow2", "data.img"];
        let before = images.map(|name| self.bytes(name));
        let done = self.reset(arguments);
        assert_eq!(done.code, code, "{done:?}");
        assert!(images.map(|name| self.bytes(name)) == before);
        self.nothing_is_left();
        done.err
    }

    fn nothing_is_left(&self) {
        for entry in fs::read_dir(self.0.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.starts_with('.'), "{name}");
        }
    }

    /// Checks that an overlay is empty and sound: it shows its base.
    #[track_caller]
    fn is_empty_over(&self, name: &str, base: &str) {
        self.qemu(&format!("qemu-img check -q {name}"));
        self.qemu(&format!("qemu-img compare -q {name} {base}"));
        let map = self.qemu(&format!("qemu-img map --output=json {name}"));
        let own = map.lines().filter(|line| line.contains("\"depth\": 0"));
        assert!(
            own.clone().all(|line| !line.contains("\"data\": true")),
            "{map}"
        );
        self.nothing_is_left();
    }

    /// How an image was made.
    fn made(&self, name: &str) -> Vec<String> {
        let info = self.qemu(&format!("qemu-img info {name}"));
        let told = |line: &&str| {
            !line.contains("disk size") && !line.contains("file length") && !line.is_empty()
        };
        info.lines().filter(told).map(str::to_owned).collect()
    }
}

#[test]
fn overlays_go_back_to_their_base_and_other_disks_are_left_alone() {
    let folder = Folder::new();
    let (base, data) = (folder.bytes("base.raw"), folder.bytes("data.img"));
    let made = ["root.qcow2", "more.qcow2"].map(|name| folder.made(name));
    fs::set_permissions(folder.path("root.qcow2"), fs::Permissions::from_mode(0o640)).unwrap();
    let done = folder.reset(&["--yes", "vm.toml"]);
    assert_eq!((done.code, &*done.err), (0, ""), "{done:?}");
    let lines: Vec<_> = done.out.lines().collect();
    assert!(
        lines[0].starts_with("disk 0  root.qcow2  2.")
            && lines[0].ends_with(" would be dropped: back to base.raw"),
        "{done:?}"
    );
    assert_eq!(
        lines[1],
        "disk 1  data.img    left alone: it has no `backing` to go back to"
    );
    assert_eq!(lines[3], "reset 2 disks");
    folder.is_empty_over("root.qcow2", "base.raw");
    assert_eq!(
        ["root.qcow2", "more.qcow2"].map(|name| folder.made(name)),
        made
    );
    folder.qemu("qemu-img check -q more.qcow2");
    let base_then_zeroes = "qemu-img create -q -f qcow2 -b root-base.qcow2 -F qcow2 fresh.qcow2 8M";
    folder.qemu(base_then_zeroes);
    folder.is_empty_over("more.qcow2", "fresh.qcow2");
    assert!(folder.bytes("base.raw") == base && folder.bytes("data.img") == data);
    let mode = fs::metadata(folder.path("root.qcow2")).unwrap().mode();
    assert_eq!(mode & 0o777, 0o640);
    // It can be done again.
    assert_eq!(folder.reset(&["--yes"]).code, 0);
    folder.is_empty_over("root.qcow2", "base.raw");
}

#[test]
fn the_size_is_the_vm_file_s() {
    let folder = Folder::new();
    folder.write(
        "vm.toml",
        &VM.replace(
            "'base.raw'\n[[block]]\npath = 'data",
            "'base.raw'\nsize = '16MiB'\n[[block]]\npath = 'data",
        ),
    );
    assert_eq!(folder.reset(&["-y"]).code, 0);
    let info = folder.qemu("qemu-img info --output=json root.qcow2");
    assert!(info.contains("\"virtual-size\": 16777216"), "{info}");
}

#[test]
fn without_a_terminal_yes_is_needed() {
    let said = Folder::new().refused(&[], 2);
    assert_eq!(
        said,
        "error: what the disks hold would be dropped, and there is no terminal to ask on\n\
         help: say `--yes` if it may be\n"
    );
}

/// What `launcher reset` prints on a terminal where this is typed, and its exit code.
fn typed(folder: &Folder, answer: &str) -> (i32, String) {
    let mut terminal = fs::File::from(openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap());
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let other = fs::File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let stdio = || Stdio::from(OwnedFd::from(other.try_clone().unwrap()));
    let mut child = folder
        .command(&["reset"])
        .stdin(stdio())
        .stdout(stdio())
        .stderr(stdio())
        .spawn()
        .unwrap();
    let mut shown = Vec::new();
    let mut byte = [0];
    while !shown.ends_with(b"[y/N] ") {
        terminal.read_exact(&mut byte).unwrap();
        shown.push(byte[0]);
    }
    terminal.write_all(answer.as_bytes()).unwrap();
    let code = child.wait().unwrap().code().unwrap();
    drop(other);
    // The end of a terminal is an error.
    while terminal.read(&mut byte).is_ok_and(|count| count > 0) {
        shown.push(byte[0]);
    }
    (code, String::from_utf8(shown).unwrap().replace('\r', ""))
}

#[test]
fn on_a_terminal_it_asks() {
    let folder = Folder::new();
    let before = folder.bytes("root.qcow2");
    for no in ["\n", "n\n", "ye\n", "\x04"] {
        let (code, shown) = typed(&folder, no);
        assert_eq!(code, 1, "{shown}");
        assert!(shown.contains("error: nothing was changed\n"), "{shown}");
        assert!(folder.bytes("root.qcow2") == before);
    }
    let (code, shown) = typed(&folder, "y\n");
    assert_eq!(code, 0, "{shown}");
    assert!(shown.ends_with("reset 2 disks\n"), "{shown}");
    folder.is_empty_over("root.qcow2", "base.raw");
}

#[test]
fn a_vm_that_runs_is_refused() {
    let folder = Folder::new();
    let place = Place::under(&folder.path("launcher"), Some("web"), Path::new("-")).unwrap();
    let owner = Owner {
        pid: std::process::id(),
        name: "web".into(),
        file: folder.path("vm.toml").canonicalize().unwrap(),
        started_ms: 1,
        laid: Laid::default(),
    };
    let _claim = place.claim(&owner).unwrap();
    assert_eq!(
        folder.refused(&["--yes"], 4),
        "error: `web` is running\nhelp: stop it first: `launcher stop web`\n"
    );
}

#[test]
fn an_image_that_is_in_use_has_all_disks_left_alone() {
    let folder = Folder::new();
    let ring = Ring::new(Engine::Auto).unwrap();
    let image = Image {
        ro: false,
        lock: true,
        ..Image::new(folder.path("more.qcow2"))
    };
    let _held = HostFile::open(&ring, &image).unwrap();
    let said = folder.refused(&["--yes"], 1);
    assert!(said.contains("more.qcow2"), "{said}");
}

#[test]
fn internal_snapshots_are_dropped_with_yes_alone() {
    let folder = Folder::new();
    folder.qemu("qemu-img snapshot -c one root.qcow2");
    assert_eq!(
        folder.refused(&[], 2),
        "error: `root.qcow2` has 1 internal snapshot, which would go too\nhelp: say `--yes` if \
         they may; `launcher disk snapshot list` shows them\n"
    );
    let done = folder.reset(&["--yes"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert!(
        done.out
            .contains("and 1 internal snapshot would be dropped"),
        "{done:?}"
    );
    folder.is_empty_over("root.qcow2", "base.raw");
}

#[test]
fn an_image_that_is_no_overlay_of_the_base_is_refused() {
    let folder = Folder::new();
    folder.qemu("qemu-img create -q -f qcow2 root.qcow2 4M");
    let said = folder.refused(&["--yes"], 2);
    assert!(
        said.starts_with("error: `root.qcow2` is no overlay: it has no backing file\n"),
        "{said}"
    );
    folder.qemu("qemu-img create -q -f qcow2 -b root-base.qcow2 -F qcow2 root.qcow2");
    let said = folder.refused(&["--yes"], 2);
    assert!(
        said.starts_with(
            "error: `backing` is `base.raw`, but `root.qcow2` is based on `root-base.qcow2`\n"
        ),
        "{said}"
    );
    folder.write("root.qcow2", "no image");
    let said = folder.refused(&["--yes"], 2);
    assert!(
        said.starts_with("error: `root.qcow2` cannot be used: "),
        "{said}"
    );
}

#[test]
fn a_disk_whose_lock_is_off_is_refused() {
    let folder = Folder::new();
    folder.write(
        "vm.toml",
        &VM.replacen("backing", "lock = false\nbacking", 1),
    );
    let said = folder.refused(&["--yes"], 2);
    assert!(
        said.contains("`lock = false`: nothing tells whether a VM uses it"),
        "{said}"
    );
}

#[test]
fn where_there_is_nothing_to_reset_that_is_said() {
    let folder = Folder::new();
    fs::remove_file(folder.path("root.qcow2")).unwrap();
    folder.write(
        "vm.toml",
        &VM.replace(
            "path = 'more.qcow2'",
            "path = 'more.qcow2'\nephemeral = true",
        ),
    );
    let done = folder.reset(&[]);
    assert_eq!(
        (done.code, &*done.out),
        (
            0,
            "disk 0  root.qcow2  left alone: it is not there: the next start creates it\n\
             disk 1  data.img    left alone: it has no `backing` to go back to\n\
             disk 2  more.qcow2  left alone: it is ephemeral, and as it was at every start\n\
             nothing to reset\n"
        )
    );
}

#[test]
fn what_a_killed_reset_left_is_no_hindrance() {
    let folder = Folder::new();
    folder.write(".root.qcow2.reset", "half of it");
    assert_eq!(folder.reset(&["--yes"]).code, 0);
    folder.is_empty_over("root.qcow2", "base.raw");
}

#[test]
fn a_symbolic_link_to_an_overlay_stays_one() {
    let folder = Folder::new();
    fs::rename(folder.path("root.qcow2"), folder.path("real.qcow2")).unwrap();
    symlink("real.qcow2", folder.path("root.qcow2")).unwrap();
    assert_eq!(folder.reset(&["--yes"]).code, 0);
    assert!(
        fs::symlink_metadata(folder.path("root.qcow2"))
            .unwrap()
            .is_symlink()
    );
    folder.is_empty_over("real.qcow2", "base.raw");
}
