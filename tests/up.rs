//! `launcher up` from outside, from the file to the exit code, around a guest that does nothing.

#![allow(clippy::unwrap_used)]

mod bare;
#[allow(dead_code, reason = "how it ends is judged by `bare`")]
mod program;

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use self::program::launcher;

/// mov dx, 0x3f8; mov al, 'R'; out dx, al; hlt; jmp to the hlt
const STAY: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0xf4, 0xeb, 0xfd];

/// A folder with the kernels `k`, which powers off, and `stay`, which prints an R and stays; and
/// one for what runs.
struct Folder(TempDir, TempDir);

impl Folder {
    fn new() -> Folder {
        let new = || tempfile::tempdir().unwrap();
        let folder = Folder(new(), new());
        fs::write(folder.path("k"), bare::kernel(bare::POWER_OFF)).unwrap();
        fs::write(folder.path("stay"), bare::kernel(STAY)).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `launcher up` of a file.
    fn command(&self, file: &str, text: &str) -> Command {
        fs::write(self.path(file), text).unwrap();
        launcher(self.0.path(), self.1.path(), &["up", "--force", file])
    }

    /// Exit code and errors of a whole run.
    fn up(&self, text: &str) -> Option<(i32, String)> {
        bare::ended(self.command("vm.toml", text).output().unwrap())
    }
}

/// Checks exit code and errors, letter by letter.
#[track_caller]
fn said(end: Option<(i32, String)>, expected_code: i32, expected: &str) {
    let Some((code, errors)) = end else { return };
    assert_eq!(errors.trim_end(), expected.trim_matches('\n'));
    assert_eq!(code, expected_code);
}

#[test]
fn a_guest_that_powers_off_ends_it_with_0() {
    said(Folder::new().up("boot.kernel = 'k'\n"), 0, "");
}

#[test]
fn a_kernel_that_is_not_there_is_shown_where_the_file_names_it() {
    said(
        Folder::new().up("cpus = 1\n[boot]\nkernel = 'vmlinuz'\n"),
        2,
        r"
error: cannot open the kernel vmlinuz: No such file or directory
 --> vm.toml:3:10
  |
3 | kernel = 'vmlinuz'
  |          ^^^^^^^^^
  |
  = help: paths in a VM's file are relative to that file
",
    );
}

#[test]
fn memory_that_is_too_small_is_shown_where_it_is_written() {
    let folder = Folder::new();
    fs::write(folder.path("initrd"), vec![1; 8 << 20]).unwrap();
    said(
        folder.up("memory = '4MiB'\nboot.kernel = 'k'\nboot.initrd = 'initrd'\n"),
        2,
        r#"
error: `memory` is 4 MiB, the kernel with its initrd needs at least 10 MiB
 --> vm.toml:1:10
  |
1 | memory = '4MiB'
  |          ^^^^^^
  |
  = help: write memory = "64MiB" or more
"#,
    );
}

#[test]
fn a_log_that_cannot_be_opened_is_shown_where_the_file_names_it() {
    let folder = Folder::new();
    fs::create_dir(folder.path("logs")).unwrap();
    said(
        folder.up("boot.kernel = 'k'\nconsole.log = 'logs'\n"),
        2,
        r"
error: cannot open the console's log logs: Is a directory
 --> vm.toml:2:15
  |
2 | console.log = 'logs'
  |               ^^^^^^
",
    );
}

#[test]
fn a_disk_that_is_not_there_is_shown_where_the_file_names_it() {
    said(
        Folder::new().up("boot.kernel = 'k'\n[[block]]\npath = 'disk.img'\n"),
        2,
        r"
error: cannot open `disk.img`: No such file or directory
 --> vm.toml:3:8
  |
3 | path = 'disk.img'
  |        ^^^^^^^^^^
  |
  = help: create it with `launcher disk create`, or add `size` to its `[[block]]`
",
    );
}

#[test]
fn an_image_is_created_and_fully_allocated_before_the_guest_starts() {
    use std::os::unix::fs::MetadataExt;
    let folder = Folder::new();
    let end = folder
        .up("boot.kernel = 'k'\n[[block]]\npath = 'disk.img'\nsize = '4MiB'\nsparse = false\n");
    let Some(end) = end else { return };
    assert_eq!(end, (0, String::new()));
    let meta = fs::metadata(folder.path("disk.img")).unwrap();
    assert_eq!(meta.len(), 4 << 20);
    assert!(meta.blocks() * 512 >= 4 << 20);
}

#[test]
fn a_size_past_the_file_size_limit_is_an_error_and_no_signal() {
    let folder = Folder::new();
    let text = "boot.kernel = 'k'\n[[block]]\npath = 'disk.img'\nsize = '4MiB'\n";
    let mut command = folder.command("vm.toml", text);
    let limit = || {
        let mib = libc::rlimit {
            rlim_cur: 1 << 20,
            rlim_max: 1 << 20,
        };
        // SAFETY: the pointer is to a whole `rlimit`.
        match unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &mib) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec there is one system call; nothing is allocated or locked.
    unsafe { command.pre_exec(limit) };
    let Some((code, errors)) = bare::ended(command.output().unwrap()) else {
        return;
    };
    assert!(
        errors.starts_with("error: cannot create `disk.img`: File too large"),
        "{errors}"
    );
    assert_eq!(code, 2);
    assert!(!folder.path("disk.img").exists());
}

#[test]
fn a_second_launcher_is_refused_with_the_process_of_the_first() {
    let folder = Folder::new();
    let disk = "[[block]]\npath = 'disk.img'\nsize = '1MiB'\n";
    let text = format!("boot.kernel = 'stay'\n{disk}");
    let mut first = folder
        .command("first.toml", &text)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut printed = [0];
    let running = first.stdout.take().unwrap().read_exact(&mut printed);
    let second = folder.up(&format!("boot.kernel = 'k'\n{disk}"));
    let pid = first.id();
    first.kill().unwrap();
    first.wait().unwrap();
    let Some((code, errors)) = second else { return };
    running.unwrap();
    let expected = format!("error: `disk.img` is being written by process {pid} (`launcher`)\n");
    assert!(errors.starts_with(&expected), "{errors}");
    assert!(errors.contains(" --> vm.toml:3:8\n"), "{errors}");
    assert_eq!(code, 1);
    // The lock has gone with its holder.
    said(folder.up(&format!("boot.kernel = 'k'\n{disk}")), 0, "");
}

#[test]
fn an_ephemeral_disk_s_image_is_as_it_was_after_the_run() {
    let folder = Folder::new();
    fs::write(folder.path("disk.img"), vec![7; 1 << 20]).unwrap();
    let before = fs::metadata(folder.path("disk.img"))
        .unwrap()
        .modified()
        .unwrap();
    said(
        folder.up(
            "boot.kernel = 'k'\n[[block]]\npath = 'disk.img'\nephemeral = true\nsize = '2MiB'\n",
        ),
        0,
        "",
    );
    assert!(fs::read(folder.path("disk.img")).unwrap() == vec![7; 1 << 20]);
    let after = fs::metadata(folder.path("disk.img"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(after, before);
    assert_eq!(
        fs::read_dir(folder.0.path()).unwrap().count(),
        4,
        "nothing is left beside it"
    );
}

/// An ext4 image with these files.
fn ext4(folder: &Folder, image: &str, files: &[(&str, &[u8])]) {
    for (path, content) in files {
        let place = folder.path("tree").join(path);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::write(place, content).unwrap();
    }
    let made = Command::new("/sbin/mke2fs")
        .args(["-q", "-t", "ext4", "-d", "tree", image, "8M"])
        .current_dir(folder.0.path())
        .status();
    assert!(made.unwrap().success());
}

#[test]
fn a_kernel_is_booted_from_the_disk_that_has_it() {
    let folder = Folder::new();
    let kernel = bare::kernel(bare::POWER_OFF);
    ext4(&folder, "disk.img", &[("boot/vmlinuz-1", &kernel)]);
    let text = "[boot]\nfrom_block = 'ROOT'\n[[block]]\npath = 'disk.img'\nid = 'ROOT'\n";
    said(folder.up(text), 0, "");
    let qcow2 = ["convert", "-O", "qcow2", "disk.img", "disk.qcow2"];
    let made = Command::new("qemu-img")
        .args(qcow2)
        .current_dir(folder.0.path())
        .status();
    assert!(made.unwrap().success());
    said(folder.up(&text.replace(".img", ".qcow2")), 0, "");
    said(folder.up(&format!("{text}ephemeral = true")), 0, "");
}

#[test]
fn a_disk_without_a_kernel_is_shown_where_it_is_to_boot_from() {
    let folder = Folder::new();
    ext4(&folder, "disk.img", &[("etc/fstab", b"")]);
    said(
        folder.up("[boot]\nfrom_block = 0\n[[block]]\npath = 'disk.img'\n"),
        2,
        r"
error: `disk.img` has no kernel: neither /vmlinuz nor /boot/vmlinuz-* is in its file system
 --> vm.toml:2:14
  |
2 | from_block = 0
  |              ^
  |
  = help: install a kernel in it (Debian: `apt install linux-image-amd64`), or name one of the host with `kernel`
",
    );
}

#[test]
fn a_folder_is_an_initrd() {
    let folder = Folder::new();
    fs::create_dir(folder.path("root")).unwrap();
    fs::write(folder.path("root/init"), "#!/bin/sh").unwrap();
    let text = "boot.kernel = 'k'\nboot.initrd = 'root'\n";
    said(folder.up(text), 0, "");
    let big = fs::File::create(folder.path("root/big")).unwrap();
    big.set_len(2 << 30).unwrap();
    said(
        folder.up(text),
        2,
        r"
error: the initrd root has more than 1024 MiB
 --> vm.toml:2:15
  |
2 | boot.initrd = 'root'
  |               ^^^^^^
  |
  = help: leave out of it what a disk can hold
",
    );
}
