//! Writing a disk's new size into the VM's file, which is the user's: everything else in it stays
//! as it is.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use toml_edit::{DocumentMut, Item, TableLike, Value};

use crate::config::{Vm, size};
use crate::error::text;
use crate::{Error, Result, durable};

/// Sets the `size` of the disk `index` of a VM to `bytes`, in the VM's own file.
///
/// The file is whole at every instant, and keeps its mode; a symbolic link stays one.
pub(super) fn save(vm: &Vm, index: usize, bytes: u64) -> Result<()> {
    let own = own_entry(vm, index).map_err(|elsewhere| {
        let message = format!("the disk has its new size, but {}", elsewhere.message());
        Error::failed(message).help(by_hand(vm, index, bytes))
    })?;
    write_size(&vm.file, own, bytes)
}

/// What to write into a VM's own file when the disk is said in another.
pub(super) fn by_hand(vm: &Vm, index: usize, bytes: u64) -> String {
    let (file, size) = (vm.file.display(), size::show(bytes));
    match vm.block.get(index).and_then(|block| block.id.as_deref()) {
        Some(id) => format!(
            "write a `[[block]]` with `id = {id:?}` and `size = \"{size}\"` into {file}, or change \
             it there"
        ),
        None => format!("write `size = \"{size}\"` there yourself"),
    }
}

/// The disk's place among those that the VM's own file writes. The error is that another file, a
/// profile or the command line has the last word on it: what is written there is for more than
/// this VM as it is now.
fn own_entry(vm: &Vm, index: usize) -> Result<usize> {
    vm.places
        .own_entry("block", index, "size")
        .map_err(|origin| {
            let file = vm.file.display();
            let what = format!("disk {index} is not {file}'s own");
            Error::failed(format!("{what}: its size is for {origin} to say"))
        })
}

fn write_size(file: &Path, index: usize, bytes: u64) -> Result<()> {
    let failed = |error: &io::Error| {
        let message = format!(
            "cannot write the new size into {}: {}",
            file.display(),
            text(error)
        );
        let help = format!("write `size = \"{}\"` there yourself", size::show(bytes));
        Error::failed(message).help(help)
    };
    let old = fs::read_to_string(file).map_err(|error| failed(&error))?;
    let new = with_size(&old, index, bytes).ok_or_else(|| {
        failed(&io::Error::other(format!(
            "it has no disk {index} any more"
        )))
    })?;
    match new == old {
        true => Ok(()),
        false => durable::replace(file, &new).map_err(|error| failed(&error)),
    }
}

/// Makes sure, before anything is changed, that [`save`] will find the disk and may write.
pub(super) fn check(vm: &Vm, index: usize) -> Result<()> {
    let own = own_entry(vm, index).map_err(|elsewhere| {
        let help = "nothing was changed; leave out `--save` to resize all the same, and write the \
                    new size yourself";
        elsewhere.help(help)
    })?;
    check_file(&vm.file, own)
}

fn check_file(file: &Path, index: usize) -> Result<()> {
    let failed = |error: &io::Error| {
        let (file, text) = (file.display(), text(error));
        let message = format!("a new size could not be written into {file}: {text}");
        Error::failed(message)
            .help("nothing was changed; leave out `--save` to resize all the same")
    };
    let old = fs::read_to_string(file).map_err(|error| failed(&error))?;
    if with_size(&old, index, 512).is_none() {
        return Err(failed(&io::Error::other(format!(
            "there is no table of disk {index}"
        ))));
    }
    let opened = File::options().write(true).open(file);
    opened.map(drop).map_err(|error| failed(&error))
}

/// The text of a VM's file with another size of a disk; none if there is no such disk.
fn with_size(text: &str, index: usize, bytes: u64) -> Option<String> {
    let (mark, body) = match text.strip_prefix('\u{feff}') {
        Some(body) => ("\u{feff}", body),
        None => ("", text),
    };
    let mut document: DocumentMut = body.parse().ok()?;
    let (disk, braces): (&mut dyn TableLike, _) = match document.get_mut("block")? {
        Item::ArrayOfTables(disks) => (disks.get_mut(index)?, false),
        Item::Value(Value::Array(disks)) => (disks.get_mut(index)?.as_inline_table_mut()?, true),
        _ => return None,
    };
    let mut value = match bytes.is_multiple_of(1024) && bytes > 0 {
        true => Value::from(size::show(bytes)),
        false => Value::from(i64::try_from(bytes).ok()?),
    };
    match disk.get_mut("size") {
        Some(Item::Value(old)) => {
            // The comment behind it is part of what surrounds a value.
            *value.decor_mut() = old.decor().clone();
            *old = value;
        }
        Some(_) => return None,
        None => {
            // In a table within braces, the blank before the closing one is behind the last value.
            if let Some((_, Item::Value(last))) = disk.iter_mut().last()
                && braces
                && let Some(blank) = last.decor().suffix().cloned()
            {
                last.decor_mut().set_suffix("");
                value.decor_mut().set_prefix(" ");
                value.decor_mut().set_suffix(blank);
            }
            disk.insert("size", Item::Value(value));
        }
    }
    // The library writes line feeds; a file with other line ends keeps them.
    let new = document.to_string();
    let new = match body.contains("\r\n") && !new.contains("\r\n") {
        true => new.replace('\n', "\r\n"),
        false => new,
    };
    Some(format!("{mark}{new}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_size_changes_and_nothing_else() {
        let text = "# mine\nname = 'web'   # its name\n\n[[block]]\npath = \"a.img\" # first\n\
                    size = \"1GiB\"   # grown in March\n# a note\nro = false\n\n\
                    [block.qcow2]\ncluster_size = 65536\n\n[[block]]\npath = 'b.img'\n";
        assert_eq!(
            with_size(text, 0, 2 * GIB).unwrap(),
            text.replace("\"1GiB\"", "\"2GiB\"")
        );
    }

    #[test]
    fn a_disk_without_a_size_gets_one() {
        let text = "[[block]]\npath = 'a.img'\n[block.qcow2]\nversion = 3\n# more\n[[block]]\npath = 'b.img'\n";
        let new = with_size(text, 0, 3 * GIB).unwrap();
        assert!(new.starts_with("[[block]]\npath = 'a.img'\nsize = \"3GiB\"\n[block.qcow2]\n"));
        let new = with_size(text, 1, 3 * GIB).unwrap();
        assert!(new.ends_with("path = 'b.img'\nsize = \"3GiB\"\n"), "{new}");
    }

    #[test]
    fn a_size_that_no_unit_fits_is_bytes() {
        let new = with_size("[[block]]\nsize = 512\n", 0, 1536).unwrap();
        assert_eq!(new, "[[block]]\nsize = 1536\n");
    }

    #[test]
    fn disks_in_one_array_are_found_too() {
        let text = "block = [{ path = 'a.img', size = 512 }, { path = 'b.img' }] # two\n";
        assert_eq!(
            with_size(text, 0, 2048).unwrap(),
            text.replace("512", "\"2KiB\"")
        );
        assert!(
            with_size(text, 1, 2048)
                .unwrap()
                .contains("'b.img', size = \"2KiB\" }] # two")
        );
    }

    #[test]
    fn line_ends_and_a_byte_order_mark_stay() {
        let text = "\u{feff}[[block]]\r\npath = 'a.img'\r\nsize = 512\r\n";
        assert_eq!(
            with_size(text, 0, 2048).unwrap(),
            text.replace("512", "\"2KiB\"")
        );
    }

    #[test]
    fn a_disk_that_is_not_there_is_none() {
        assert_eq!(with_size("[[block]]\n", 1, 512), None);
        assert_eq!(with_size("name = 'a'\n", 0, 512), None);
        assert_eq!(with_size("block = 1\n", 0, 512), None);
        assert_eq!(with_size("[[block]", 0, 512), None);
    }

    #[test]
    fn a_link_stays_one_and_the_file_keeps_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let (real, link) = (
            folder.path().join("real.toml"),
            folder.path().join("vm.toml"),
        );
        fs::write(&real, "[[block]]\nsize = 512\n").unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("real.toml", &link).unwrap();
        write_size(&link, 0, 1 << 20).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(
            fs::read_to_string(&real).unwrap(),
            "[[block]]\nsize = \"1MiB\"\n"
        );
        assert_eq!(fs::metadata(&real).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_could_not_be_saved_is_found_before() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.toml");
        let refused = |index| check_file(&file, index).unwrap_err().to_string();
        assert!(refused(0).contains("vm.toml: No such file or directory\nhelp: nothing was"));
        fs::write(&file, "[[block]]\npath = 'a.img'\n").unwrap();
        check_file(&file, 0).unwrap();
        assert!(refused(1).contains("there is no table of disk 1"));
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            "[[block]]\npath = 'a.img'\n"
        );
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error_that_says_what_to_write() {
        let error = write_size(Path::new("/no/such/vm.toml"), 0, GIB).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error: cannot write the new size into /no/such/vm.toml: No such file or directory\n\
             help: write `size = \"1GiB\"` there yourself"
        );
    }
}
