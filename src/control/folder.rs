//! Folders that are this user's alone, and what is opened in them: no symbolic link is followed.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::{Error, Result};

/// A folder that only this user can look into.
pub(super) struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens a folder; `None` if it is not there. Its own name is no link; those of the folders
    /// above it are the user's to choose.
    ///
    /// # Errors
    ///
    /// It is somebody else's, open to others, or no folder.
    pub(super) fn open(path: &Path) -> Result<Option<Folder>> {
        let (above, name) = above(path)?;
        match above {
            Some(above) => Folder::open_at(above.as_fd(), name, path),
            None => Ok(None),
        }
    }

    /// Opens a folder, and creates it if it is not there: mode 0700.
    ///
    /// # Errors
    ///
    /// As [`Folder::open`]; it cannot be created.
    pub(super) fn create(path: &Path) -> Result<Folder> {
        let (above, name) = above(path)?;
        let Some(above) = above else {
            return Err(cannot("create", path, Errno::NOENT));
        };
        match rustix::fs::mkdirat(&above, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(cannot("create", path, errno)),
        }
        Folder::open_at(above.as_fd(), name, path)?
            .ok_or_else(|| cannot("open", path, Errno::NOENT))
    }

    /// A folder in this one, if it is there.
    pub(super) fn inner(&self, name: &str) -> Result<Option<Folder>> {
        Folder::open_at(self.fd.as_fd(), OsStr::new(name), &self.path.join(name))
    }

    fn open_at(above: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<Option<Folder>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(above, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                let message = format!("`{}` is no folder, or a symbolic link", path.display());
                return Err(Error::failed(message).help(ELSEWHERE));
            }
            Err(errno) => return Err(cannot("open", path, errno)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|errno| cannot("open", path, errno))?;
        let us = rustix::process::geteuid().as_raw();
        if stat.st_uid != us {
            let (path, uid) = (path.display(), stat.st_uid);
            let message = format!("`{path}` belongs to user {uid}, expected user {us}");
            return Err(Error::failed(message).help(ELSEWHERE));
        }
        let mode = stat.st_mode & 0o777;
        if mode & 0o077 != 0 {
            let path = path.display();
            let message = format!("`{path}` has mode {mode:04o}, expected 0700");
            return Err(Error::failed(message).help(format!(
                "look for what others have put there, then run `chmod 700 '{path}'`"
            )));
        }
        let path = path.to_owned();
        Ok(Some(Folder { fd, path }))
    }

    /// Opens a file of this user's in this folder; with [`OFlags::CREATE`] its mode is 0600.
    pub(super) fn file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        // O_NONBLOCK: a FIFO in its place would have it wait.
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)?;
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(io::Error::other("it is no regular file"));
        }
        if stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(io::Error::other("it belongs to another user"));
        }
        Ok(File::from(fd))
    }

    /// What has this name in the folder; a link is not followed.
    pub(super) fn stat(&self, name: &str) -> io::Result<Stat> {
        Ok(rustix::fs::statat(
            &self.fd,
            name,
            rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
        )?)
    }

    /// Removes what has this name, unless it is a folder. That nothing has it is no error.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The names of the folders in it, sorted. Names that are not UTF-8 are none of ours.
    pub(super) fn folders(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            let kind = entry.file_type();
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            if matches!(kind, FileType::Directory | FileType::Unknown) && !name.starts_with('.') {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What to do when the place for a VM's socket cannot be trusted.
const ELSEWHERE: &str =
    "remove it, or set XDG_RUNTIME_DIR to a folder of your own that others cannot write to";

/// The folder above a path, if it is there, and the path's last name.
fn above(path: &Path) -> Result<(Option<OwnedFd>, &OsStr)> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(cannot("open", path, Errno::INVAL));
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(above, flags, Mode::empty()) {
        Ok(fd) => Ok((Some(fd), name)),
        Err(Errno::NOENT) => Ok((None, name)),
        Err(errno) => Err(cannot("open", above, errno)),
    }
}

fn cannot(what: &str, path: &Path, error: impl Into<io::Error>) -> Error {
    let error = error.into();
    Error::failed(format!("cannot {what} `{}`: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn refused(path: &Path) -> String {
        let opened = Folder::open(path).err().unwrap().to_string();
        assert_eq!(Folder::create(path).err().unwrap().to_string(), opened);
        opened
    }

    #[test]
    fn a_folder_is_created_for_its_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("launcher");
        assert!(Folder::open(&path).unwrap().is_none());
        Folder::create(&path).unwrap();
        Folder::create(&path).unwrap();
        assert!(Folder::open(&path).unwrap().is_some());
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_link_in_a_folders_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("launcher");
        let real = dir.path().join("real");
        Folder::create(&real).unwrap();
        symlink(&real, &path).unwrap();
        assert!(refused(&path).contains("is no folder, or a symbolic link"));
        fs::remove_file(&path).unwrap();
        // Neither is one that leads nowhere yet.
        symlink(dir.path().join("nowhere"), &path).unwrap();
        refused(&path);
        assert!(!dir.path().join("nowhere").exists());
    }

    #[test]
    fn a_folder_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("launcher");
        fs::create_dir(&path).unwrap();
        for open in [0o755, 0o701, 0o770] {
            mode(&path, open);
            let error = refused(&path);
            assert!(error.contains(&format!("has mode {open:04o}, expected 0700")));
            assert!(error.contains("chmod 700"), "{error}");
        }
    }

    #[test]
    fn a_link_in_a_files_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::create(&dir.path().join("launcher")).unwrap();
        let other = dir.path().join("other");
        symlink(&other, folder.path().join("lock")).unwrap();
        let flags = OFlags::RDWR | OFlags::CREATE;
        assert!(folder.file("lock", flags).is_err());
        assert!(!other.exists());
    }

    #[test]
    fn only_a_regular_file_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::create(&dir.path().join("launcher")).unwrap();
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(&folder, "lock", FileType::Fifo, mode, 0).unwrap();
        let error = folder.file("lock", OFlags::RDWR).unwrap_err();
        assert_eq!(error.to_string(), "it is no regular file");
    }
}
