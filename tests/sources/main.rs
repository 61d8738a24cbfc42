//! Where the files of a VM come from: fetched from a server on this host, built by a command,
//! compared with their digests.

#![allow(clippy::unwrap_used)]

#[path = "../bare/mod.rs"]
mod bare;
mod build;
mod fetch;
#[path = "../program/mod.rs"]
mod program;
mod server;
mod tls;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use self::program::{Done, launcher};

/// What the servers have: enough for several pieces, and no two the same.
fn content() -> Vec<u8> {
    (0..300_000_u32).flat_map(u32::to_le_bytes).collect()
}

/// The SHA-256 of some bytes, by sha256sum(1).
fn sha256(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, bytes).unwrap();
    let output = Command::new("sha256sum").arg(&file).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().to_owned()
}

/// A folder with the file of a VM, and with the user's cache and run-time folder.
struct Folder(TempDir);

impl Folder {
    /// With `vm.toml` of this text.
    fn new(text: &str) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        folder.write("vm.toml", text);
        folder
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().canonicalize().unwrap().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// A script that `/bin/sh` runs.
    fn script(&self, name: &str, lines: &str) {
        use std::os::unix::fs::PermissionsExt;
        self.write(name, format!("#!/bin/sh\n{lines}\n"));
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Where the cache has a file.
    fn cached(&self, sha256: &str, name: &str) -> PathBuf {
        self.path(format!("cache/launcher/files/{sha256}/{name}"))
    }

    /// `launcher` with these arguments, not started yet.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = launcher(self.0.path(), self.0.path(), arguments);
        command.env("XDG_CACHE_HOME", self.path("cache"));
        for ours in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
            command.env_remove(ours);
        }
        for proxy in ["http_proxy", "https_proxy", "all_proxy"] {
            command.env_remove(proxy).env_remove(proxy.to_uppercase());
        }
        command
    }

    /// Runs `launcher` to its end.
    fn launcher(&self, arguments: &[&str]) -> Done {
        self.told(self.command(arguments).output().unwrap())
    }

    /// Has the commands that only look do so; `launcher check` finds nothing wrong.
    #[track_caller]
    fn is_looked_at(&self) {
        let done = self.launcher(&["check"]);
        assert_eq!(
            (done.code, &*done.out, &*done.err),
            (0, "vm.toml: ok\n", "")
        );
        self.launcher(&["lock", "vm.toml"]);
        self.launcher(&["lock", "--check", "vm.toml"]);
        self.launcher(&["disk", "list", "vm.toml"]);
        self.launcher(&["disk", "info", "vm.toml", "0"]);
    }

    /// What a command did, without the folder's name.
    fn told(&self, output: Output) -> Done {
        let folder = self.path("");
        let shown = |text: String| text.replace(folder.to_str().unwrap(), "DIR/");
        let done = Done::from(output);
        Done {
            out: shown(done.out),
            err: shown(done.err),
            ..done
        }
    }
}
