//! What has come so far of a file: it stands beside the file's place as `NAME.part`, locked by the
//! one that fetches. Another waits for it.

use std::fs::{self, File, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::sources::is_there;
use crate::{Error, Result, durable, messages};

/// What has come so far of a file, locked.
pub(super) struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    /// Locks it; `None` if meanwhile somebody else has fetched the file.
    pub(super) fn lock(place: &Path) -> Result<Option<Part>> {
        let mut name = place.as_os_str().to_owned();
        name.push(".part");
        let path = PathBuf::from(name);
        let failed = |what: &'static str| failed(&path, what);
        if let Some(folder) = place.parent() {
            fs::create_dir_all(folder).map_err(failed("create"))?;
        }
        // What is no file of ours is not written through, nor waited for.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        loop {
            let open = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .custom_flags(flags.bits() as i32)
                .open(&path);
            let file = open.map_err(failed("open"))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {
                    messages::say(format_args!(
                        "launcher: waiting for another launcher that fetches {}",
                        place.display()
                    ));
                    flock(&file, FlockOperation::LockExclusive)
                }
                other => other,
            }
            .map_err(|errno| failed("lock")(errno.into()))?;
            // It may have become the file while we waited, or before we had opened it.
            let same = |there: fs::Metadata, own: fs::Metadata| {
                (there.dev(), there.ino()) == (own.dev(), own.ino())
            };
            let own = file.metadata().map_err(failed("look at"))?;
            let ours = fs::symlink_metadata(&path).is_ok_and(|there| same(there, own));
            if is_there(place) {
                if ours {
                    let _ = fs::remove_file(&path);
                }
                return Ok(None);
            }
            if ours {
                return Ok(Some(Part { path, file }));
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// How much has come, in bytes.
    pub(super) fn len(&self) -> Result<u64> {
        let meta = self.file.metadata().map_err(self.failed("look at"))?;
        Ok(meta.len())
    }

    /// Keeps so many bytes of it: the next ones are written behind them.
    pub(super) fn cut(&mut self, len: u64) -> Result<()> {
        self.file.set_len(len).map_err(self.failed("cut"))?;
        let sought = self.file.seek(SeekFrom::Start(len));
        sought.map(drop).map_err(self.failed("write"))
    }

    /// Leaves nothing of it.
    pub(super) fn remove(self) -> Result<()> {
        fs::remove_file(&self.path).map_err(self.failed("remove"))
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_all(bytes);
        written.map_err(self.failed("write"))
    }

    /// Makes it durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(self.failed("write"))
    }

    /// Makes it the file, which nobody is to write again.
    pub(super) fn becomes(self, place: &Path) -> Result<()> {
        let set = self.file.set_permissions(Permissions::from_mode(0o444));
        set.and_then(|()| fs::rename(&self.path, place))
            .map_err(self.failed("rename"))?;
        durable::synchronise_folder(place);
        Ok(())
    }

    /// The error of doing something with it.
    pub(super) fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> Error {
        failed(&self.path, what)
    }
}

fn failed(path: &Path, what: &'static str) -> impl Fn(io::Error) -> Error + use<> {
    let path = path.display().to_string();
    move |error| {
        Error::failed(format!("cannot {what} {path}: {error}"))
            .help("XDG_CACHE_HOME sets where what is fetched is kept")
    }
}
