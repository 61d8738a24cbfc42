//! `launcher disk serve`, with a front end of our own: it does what a VMM does, with a guest in
//! it. `qemu-img` and `qemu-io` judge the images.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod command;
mod guest;
mod hostile;
mod kills;
mod library;
mod linux;
mod messages;
#[path = "../program/mod.rs"]
mod program;
mod random;
mod requests;
mod sessions;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use self::program::{Done, launcher};

const MIB: u64 = 1 << 20;

/// A folder with images, and a socket.
struct Folder(TempDir);

/// A server, killed if it is not ended.
struct Server {
    child: Child,
    said: BufReader<ChildStderr>,
    socket: PathBuf,
}

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A raw image of so many bytes, each sector filled with the low byte of its number.
    fn raw(&self, name: &str, len: u64) -> PathBuf {
        let bytes: Vec<u8> = (0..len).map(|at| (at / 512) as u8).collect();
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn qemu_img(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("qemu-img");
        done(command.args(arguments).current_dir(&self.0))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let folder = self.0.path();
        let mut command = launcher(folder, folder, &["disk", "serve"]);
        command
            .args(arguments)
            .args(["--socket", "disk.sock"])
            .env("XDG_STATE_HOME", folder)
            .env("XDG_CACHE_HOME", folder);
        command
    }

    /// Serves at `disk.sock`; returns when it can be connected to.
    fn serve(&self, arguments: &[&str]) -> Server {
        let mut child = self
            .command(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut server = Server {
            said: BufReader::new(child.stderr.take().unwrap()),
            child,
            socket: self.path("disk.sock"),
        };
        let line = server.line();
        assert!(line.starts_with("serving "), "{line}");
        server
    }

    /// What a server that does not start does.
    fn refused(&self, arguments: &[&str]) -> (i32, String) {
        let Done { code, out, err } = self.command(arguments).output().unwrap().into();
        assert_eq!(out, "");
        (code, err)
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

    /// Ends it as a user does; what it said until then.
    fn end(mut self) -> String {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut said = String::new();
        self.said.read_to_string(&mut said).unwrap();
        let status = self.child.wait().unwrap();
        assert_eq!((status.code(), status.signal()), (Some(0), None), "{said}");
        assert!(!self.socket.exists());
        said
    }

    /// Ends it as a power cut does; what it said until then.
    fn kill(mut self) -> String {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let mut said = String::new();
        self.said.read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a command that succeeds prints.
fn done(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}: {stderr}");
    String::from_utf8(stdout).unwrap()
}

/// The bytes at a sector of a file.
fn bytes(path: &Path, sector: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let file = fs::File::open(path).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, sector * 512).unwrap();
    bytes
}
