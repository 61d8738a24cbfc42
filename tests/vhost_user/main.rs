//! `[[block]] vhost_user`: the device whose other half is another process, with a driver of our
//! own at one end, and `launcher disk serve` or QEMU's storage daemon at the other.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod command;
mod daemon;
mod driver;
mod gone;
mod opening;
#[path = "../program/mod.rs"]
mod program;
mod requests;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Stdio};
use std::time::{Duration, Instant};

use formats::OpenError;
use launcher::devices::vhost_user::{VhostUser, VhostUserOptions};
use launcher::devices::virtio::Device;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use self::program::launcher;

const MIB: u64 = 1 << 20;

/// A folder with an image, and a socket.
struct Folder(TempDir);

/// A server, killed if it is not ended.
struct Server {
    child: Child,
    said: BufReader<ChildStderr>,
}

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    /// With `disk.img`, a raw image of so many bytes, each sector filled with the low byte of its
    /// number.
    fn with_image(len: u64) -> Folder {
        let folder = Folder::new();
        let bytes: Vec<u8> = (0..len).map(|at| (at / 512) as u8).collect();
        fs::write(folder.path("disk.img"), bytes).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("disk.sock")
    }

    /// Serves `disk.img` at `disk.sock`; returns when it can be connected to.
    fn serve(&self, arguments: &[&str]) -> Server {
        let folder = self.0.path();
        let mut command = launcher(folder, folder, &["disk", "serve", "disk.img"]);
        let mut child = command
            .args(arguments)
            .args(["--socket", "disk.sock"])
            .env("XDG_STATE_HOME", folder)
            .env("XDG_CACHE_HOME", folder)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut server = Server {
            said: BufReader::new(child.stderr.take().unwrap()),
            child,
        };
        let line = server.line();
        assert!(line.starts_with("serving "), "{line}");
        server
    }

    fn open(&self, queues: u16, ro: bool) -> Result<VhostUser, OpenError> {
        let socket = self.socket();
        VhostUser::open(VhostUserOptions {
            socket: "disk.sock".into(),
            connect: Box::new(move || UnixStream::connect(&socket)),
            queues,
            ro,
        })
    }

    /// Gives the image so many bytes.
    fn resize(&self, len: u64) {
        let path = self.path("disk.img");
        let image = fs::File::options().write(true).open(path).unwrap();
        image.set_len(len).unwrap();
    }

    /// What the image has at a sector.
    fn image(&self, sector: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let file = fs::File::open(self.path("disk.img")).unwrap();
        file.read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }
}

impl Server {
    /// The next line that it says on standard error.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends it as a power cut does.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The field `capacity`, in sectors.
fn capacity(device: &dyn Device) -> u64 {
    let mut field = [0; 8];
    device.read_config(0, &mut field);
    u64::from_le_bytes(field)
}

/// Waits until something holds; fails the test if that takes too long.
#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + driver::PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Data that tells which request it is of.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed << 1 | 1;
    let mut byte = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..len).map(|_| byte()).collect()
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
