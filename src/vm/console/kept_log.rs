//! What the guest printed, kept in the VM's folder: bounded, the older half in a second file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// A file of this size becomes the older one, in bytes.
const LIMIT: u64 = 8 << 20;

/// A log that takes no more than twice [`LIMIT`].
pub(crate) struct KeptLog {
    path: PathBuf,
    file: File,
    len: u64,
    limit: u64,
}

impl KeptLog {
    /// Begins a log; what an earlier VM has left there becomes the older file.
    pub(crate) fn begin(path: &Path) -> io::Result<KeptLog> {
        KeptLog::with_limit(path, LIMIT)
    }

    fn with_limit(path: &Path, limit: u64) -> io::Result<KeptLog> {
        if fs::symlink_metadata(path).is_ok_and(|meta| meta.len() > 0) {
            fs::rename(path, older(path))?;
        }
        Ok(KeptLog {
            file: create(path)?,
            path: path.to_owned(),
            len: 0,
            limit,
        })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.len > 0 && self.len + bytes.len() as u64 > self.limit {
            fs::rename(&self.path, older(&self.path))?;
            self.file = create(&self.path)?;
            self.len = 0;
        }
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

fn older(path: &Path) -> PathBuf {
    let mut older = path.to_owned().into_os_string();
    older.push(".1");
    older.into()
}

/// A new file: whatever has come to be there in the meantime is not written to.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_its_end_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut log = KeptLog::with_limit(&path, 1000).unwrap();
        for line in 0..1000 {
            log.write(format!("line {line:04}\n").as_bytes()).unwrap();
        }
        let older = fs::read_to_string(older(&path)).unwrap();
        let kept = older + &fs::read_to_string(&path).unwrap();
        assert!((1000..=2000).contains(&kept.len()), "{}", kept.len());
        assert!(kept.ends_with("line 0998\nline 0999\n"));
        assert_eq!(kept.len() % 10, 0);
        let first: usize = kept[5..9].parse().unwrap();
        assert_eq!(kept.lines().count(), 1000 - first);
    }

    #[test]
    fn the_next_vm_leaves_the_log_of_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        KeptLog::begin(&path).unwrap().write(b"first").unwrap();
        KeptLog::begin(&path).unwrap().write(b"second").unwrap();
        assert_eq!(fs::read(older(&path)).unwrap(), b"first");
        assert_eq!(fs::read(&path).unwrap(), b"second");
    }

    #[test]
    fn a_symlink_in_its_place_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("log"), folder.path().join("other"));
        fs::write(&other, "").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        if let Ok(mut log) = KeptLog::begin(&path) {
            log.write(b"x").unwrap();
        }
        assert_eq!(fs::read(&other).unwrap(), b"");
    }
}
