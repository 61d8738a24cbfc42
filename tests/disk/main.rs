//! `launcher disk` on VMs that do not run; `qemu-img` and `qemu-io` are the judges.

#![allow(clippy::unwrap_used)]

mod bench;
mod images;
#[path = "../names/mod.rs"]
mod names;
#[path = "../program/mod.rs"]
mod program;
mod resize;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use self::program::{Done, launcher};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A folder with the vm.toml and the images of a VM.
struct Folder {
    folder: TempDir,
}

/// An image that another program has open, until this is dropped.
struct Held(Child);

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

impl Folder {
    /// A VM with these disks: what stands below its kernel.
    fn new(disks: &str) -> Folder {
        let folder = Folder {
            folder: tempfile::tempdir().unwrap(),
        };
        folder.write(
            "vm.toml",
            &format!("[boot]\nkernel = \"vmlinuz\"\n\n{disks}"),
        );
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn len(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().len()
    }

    /// Bytes that a file takes on the host.
    fn allocated(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().blocks() * 512
    }

    /// A raw image of these bytes, each of them `byte`.
    fn raw(&self, name: &str, len: u64, byte: u8) {
        fs::write(self.path(name), vec![byte; len as usize]).unwrap();
    }

    /// Runs `launcher` in the folder.
    fn launcher(&self, arguments: &[&str]) -> Done {
        let folder = self.folder.path();
        launcher(folder, folder, arguments).output().unwrap().into()
    }

    /// Runs `launcher`, which must succeed and complain of nothing; what it prints.
    fn launcher_does(&self, arguments: &[&str]) -> String {
        let done = self.launcher(arguments);
        assert_eq!((done.code, &*done.err), (0, ""), "{done:?}");
        done.out
    }

    /// Runs `qemu-img`, which must succeed; what it prints.
    fn qemu_img(&self, arguments: &[&str]) -> String {
        let done = run(Command::new("qemu-img").args(arguments), self.folder.path());
        assert_eq!(done.code, 0, "{arguments:?}: {done:?}");
        done.out
    }

    /// What `qemu-img info` says of an image, whether or not it is in use.
    fn info(&self, name: &str) -> serde_json::Value {
        let text = self.qemu_img(&["info", "-U", "--output=json", name]);
        serde_json::from_str(&text).unwrap()
    }

    /// The size of the disk in an image.
    fn size(&self, name: &str) -> u64 {
        self.info(name)["virtual-size"].as_u64().unwrap()
    }

    /// Has `qemu-io` carry out commands, which must all succeed.
    fn qemu_io(&self, name: &str, commands: &[&str]) {
        let mut qemu_io = Command::new("qemu-io");
        let format = if name.ends_with("qcow2") {
            "qcow2"
        } else {
            "raw"
        };
        qemu_io.args(["-f", format]);
        commands.iter().for_each(|command| {
            qemu_io.args(["-c", command]);
        });
        let done = run(qemu_io.arg(name), self.folder.path());
        assert_eq!(done.code, 0, "{commands:?}: {done:?}");
        assert!(
            !done.out.contains("verification failed"),
            "{commands:?}: {done:?}"
        );
    }

    /// Has `qemu-io` hold an image open for writing.
    fn hold(&self, name: &str) -> Held {
        let format = if name.ends_with("qcow2") {
            "qcow2"
        } else {
            "raw"
        };
        let mut holder = Command::new("qemu-io")
            .args(["-f", format])
            .arg(self.path(name))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It answers once it has the image.
        let input = holder.stdin.as_mut().unwrap();
        writeln!(input, "length").unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(holder.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        Held(holder)
    }

    /// What is in the folder, sorted.
    fn names(&self) -> Vec<String> {
        names::names(self.folder.path())
    }
}

fn run(command: &mut Command, folder: &Path) -> Done {
    command
        .current_dir(folder)
        .env_remove("LAUNCHER_LOG")
        .env("XDG_RUNTIME_DIR", folder)
        .stdin(Stdio::null())
        .output()
        .unwrap()
        .into()
}
