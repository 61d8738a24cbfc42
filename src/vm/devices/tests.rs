//! Disks as a VM's file names them: what is wrong with one is shown with its place.

mod qcow2;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::{config, exit};

/// A folder with the file of a VM.
struct Folder(tempfile::TempDir);

impl Folder {
    /// With images `a.img` and `b.img` of 1 MiB. In the build's folder: temporary ones may lie
    /// in memory, where O_DIRECT or holes are not what they are on a disk.
    fn new() -> Folder {
        let program = std::env::current_exe().unwrap();
        let folder = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let folder = Folder(folder);
        folder.image("a.img", 1 << 20);
        folder.image("b.img", 1 << 20);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn image(&self, name: &str, size: u64) {
        let file = fs::File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
    }

    fn config(&self, disks: &str) -> Vm {
        let file = self.path("vm.toml");
        fs::write(&file, format!("boot.kernel = 'k'\n{disks}")).unwrap();
        config::load(&file, &config::Choice::default()).unwrap()
    }

    /// Opens the disks of a file.
    fn open(&self, disks: &str) -> Result<Devices> {
        let config = self.config(disks);
        Devices::open(&config, Engine::Auto).map_err(|error| error.at(&config.places))
    }

    /// The exit code and what is said of disks that cannot be opened, without the folder.
    #[track_caller]
    fn refused(&self, disks: &str) -> (u8, String) {
        match self.open(disks) {
            Ok(_) => panic!("nothing is wrong"),
            Err(error) => {
                let folder = format!("{}/", self.0.path().display());
                (error.exit, error.to_string().replace(&folder, ""))
            }
        }
    }

    fn blocks(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().blocks()
    }
}

/// Checks the exit code and, letter by letter, what is said.
#[track_caller]
fn said((code, errors): (u8, String), expected_code: u8, expected: &str) {
    let expected = expected.trim_matches('\n');
    assert_eq!(errors, expected, "\n--- said\n{errors}\n---");
    assert_eq!(code, expected_code);
}

#[test]
fn a_missing_image_is_shown_at_its_path() {
    said(
        Folder::new().refused("[[block]]\npath = 'a.img'\n\n[[block]]\npath = 'c.img'\n"),
        exit::USAGE,
        r"
error: cannot open `c.img`: No such file or directory
 --> vm.toml:6:8
  |
6 | path = 'c.img'
  |        ^^^^^^^
  |
  = help: create it with `launcher disk create`, or add `size` to its `[[block]]`
",
    );
}

#[test]
fn what_is_no_image_is_shown_at_its_path() {
    let folder = Folder::new();
    fs::create_dir(folder.path("d")).unwrap();
    let made = Command::new("mkfifo").arg(folder.path("f")).status();
    assert!(made.unwrap().success());
    for (name, kind) in [
        ("d", "a directory"),
        ("f", "a FIFO"),
        ("/dev/null", "a character device"),
    ] {
        let disk = format!("[[block]]\nformat = 'raw'\npath = '{name}'");
        let (code, errors) = folder.refused(&disk);
        let expected = format!(
            "error: `{name}` is {kind}, expected a file or a block device\n --> vm.toml:4:8\n"
        );
        assert!(errors.starts_with(&expected), "{errors}");
        assert_eq!(code, exit::USAGE);
    }
}

#[test]
fn an_image_that_may_not_be_opened_is_shown_with_its_owner() {
    let folder = Folder::new();
    fs::set_permissions(folder.path("a.img"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(folder.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let config = folder.config("[[block]]\npath = 'a.img'");
    let image = &config.block[0].path;
    // The disk's thread inherits the identity that files are opened with; root has to become
    // someone who may not open everything.
    let error = std::thread::scope(|scope| {
        let open = || {
            // SAFETY: changes this thread's identity for file access, and nothing else.
            unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
            Devices::open(&config, Engine::Threads).err().unwrap()
        };
        scope.spawn(open).join().unwrap()
    });
    let error = error.at(&config.places);
    assert_eq!(error.exit, exit::USAGE);
    let errors = error.to_string();
    let expected = format!(
        "error: cannot open `{}`: Permission denied\n",
        image.display()
    );
    assert!(errors.starts_with(&expected), "{errors}");
    assert!(errors.contains("help: it belongs to user "), "{errors}");
}

#[test]
fn a_size_smaller_than_the_image_is_shown_at_size() {
    said(
        Folder::new().refused("[[block]]\npath = 'a.img'\nsize = '512KiB'\n"),
        exit::USAGE,
        r"
error: `size` is 512KiB, but `a.img` has 1MiB
 --> vm.toml:4:8
  |
4 | size = '512KiB'
  |        ^^^^^^^^
  |
  = help: leave `size` out to use all of it; an image is never shrunk by opening it
",
    );
}

#[test]
fn an_image_of_no_whole_blocks_is_shown_at_block_size_or_else_at_its_path() {
    let folder = Folder::new();
    folder.image("a.img", 1536);
    said(
        folder.refused("[[block]]\npath = 'a.img'\nblock_size = 4096\n"),
        exit::USAGE,
        r"
error: `block_size` is 4096, but `a.img` has 1536 bytes, no multiple of it
 --> vm.toml:4:14
  |
4 | block_size = 4096
  |              ^^^^
  |
  = help: add `size = 4096` to grow it to whole blocks
",
    );
    folder.image("a.img", 1000);
    let (_, errors) = folder.refused("[[block]]\npath = 'a.img'\nro = true");
    assert!(errors.contains(" --> vm.toml:3:8\n"), "{errors}");
    assert!(
        errors.contains("help: grow the file to 1024 bytes"),
        "{errors}"
    );
}

#[test]
fn content_of_another_format_is_shown_with_the_line_to_add() {
    let folder = Folder::new();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "vmdk"])
        .arg(folder.path("a.img"))
        .arg("1M")
        .status();
    assert!(
        made.expect("qemu-img (package qemu-utils) is needed")
            .success()
    );
    said(
        folder.refused("[[block]]\npath = 'a.img'\n"),
        exit::USAGE,
        r#"
error: `a.img` begins like a vmdk image, but its name makes it a raw one
 --> vm.toml:3:8
  |
3 | path = 'a.img'
  |        ^^^^^^^
  |
  = help: convert it to a raw image, or add `format = "raw"` if these bytes are the disk's own
"#,
    );
    folder
        .open("[[block]]\npath = 'a.img'\nformat = 'raw'")
        .unwrap();
}

#[test]
fn a_file_system_without_o_direct_is_shown_at_o_direct() {
    let errors = Folder::new().refused(
        "[[block]]\npath = '/proc/version'\nformat = 'raw'\nro = true\nlock = false\n\
         o_direct = true\n",
    );
    said(
        errors,
        exit::USAGE,
        r"
error: `o_direct` is true, but the file system of `/proc/version` has no O_DIRECT
 --> vm.toml:7:12
  |
7 | o_direct = true
  |            ^^^^
  |
  = help: set `o_direct = false`
",
    );
}

#[test]
fn a_second_writer_is_a_failure_that_names_the_first() {
    let folder = Folder::new();
    let disk = |options: &str| format!("[[block]]\npath = 'a.img'\n{options}");
    for (first, second) in [
        ("", ""),
        ("", "ro = true"),
        ("ro = true", ""),
        ("", "ephemeral = true"),
    ] {
        let held = folder.open(&disk(first)).unwrap();
        let (code, errors) = folder.refused(&disk(second));
        assert_eq!(code, exit::FAILED);
        let me = format!("by process {} (", std::process::id());
        assert!(errors.contains(&me), "{errors}");
        assert!(errors.contains("\n --> vm.toml:3:8\n"), "{errors}");
        held.close().unwrap();
    }
    for (first, second) in [
        ("ro = true", "ro = true"),
        ("ephemeral = true", "ephemeral = true"),
        ("ephemeral = true", "ro = true"),
        ("", "lock = false"),
    ] {
        let held = folder.open(&disk(first)).unwrap();
        folder.open(&disk(second)).unwrap().close().unwrap();
        held.close().unwrap();
    }
}

#[test]
fn sparse_false_allocates_before_the_guest_starts_and_true_does_not() {
    let folder = Folder::new();
    let (thin, full) = (
        "path = 'a.img'\nsize = '8MiB'",
        "path = 'b.img'\nsize = '8MiB'",
    );
    let devices = folder
        .open(&format!(
            "[[block]]\n{thin}\n[[block]]\n{full}\nsparse = false"
        ))
        .unwrap();
    assert!(folder.blocks("a.img") * 512 < 1 << 20);
    assert!(folder.blocks("b.img") * 512 >= 8 << 20);
    devices.close().unwrap();
}

#[test]
fn an_allocation_that_cannot_fit_is_a_failure_that_leaves_the_image() {
    let folder = Folder::new();
    let before = folder.blocks("a.img");
    let (code, errors) =
        folder.refused("[[block]]\npath = 'a.img'\nsize = '4194304TiB'\nsparse = false");
    assert_eq!(code, exit::FAILED);
    let expected = "error: cannot allocate 4194304TiB for `a.img`: No space left on device\n";
    assert!(errors.starts_with(expected), "{errors}");
    let meta = fs::metadata(folder.path("a.img")).unwrap();
    assert_eq!((meta.len(), meta.blocks()), (1 << 20, before));
}

#[test]
fn the_options_of_a_disk_reach_its_device() {
    use virtio_bindings::virtio_blk::*;
    let folder = Folder::new();
    let devices = folder
        .open(
            "[[block]]\npath = 'a.img'\nblock_size = 4096\nqueues = 4\n\
             [[block]]\npath = 'b.img'\nro = true\n\
             [[block]]\npath = 'c.img'\nsize = '2MiB'\nsparse = false\n",
        )
        .unwrap();
    let disk = |index: usize| devices.all()[index + 1].lock().unwrap();
    let offers = |index, feature: u32| disk(index).features() & 1 << feature != 0;
    let mut config = [0; 24];
    disk(0).read_config(0, &mut config);
    assert_eq!(config[20..], 4096_u32.to_le_bytes());
    assert_eq!(disk(0).queue_max_sizes().len(), 4);
    disk(2).read_config(0, &mut config);
    assert_eq!(config[..8], (2_u64 << 20 >> 9).to_le_bytes());
    for (index, ro, discard) in [(0, false, true), (1, true, false), (2, false, false)] {
        assert_eq!(offers(index, VIRTIO_BLK_F_RO), ro);
        assert_eq!(offers(index, VIRTIO_BLK_F_DISCARD), discard);
        assert_eq!(offers(index, VIRTIO_BLK_F_MQ), index == 0);
    }
    devices.close().unwrap();
}

#[test]
fn an_ephemeral_disk_is_writable_and_thin_to_the_guest() {
    use virtio_bindings::virtio_blk::*;
    let folder = Folder::new();
    let disk = "[[block]]\npath = 'a.img'\nephemeral = true\nsize = '4MiB'";
    let devices = folder.open(disk).unwrap();
    let features = devices.all()[1].lock().unwrap().features();
    assert_eq!(features & 1 << VIRTIO_BLK_F_RO, 0);
    assert_ne!(features & 1 << VIRTIO_BLK_F_DISCARD, 0);
    let mut capacity = [0; 8];
    devices.all()[1]
        .lock()
        .unwrap()
        .read_config(0, &mut capacity);
    assert_eq!(capacity, (4_u64 << 20 >> 9).to_le_bytes());
    devices.close().unwrap();
    assert_eq!(fs::metadata(folder.path("a.img")).unwrap().len(), 1 << 20);
}

#[test]
fn paths_are_relative_to_the_vm_s_file_not_to_the_working_directory() {
    let folder = Folder::new();
    assert!(!Path::new("a.img").exists());
    folder
        .open("[[block]]\npath = 'a.img'")
        .unwrap()
        .close()
        .unwrap();
}
