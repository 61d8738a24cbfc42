//! Where a running VM is found: a folder a VM, and the lock in it that tells whether it runs.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::folder::Folder;
use crate::{Error, Result, exit};

/// The file whose lock is held by the running process, with its [`Owner`] as JSON.
const LOCK: &str = "lock";
/// The control socket.
pub(super) const SOCKET: &str = "control.sock";
/// The most that is read of a lock file: bytes.
const LONGEST: u64 = 64 << 10;
/// How often, and how long apart, a lock is tried: whoever looks whether a VM runs holds it for a
/// moment, and who has just got it needs one to write who it is.
const TRIES: (u32, Duration) = (50, Duration::from_millis(2));
/// The longest part of a key that comes from a name: bytes.
const LONGEST_NAME: usize = 64;

/// A VM's folder, which need not be there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    base: PathBuf,
    key: String,
}

/// Who runs, or ran, a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Process id of its `launcher up`.
    pub pid: u32,
    /// The VM's name.
    pub name: String,
    /// Its TOML file, canonical.
    pub file: PathBuf,
    /// When it was started: milliseconds of Unix time.
    pub started_ms: u64,
    /// What was laid over its file. An older launcher's says nothing of it.
    #[serde(default)]
    pub laid: Laid,
}

/// What the command line has laid over a VM's file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Laid {
    /// Names of profiles.
    pub profiles: Vec<String>,
    /// Single values, KEY=VALUE.
    pub set: Vec<String>,
    /// What paths in those are relative to.
    pub folder: PathBuf,
}

/// The right to run a VM: nobody else has it as long as it lives. Its end removes the socket.
pub struct Claim {
    folder: Folder,
    /// Locked.
    _lock: File,
}

impl Place {
    /// The place of a VM: by its name if its file gives one, otherwise by the file, for many
    /// files are called vm.toml.
    ///
    /// # Errors
    ///
    /// The file's path cannot be made absolute.
    pub fn of(name: Option<&str>, toml: &Path) -> Result<Place> {
        Place::under(&base(), name, toml)
    }

    /// As [`Place::of`], below another folder than that of the user's session.
    ///
    /// # Errors
    ///
    /// As [`Place::of`].
    pub fn under(base: &Path, name: Option<&str>, toml: &Path) -> Result<Place> {
        let key = match name {
            Some(name) => key(name, None),
            None => {
                let file = canonical(toml)?;
                let stem = file.file_stem().unwrap_or_default().to_string_lossy();
                key(&stem, Some(file.as_os_str().as_encoded_bytes()))
            }
        };
        let base = base.to_owned();
        Ok(Place { base, key })
    }

    /// The place of every VM that runs or has left something, sorted.
    ///
    /// # Errors
    ///
    /// The folder that they are in cannot be read, or is not this user's alone.
    pub fn all() -> Result<Vec<Place>> {
        Place::all_under(&base())
    }

    pub(super) fn all_under(base: &Path) -> Result<Vec<Place>> {
        let Some(folder) = Folder::open(base)? else {
            return Ok(Vec::new());
        };
        let keys = folder
            .folders()
            .map_err(|error| Error::failed(format!("cannot read `{}`: {error}", base.display())))?;
        let place = |key| Place {
            base: base.to_owned(),
            key,
        };
        Ok(keys.into_iter().map(place).collect())
    }

    /// Who runs the VM; `None` if nobody does, whatever an earlier one has left.
    ///
    /// # Errors
    ///
    /// The folder or the lock cannot be opened, or is not this user's alone.
    pub fn owner(&self) -> Result<Option<Owner>> {
        let Some(folder) = self.open()? else {
            return Ok(None);
        };
        let lock = match folder.file(LOCK, OFlags::RDONLY) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.broken(&error)),
        };
        for _ in 0..TRIES.0 {
            match flock(&lock, FlockOperation::NonBlockingLockShared) {
                Ok(()) => return Ok(None),
                Err(Errno::WOULDBLOCK) => {}
                Err(errno) => return Err(self.broken(&errno.into())),
            }
            if let Some(owner) = read(&lock) {
                return Ok(Some(owner));
            }
            thread::sleep(TRIES.1);
        }
        Err(self.broken(&io::Error::other("it is locked, and does not say by whom")))
    }

    /// Who runs the VM, or ran it last.
    pub fn last_owner(&self) -> Option<Owner> {
        let folder = self.open().ok()??;
        read(&folder.file(LOCK, OFlags::RDONLY).ok()?)
    }

    /// Takes the place, and removes the socket of one who was killed in it.
    ///
    /// # Errors
    ///
    /// [`exit::ALREADY_RUNNING`] with the process id if the VM runs; the folder cannot be created,
    /// or is not this user's alone.
    pub fn claim(&self, owner: &Owner) -> Result<Claim> {
        Folder::create(&self.base)?;
        let folder = Folder::create(&self.folder())?;
        let failed = |error: io::Error| self.broken(&error);
        let lock = self.lock(&folder, owner)?;
        // A lock on the folder has systemd-tmpfiles leave it alone, however old it gets
        // (tmpfiles.d(5), "Age").
        flock(&folder, FlockOperation::NonBlockingLockShared).map_err(|errno| {
            let path = folder.path().display();
            Error::failed(format!("cannot lock `{path}`: {errno}"))
        })?;
        folder.remove(SOCKET).map_err(|error| {
            let path = self.socket();
            Error::failed(format!("cannot remove `{}`: {error}", path.display()))
        })?;
        let text = text_of(owner).map_err(|error| failed(error.into()))?;
        // Never empty in between: who reads it would find nobody, and ext4 has a file that was
        // emptied and written again wait for its disk.
        lock.write_all_at(&text, 0).map_err(failed)?;
        lock.set_len(text.len() as u64).map_err(failed)?;
        Ok(Claim {
            folder,
            _lock: lock,
        })
    }

    /// Opens the lock file and locks it.
    fn lock(&self, folder: &Folder, owner: &Owner) -> Result<File> {
        for _ in 0..TRIES.0 {
            let lock = folder
                .file(LOCK, OFlags::RDWR | OFlags::CREATE)
                .map_err(|error| self.broken(&error))?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // A lock on a file that has been removed since is none.
                Ok(()) if self.is(folder, &lock) => return Ok(lock),
                Ok(()) => continue,
                Err(Errno::WOULDBLOCK) => thread::sleep(TRIES.1),
                Err(errno) => return Err(self.broken(&errno.into())),
            }
        }
        match self.owner()? {
            Some(other) => Err(already_running(&other, owner)),
            None => Err(self.broken(&io::Error::other("others come and go too fast"))),
        }
    }

    /// Whether this file is the one that has the lock's name.
    fn is(&self, folder: &Folder, lock: &File) -> bool {
        match (folder.stat(LOCK), lock.metadata()) {
            (Ok(stat), Ok(meta)) => (stat.st_dev, stat.st_ino) == (meta.dev(), meta.ino()),
            _ => false,
        }
    }

    fn open(&self) -> Result<Option<Folder>> {
        match Folder::open(&self.base)? {
            Some(base) => base.inner(&self.key),
            None => Ok(None),
        }
    }

    fn broken(&self, error: &io::Error) -> Error {
        let lock = self.folder().join(LOCK);
        Error::failed(format!("cannot use `{}`: {error}", lock.display()))
    }

    /// The folder's name, which is the VM's unless another may have the same.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The folder.
    pub fn folder(&self) -> PathBuf {
        self.base.join(&self.key)
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder().join(SOCKET)
    }

    /// What the guest has printed.
    pub fn console_log(&self) -> PathBuf {
        self.folder().join("console.log")
    }

    /// The messages of a detached `launcher up`.
    pub fn launcher_log(&self) -> PathBuf {
        self.folder().join("launcher.log")
    }
}

impl Claim {
    pub(super) fn folder(&self) -> &Folder {
        &self.folder
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The next one to claim it removes it otherwise.
        let _ = self.folder.remove(SOCKET);
    }
}

/// The folder with the VMs of this user's session (XDG Base Directory Specification): a folder
/// that is not there, not absolute or somebody else's counts for none.
pub(super) fn base() -> PathBuf {
    let us = rustix::process::geteuid().as_raw();
    base_in(std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from), us)
}

fn base_in(runtime: Option<PathBuf>, us: u32) -> PathBuf {
    let ours = |folder: &PathBuf| {
        let meta = std::fs::metadata(folder);
        folder.is_absolute() && meta.is_ok_and(|meta| meta.is_dir() && meta.uid() == us)
    };
    match runtime.filter(ours) {
        Some(folder) => folder.join("launcher"),
        None => PathBuf::from(format!("/tmp/launcher-{us}")),
    }
}

/// The path of a file without links, of one that is gone as far as that goes.
pub(super) fn canonical(file: &Path) -> Result<PathBuf> {
    let found = file.canonicalize().or_else(|_| {
        let file = std::path::absolute(file)?;
        match (file.parent(), file.file_name()) {
            (Some(folder), Some(name)) => Ok(folder
                .canonicalize()
                .map_or_else(|_| file.clone(), |folder| folder.join(name))),
            _ => Ok(file),
        }
    });
    found.map_err(|error: io::Error| {
        Error::failed(format!("cannot find `{}`: {error}", file.display()))
    })
}

/// A folder's name for a VM's, told apart by a hash where the name does not do.
fn key(name: &str, told_apart_by: Option<&[u8]>) -> String {
    let harmless = |c: char| match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' | '.' => c,
        _ => '_',
    };
    let mut key: String = name.chars().map(harmless).collect();
    // All of it is ASCII by now.
    key.truncate(LONGEST_NAME);
    if key.is_empty() || key.starts_with('.') {
        key.insert(0, '_');
    }
    match told_apart_by {
        Some(bytes) => key += &format!("-{:08x}", hash(bytes)),
        None if key != name => key += &format!("-{:08x}", hash(name.as_bytes())),
        None => {}
    }
    key
}

/// FNV-1a: the same in every build, as the folders outlive them.
fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// What a lock file says. What was laid over the VM's file is left out if that is too much to be
/// read again.
fn text_of(owner: &Owner) -> serde_json::Result<Vec<u8>> {
    let text = serde_json::to_vec(owner)?;
    if text.len() as u64 <= LONGEST {
        return Ok(text);
    }
    let laid = Laid::default();
    serde_json::to_vec(&Owner {
        laid,
        ..owner.clone()
    })
}

/// Who a lock file names; `None` while it is being written.
fn read(lock: &File) -> Option<Owner> {
    let len = lock.metadata().ok()?.len().min(LONGEST);
    let mut text = vec![0; len as usize];
    lock.read_exact_at(&mut text, 0).ok()?;
    serde_json::from_slice(&text).ok()
}

fn already_running(owner: &Owner, us: &Owner) -> Error {
    let Owner { pid, name, .. } = owner;
    let file = owner.file.display();
    let message = format!("`{name}` is already running: process {pid}, from {file}");
    let mut error = Error::failed(message).help(match owner.file == us.file {
        true => format!("end it with `launcher stop {name}`"),
        false => "give one of the two files another `name`".to_owned(),
    });
    error.exit = exit::ALREADY_RUNNING;
    error
}

#[cfg(test)]
mod tests;
