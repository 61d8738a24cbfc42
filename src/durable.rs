//! Files that are whole at every instant, whatever happens to the host.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// Puts a text in the place of a file's, at once: the file keeps its owner and its mode, and a
/// symbolic link stays one. One that is not there is created.
pub(crate) fn replace(file: &Path, text: &str) -> io::Result<()> {
    let file = match fs::symlink_metadata(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => file.to_owned(),
        _ => fs::canonicalize(file)?,
    };
    let meta = match fs::metadata(&file) {
        Ok(meta) => {
            // Else a file that is not to be written would be exchanged all the same.
            drop(File::options().write(true).open(&file)?);
            Some(meta)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let temporary = beside(&file)?;
    // Left by one that was killed: processes that live have other numbers.
    let _ = fs::remove_file(&temporary);
    let written = write(&temporary, meta.as_ref(), text);
    let written = written.and_then(|()| fs::rename(&temporary, &file));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written?;
    synchronise_folder(&file);
    Ok(())
}

/// Makes the name of a file durable: it is when its folder is. Some folders cannot be
/// synchronised.
pub(crate) fn synchronise_folder(file: &Path) {
    let folder = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

/// Gives a file the owner and the mode that another has.
pub(crate) fn like(file: &File, other: &fs::Metadata) -> io::Result<()> {
    let own = file.metadata()?;
    if (own.uid(), own.gid()) != (other.uid(), other.gid()) {
        fchown(file, Some(other.uid()), Some(other.gid()))?;
    }
    file.set_permissions(fs::Permissions::from_mode(other.mode() & 0o7777))
}

/// A name for a file in the same folder, of this process alone.
pub(crate) fn beside(file: &Path) -> io::Result<PathBuf> {
    let name = file.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let name = format!(".{}.{}", name.to_string_lossy(), std::process::id());
    Ok(file.with_file_name(name))
}

fn write(path: &Path, other: Option<&fs::Metadata>, text: &str) -> io::Result<()> {
    // What there is to hide of a file, its own mode hides.
    let mode = if other.is_some() { 0o600 } else { 0o666 };
    let mut new = File::options()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    new.write_all(text.as_bytes())?;
    if let Some(other) = other {
        like(&new, other)?;
    }
    new.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_created_or_replaced_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.lock");
        replace(&file, "one").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        replace(&file, "two").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "two");
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_process_of_the_same_number_has_left_is_in_nobody_s_way() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.lock");
        fs::write(beside(&file).unwrap(), "half").unwrap();
        replace(&file, "one").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "one");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_symbolic_link_stays_one() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "one").unwrap();
        symlink(&file, &link).unwrap();
        replace(&link, "two").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "two");
    }

    #[test]
    fn what_cannot_be_replaced_is_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        assert!(replace(&taken, "two").is_err());
        assert!(replace(&folder.path().join("absent/file"), "two").is_err());
        assert!(taken.is_dir());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
