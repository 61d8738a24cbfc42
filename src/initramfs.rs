//! A folder as initramfs: packed in the `newc` format of cpio
//! (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel).
//!
//! The same files make the same archive, whoever packs them and when: sorted, all of them root's,
//! with times that are zero. Kinds, modes, device numbers and links are kept.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::scratch::Scratch;
use crate::{Error, Result};

/// Most bytes of an archive: as much as an initrd from a disk may have.
const BYTES_MOST: u64 = 1 << 30;
/// Most files in it.
const FILES_MOST: usize = 1 << 20;
/// Longest name that the kernel unpacks, with its NUL: PATH_MAX.
const NAME_MOST: usize = 4096;

/// Packs what is in a folder; the folder itself is the guest's `/`.
pub(crate) fn pack(folder: &Path) -> Result<File> {
    let mut archive = Archive {
        folder,
        to: Scratch::new("initrd")
            .map_err(|error| Error::failed(format!("no memory for the initrd: {error}")))?,
        len: 0,
        names: HashMap::new(),
        numbers: HashMap::new(),
    };
    let names = names(folder)?;
    for name in &names {
        archive.count(name)?;
    }
    for name in &names {
        archive.add(name)?;
    }
    archive.header("TRAILER!!!".as_bytes(), &Entry::default())?;
    Ok(archive.to.into_file())
}

/// An error about a folder that cannot be packed.
fn wrong(message: String) -> Error {
    Error::usage(message).about("boot.initrd")
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::unopenable(&format!("{} of the initrd's folder", path.display()), error)
        .help("make it readable for whoever starts the VM, or take it out of the folder")
        .about("boot.initrd")
}

/// All that is in a folder, relative to it, each folder before what is in it.
fn names(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    let mut open = vec![PathBuf::new()];
    while let Some(inner) = open.pop() {
        let path = folder.join(&inner);
        let failed = |error: io::Error| unreadable(&path, &error);
        for entry in fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = inner.join(entry.file_name());
            if entry.file_type().map_err(failed)?.is_dir() {
                open.push(name.clone());
            }
            names.push(name);
            if names.len() > FILES_MOST {
                return Err(wrong(format!(
                    "the initrd {} has more than {FILES_MOST} files",
                    folder.display()
                )));
            }
        }
    }
    names.sort_unstable_by(|a, b| a.as_os_str().cmp(b.as_os_str()));
    Ok(names)
}

/// What a header says besides the name.
#[derive(Default)]
struct Entry {
    number: u32,
    mode: u32,
    links: u32,
    size: u64,
    device: (u32, u32),
}

struct Archive<'a> {
    folder: &'a Path,
    to: Scratch,
    len: u64,
    /// Files with several names, by device and inode: how many of them are in the folder.
    names: HashMap<(u64, u64), u32>,
    /// Those with several names in the folder: their numbers in the archive.
    numbers: HashMap<(u64, u64), u32>,
}

impl Archive<'_> {
    fn add(&mut self, name: &Path) -> Result<()> {
        let path = self.folder.join(name);
        let failed = |error: io::Error| unreadable(&path, &error);
        let metadata = fs::symlink_metadata(&path).map_err(failed)?;
        let kind = metadata.file_type();
        let mut entry = Entry {
            mode: metadata.mode(),
            links: 1,
            ..Entry::default()
        };
        if kind.is_block_device() || kind.is_char_device() {
            let device = metadata.rdev();
            entry.device = (rustix::fs::major(device), rustix::fs::minor(device));
        }
        let first = self.number(&metadata, &mut entry);
        let name = name.as_os_str().as_bytes();
        if name.len() >= NAME_MOST {
            return Err(wrong(format!(
                "a path in the initrd {} has {} bytes, expected less than {NAME_MOST}",
                self.folder.display(),
                name.len()
            )));
        }
        if kind.is_symlink() {
            let target = fs::read_link(&path).map_err(failed)?;
            let target = target.as_os_str().as_bytes();
            entry.size = target.len() as u64;
            self.header(name, &entry)?;
            self.append(target)?;
            return self.pad();
        }
        if !kind.is_file() || !first {
            return self.header(name, &entry);
        }
        // It may have become something else meanwhile: a FIFO is not waited for.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(&path, flags, Mode::empty());
        let file = file.map(File::from).map_err(|error| failed(error.into()))?;
        entry.size = file.metadata().map_err(failed)?.len();
        self.header(name, &entry)?;
        self.copy(&path, &file, entry.size)?;
        self.pad()
    }

    /// Counts a name of a file that has several.
    fn count(&mut self, name: &Path) -> Result<()> {
        let path = self.folder.join(name);
        let metadata = fs::symlink_metadata(&path).map_err(|error| unreadable(&path, &error))?;
        if metadata.is_file() && metadata.nlink() > 1 {
            let identity = (metadata.dev(), metadata.ino());
            *self.names.entry(identity).or_default() += 1;
        }
        Ok(())
    }

    /// Numbers a file; whether it is the first of its names. A name elsewhere is no fact about the
    /// folder.
    fn number(&mut self, metadata: &Metadata, entry: &mut Entry) -> bool {
        let next = self.numbers.len() as u32 + 1;
        let identity = (metadata.dev(), metadata.ino());
        let names = self.names.get(&identity).copied().unwrap_or_default();
        if !metadata.is_file() || names < 2 {
            return true;
        }
        entry.links = names;
        entry.number = *self.numbers.entry(identity).or_insert(next);
        entry.number == next
    }

    fn header(&mut self, name: &[u8], entry: &Entry) -> Result<()> {
        let total = self.len.saturating_add(entry.size);
        if total > BYTES_MOST {
            return Err(wrong(format!(
                "the initrd {} has more than {} MiB",
                self.folder.display(),
                BYTES_MOST >> 20
            ))
            .help("leave out of it what a disk can hold"));
        }
        let fields = [
            entry.number,
            entry.mode,
            0, // user
            0, // group
            entry.links,
            0, // time
            entry.size as u32,
            0, // device that it was on
            0,
            entry.device.0,
            entry.device.1,
            name.len() as u32 + 1,
            0, // checksum: none in this variant
        ];
        let mut header = b"070701".to_vec();
        for field in fields {
            header.extend(format!("{field:08x}").bytes());
        }
        header.extend(name);
        header.push(0);
        self.append(&header)?;
        self.pad()
    }

    fn copy(&mut self, path: &Path, mut file: &File, size: u64) -> Result<()> {
        let mut buffer = vec![0; 256 << 10];
        let mut left = size;
        while left > 0 {
            let want = left.min(buffer.len() as u64) as usize;
            match file.read(&mut buffer[..want]) {
                Ok(0) => {
                    let message = format!("{} became shorter while it was read", path.display());
                    return Err(Error::failed(message).about("boot.initrd"));
                }
                Ok(len) => {
                    self.append(&buffer[..len])?;
                    left -= len as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(unreadable(path, &error)),
            }
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.len += bytes.len() as u64;
        let failed = |error| Error::failed(format!("no memory for the initrd: {error}"));
        self.to.append(bytes).map_err(failed)
    }

    /// Headers and contents begin at multiples of four.
    fn pad(&mut self) -> Result<()> {
        let padding = self.len.next_multiple_of(4) - self.len;
        self.append(&[0; 3][..padding as usize])
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
    use std::process::{Command, Stdio};

    use super::*;

    /// A folder with one of each kind, made in an order that is not that of the names.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("z")).unwrap();
        fs::create_dir(path("a")).unwrap();
        fs::write(path("z/data"), b"odd").unwrap();
        fs::write(path("z/empty"), b"").unwrap();
        fs::write(path("init"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(path("init"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::set_permissions(path("a"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::hard_link(path("z/data"), path("a/hard")).unwrap();
        symlink("../init", path("a/soft")).unwrap();
        let made = Command::new("mkfifo").arg(path("a.fifo")).status();
        assert!(made.unwrap().success());
        folder
    }

    fn packed(folder: &Path) -> Vec<u8> {
        let file = pack(folder).unwrap();
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// What cpio has to say about an archive.
    fn cpio(archive: &[u8], arguments: &[&str], folder: &Path) -> String {
        use std::io::Write;
        let mut child = Command::new("cpio")
            .args(arguments)
            .arg("--quiet")
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cpio is needed (scripts/install-packages)");
        child.stdin.take().unwrap().write_all(archive).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn cpio_lists_what_is_in_the_folder_sorted_and_all_of_it_root_s() {
        let folder = folder();
        let archive = packed(folder.path());
        let names = cpio(&archive, &["-t"], folder.path());
        let expected = "a\na.fifo\na/hard\na/soft\ninit\nz\nz/data\nz/empty\n";
        assert_eq!(names, expected);
        let listed = cpio(&archive, &["-tvn"], folder.path());
        for line in listed.lines() {
            assert!(line.contains(" 0        0  "), "{line}");
            assert!(line.contains("Jan  1  1970"), "{line}");
        }
        assert!(listed.contains("-rwsr-xr-x"), "{listed}");
        assert!(listed.contains("drwxrwxrwt"), "{listed}");
        assert!(listed.contains("a/soft -> ../init"), "{listed}");
    }

    #[test]
    fn cpio_unpacks_what_was_packed() {
        let folder = folder();
        let target = tempfile::tempdir().unwrap();
        cpio(&packed(folder.path()), &["-idm"], target.path());
        let path = |name: &str| target.path().join(name);
        assert_eq!(fs::read(path("z/data")).unwrap(), b"odd");
        assert_eq!(fs::read(path("a/hard")).unwrap(), b"odd");
        let number = |name: &str| fs::metadata(path(name)).unwrap().ino();
        assert_eq!(number("a/hard"), number("z/data"));
        assert_eq!(fs::read_link(path("a/soft")).unwrap(), Path::new("../init"));
        let mode = |name: &str| fs::symlink_metadata(path(name)).unwrap().mode();
        assert_eq!(mode("init") & 0o777, 0o755);
        assert_eq!(mode("a.fifo") & 0o170_000, 0o010_000);
        assert_eq!(fs::metadata(path("z/empty")).unwrap().len(), 0);
    }

    #[test]
    fn the_same_files_make_the_same_archive() {
        let (one, other) = (folder(), folder());
        assert_eq!(packed(one.path()), packed(other.path()));
    }

    #[test]
    fn a_name_outside_of_the_folder_changes_nothing() {
        let (folder, elsewhere) = (folder(), tempfile::tempdir().unwrap());
        let before = packed(folder.path());
        for name in ["init", "z/data"] {
            let other = elsewhere.path().join(name.replace('/', "-"));
            fs::hard_link(folder.path().join(name), other).unwrap();
        }
        assert_eq!(packed(folder.path()), before);
    }

    #[test]
    fn the_digest_of_a_folder_is_that_of_the_archive_that_is_booted() {
        use crate::digest::{Digest, of, of_input};
        let of_initrd = |path: &Path| of_input("boot.initrd", path);
        let folder = folder();
        let digest = of_initrd(folder.path()).unwrap();
        assert_eq!(digest, Digest::of_bytes(&packed(folder.path())));
        fs::write(folder.path().join("z/data"), b"even").unwrap();
        assert_ne!(of_initrd(folder.path()).unwrap(), digest);
        let file = folder.path().join("init");
        assert_eq!(of_initrd(&file).unwrap(), of(&file).unwrap());
    }

    #[test]
    fn a_device_keeps_its_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let node = folder.path().join("null");
        let device = rustix::fs::makedev(1, 3);
        let kind = rustix::fs::FileType::CharacterDevice;
        let made = rustix::fs::mknodat(rustix::fs::CWD, &node, kind, 0o666.into(), device);
        if made == Err(rustix::io::Errno::PERM) {
            println!("skipped: a device node: only root can make one");
            return;
        }
        made.unwrap();
        let listed = cpio(&packed(folder.path()), &["-tvn"], folder.path());
        assert!(listed.starts_with("crw"), "{listed}");
        assert!(listed.contains(" 1,   3 "), "{listed}");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let folder = folder();
        let path = folder.path().join("z/data");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let error = std::thread::scope(|scope| {
            let packing = || {
                // Root may read everything: this thread becomes someone who may not.
                // SAFETY: changes this thread's identity for file access, and nothing else.
                unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
                pack(folder.path()).err().unwrap()
            };
            scope.spawn(packing).join().unwrap()
        });
        assert_eq!(error.exit, crate::exit::USAGE);
        let shown = folder.path().join("a/hard");
        let expected = format!(
            "error: cannot open {} of the initrd's folder: Permission denied\n",
            shown.display()
        );
        assert!(error.to_string().starts_with(&expected), "{error}");
    }

    #[test]
    fn a_folder_of_more_than_an_initrd_may_have_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create(folder.path().join("big")).unwrap();
        file.set_len(BYTES_MOST + 1).unwrap();
        let error = pack(folder.path()).err().unwrap();
        assert!(
            error.to_string().contains("has more than 1024 MiB"),
            "{error}"
        );
    }
}
