//! `launcher check`: what it says of the host's files, letter by letter, and that it leaves them
//! alone.

#![allow(clippy::unwrap_used)]

mod bare;
mod program;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use self::program::{Done, launcher};

/// A folder with the kernel `k` and what a test puts there, and one for what runs.
struct Folder(TempDir, TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(folder.path("k"), bare::kernel(bare::POWER_OFF)).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An image of this many bytes, made by QEMU's tools if it is no raw one.
    fn image(&self, name: &str, arguments: &[&str]) {
        let mut command = Command::new("qemu-img");
        command
            .args(["create", "-q", "-f", "qcow2"])
            .args(arguments)
            .current_dir(self.0.path());
        match name.ends_with(".qcow2") {
            true => assert!(command.arg(name).arg("1M").status().unwrap().success()),
            false => File::create(self.path(name))
                .unwrap()
                .set_len(1 << 20)
                .unwrap(),
        }
    }

    fn launcher(&self, arguments: &[&str]) -> Command {
        launcher(self.0.path(), self.1.path(), arguments)
    }

    /// Runs `launcher check` to its end.
    fn check(&self, arguments: &[&str]) -> Done {
        let arguments = [&["check"], arguments].concat();
        self.launcher(&arguments).output().unwrap().into()
    }

    /// Checks what is said of a VM, and that its folder is as it was.
    #[track_caller]
    fn says(&self, text: &str, expected: &str) {
        fs::write(self.path("vm.toml"), text).unwrap();
        let before = listing(self.0.path());
        let Done { code, out, err } = self.check(&[]);
        assert_eq!(listing(self.0.path()), before);
        assert_eq!(err.trim_end(), expected.trim_matches('\n'));
        match expected {
            "" => assert_eq!((code, &*out), (0, "vm.toml: ok\n")),
            _ => assert_eq!((code, &*out), (2, "")),
        }
    }
}

/// Names, sizes and times of all files.
fn listing(folder: &Path) -> Vec<(PathBuf, u64, std::time::SystemTime)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|file| {
            let file = file.unwrap();
            let meta = file.metadata().unwrap();
            (file.path(), meta.len(), meta.modified().unwrap())
        })
        .collect();
    files.sort();
    files
}

#[test]
fn a_vm_whose_files_are_all_there_is_ok() {
    let folder = Folder::new();
    fs::write(folder.path("i"), "initrd").unwrap();
    for name in ["a.img", "b.qcow2"] {
        folder.image(name, &[]);
    }
    folder.image("over.qcow2", &["-b", "b.qcow2", "-F", "qcow2"]);
    folder.says(
        "boot.kernel = 'k'\nboot.initrd = 'i'\nconsole.log = 'new.log'\n\
         [[block]]\npath = 'a.img'\nsize = '2MiB'\n\
         [[block]]\npath = 'over.qcow2'\nbacking = 'b.qcow2'\n\
         [[block]]\npath = 'new.img'\nsize = '1GiB'\nsparse = false\n\
         [[block]]\npath = 'new.qcow2'\nbacking = 'b.qcow2'\n",
        "",
    );
}

#[test]
fn every_problem_of_every_vm_is_shown_in_one_run() {
    let folder = Folder::new();
    folder.image("a.img", &[]);
    let text = "\
[boot]
kernel = 'vmlinuz'
initrd = 'initrd.img'
[[block]]
path = 'a.img'
size = 512
[[block]]
path = 'b.img'
[[block]]
path = 'none/c.img'
size = '1MiB'
[console]
log = 'none/log'
";
    fs::write(folder.path("vm.toml"), text).unwrap();
    fs::write(folder.path("good.toml"), "boot.kernel = 'k'").unwrap();
    fs::write(folder.path("wrong.toml"), "boot.kernel = 'k'\ncpus = 0").unwrap();
    let Done { code, out, err } = folder.check(&["vm.toml", "good.toml", "wrong.toml"]);
    assert_eq!((code, &*out), (2, "good.toml: ok\n"));
    assert_eq!(
        err,
        "\
error: cannot open the kernel vmlinuz: No such file or directory
 --> vm.toml:2:10
  |
2 | kernel = 'vmlinuz'
  |          ^^^^^^^^^
  |
  = help: paths in a VM's file are relative to that file

error: cannot open the initrd initrd.img: No such file or directory
 --> vm.toml:3:10
  |
3 | initrd = 'initrd.img'
  |          ^^^^^^^^^^^^
  |
  = help: paths in a VM's file are relative to that file

error: `size` is 512 bytes, but `a.img` has 1MiB
 --> vm.toml:6:8
  |
6 | size = 512
  |        ^^^
  |
  = help: leave `size` out to use all of it; an image is never shrunk by opening it

error: cannot open `b.img`: No such file or directory
 --> vm.toml:8:8
  |
8 | path = 'b.img'
  |        ^^^^^^^
  |
  = help: create it with `launcher disk create`, or add `size` to its `[[block]]`

error: cannot create `none/c.img`: No such file or directory
  --> vm.toml:10:8
   |
10 | path = 'none/c.img'
   |        ^^^^^^^^^^^^
   |
   = help: create its directory first

error: cannot open the console's log none/log: No such file or directory
  --> vm.toml:13:7
   |
13 | log = 'none/log'
   |       ^^^^^^^^^^

error: `cpus` is 0, expected a whole number, 1 to 254
 --> wrong.toml:2:8
  |
2 | cpus = 0
  |        ^
"
    );
}

#[test]
fn quick_looks_at_no_host_file() {
    let folder = Folder::new();
    fs::write(folder.path("vm.toml"), "boot.kernel = 'none'").unwrap();
    let Done { code, out, err } = folder.check(&["--quick"]);
    assert_eq!((code, &*out, &*err), (0, "vm.toml: ok\n", ""));
}

#[test]
fn a_kernel_that_is_none_is_shown() {
    let folder = Folder::new();
    fs::write(folder.path("k"), "#!/bin/sh\n".repeat(100)).unwrap();
    folder.says(
        "boot.kernel = 'k'\n",
        "
error: the kernel k is no kernel: it is neither a bzImage nor an ELF file
 --> vm.toml:1:15
  |
1 | boot.kernel = 'k'
  |               ^^^
  |
  = help: give a bzImage (a distribution's /boot/vmlinuz-…) or an ELF vmlinux
",
    );
}

#[test]
fn memory_that_is_too_small_for_the_initrd_is_shown() {
    let folder = Folder::new();
    fs::write(folder.path("i"), vec![1; 8 << 20]).unwrap();
    folder.says(
        "memory = '4MiB'\nboot.kernel = 'k'\nboot.initrd = 'i'\n",
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
fn a_backing_file_that_is_not_named_is_shown_with_the_line_to_add() {
    let folder = Folder::new();
    folder.image("base.qcow2", &[]);
    folder.image("over.qcow2", &["-b", "base.qcow2", "-F", "qcow2"]);
    folder.says(
        "boot.kernel = 'k'\n[[block]]\npath = 'over.qcow2'\n",
        &format!(
            "
error: `over.qcow2` has the backing file `base.qcow2`, which the configuration does not name
 --> vm.toml:3:8
  |
3 | path = 'over.qcow2'
  |        ^^^^^^^^^^^^
  |
  = help: add `backing = \"{}\"` if that is right; after others of its chain, in order
",
            folder
                .0
                .path()
                .canonicalize()
                .unwrap()
                .join("base.qcow2")
                .display()
        ),
    );
}

#[test]
fn an_image_that_is_marked_as_damaged_is_shown() {
    use std::os::unix::fs::FileExt;
    let folder = Folder::new();
    folder.image("a.qcow2", &[]);
    let image = File::options().write(true).open(folder.path("a.qcow2"));
    image.unwrap().write_all_at(&[2], 79).unwrap();
    folder.says(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.qcow2'\n",
        "
error: `a.qcow2` cannot be used: it is marked as damaged
 --> vm.toml:3:8
  |
3 | path = 'a.qcow2'
  |        ^^^^^^^^^
  |
  = help: make a copy, and repair it with `qemu-img check -r all`
",
    );
}

#[test]
fn an_image_of_another_format_than_its_name_says_is_shown() {
    let folder = Folder::new();
    folder.image("a.qcow2", &[]);
    fs::rename(folder.path("a.qcow2"), folder.path("a.img")).unwrap();
    folder.says(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\n",
        "
error: `a.img` begins like a qcow2 image, but its name makes it a raw one
 --> vm.toml:3:8
  |
3 | path = 'a.img'
  |        ^^^^^^^
  |
  = help: add `format = \"qcow2\"`, or add `format = \"raw\"` if these bytes are the disk's own
",
    );
}

#[test]
fn options_that_no_new_image_can_have_are_shown() {
    let folder = Folder::new();
    folder.says(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.qcow2'\nsize = '1MiB'\nqcow2.version = 4\n",
        "
error: `version` is 4, expected 2 or 3
 --> vm.toml:5:17
  |
5 | qcow2.version = 4
  |                 ^
",
    );
}

#[test]
fn a_log_that_is_a_disk_or_a_folder_is_shown() {
    let folder = Folder::new();
    folder.image("a.img", &[]);
    folder.says(
        "boot.kernel = 'k'\nconsole.log = 'a.img'\n[[block]]\npath = 'a.img'\n",
        "
error: `console.log` is the same file as a.img
 --> vm.toml:2:15
  |
2 | console.log = 'a.img'
  |               ^^^^^^^
  |
  = help: what the guest prints would be written into it: give another file
",
    );
    folder.says(
        "boot.kernel = 'k'\nconsole.log = '.'\n",
        "
error: cannot open the console's log .: Is a directory
 --> vm.toml:2:15
  |
2 | console.log = '.'
  |               ^^^
",
    );
}

#[test]
fn a_read_only_image_does_not_grow() {
    let folder = Folder::new();
    folder.image("a.qcow2", &[]);
    folder.says(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.qcow2'\nro = true\nsize = '2MiB'\n",
        "
error: `size` is 2MiB, but `a.qcow2` has 1MiB, and a read-only image does not grow
 --> vm.toml:5:8
  |
5 | size = '2MiB'
  |        ^^^^^^
  |
  = help: leave `size` out, or set `ro = false`
",
    );
}

#[test]
fn a_file_that_is_fetched_or_built_first_need_not_be_there() {
    let folder = Folder::new();
    folder.says(
        "boot.kernel = { path = 'none', build = ['touch', 'none'] }\n\
         [[block]]\npath = 'root.qcow2'\nbuild = './make'\n",
        "",
    );
}

#[test]
fn a_disk_that_somebody_else_writes_is_shown() {
    let folder = Folder::new();
    folder.image("a.img", &[]);
    let image = File::options()
        .read(true)
        .write(true)
        .open(folder.path("a.img"))
        .unwrap();
    // As QEMU locks an image that it writes.
    let lock = libc::flock64 {
        l_type: libc::F_RDLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 101,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the command takes a pointer to such a structure.
    let locked = unsafe { libc::fcntl(image.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    assert_eq!(locked, 0);
    fs::write(
        folder.path("vm.toml"),
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\n",
    )
    .unwrap();
    let Done { code, err, .. } = folder.check(&[]);
    assert_eq!(code, 2);
    assert!(
        err.starts_with("error: `a.img` is being written by process "),
        "{err}"
    );
}

#[test]
fn that_the_vm_itself_runs_is_no_problem() {
    let folder = Folder::new();
    let stay = [0xfa, 0xf4, 0xeb, 0xfd]; // cli; hlt; jmp to the hlt
    fs::write(folder.path("k"), bare::kernel(&stay)).unwrap();
    folder.image("a.img", &[]);
    fs::write(
        folder.path("vm.toml"),
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\n",
    )
    .unwrap();
    let up = folder.launcher(&["up", "--force", "--detach"]).output();
    let Some(end) = bare::ended(up.unwrap()) else {
        return;
    };
    assert_eq!(end, (0, String::new()));
    let Done { code, out, err } = folder.check(&[]);
    let stopped = folder.launcher(&["kill"]).status().unwrap();
    assert_eq!((code, &*out, &*err), (0, "vm.toml: ok\n", ""));
    assert!(stopped.success());
}

#[test]
fn what_a_disk_is_booted_from_is_looked_at() {
    let folder = Folder::new();
    let fill = |file: &str, content: &[u8]| {
        fs::create_dir_all(folder.path("tree/boot")).unwrap();
        fs::write(folder.path("tree/boot").join(file), content).unwrap();
        let _ = fs::remove_file(folder.path("a.img"));
        let made = Command::new("/sbin/mke2fs")
            .args(["-q", "-t", "ext4", "-d", "tree", "a.img", "8M"])
            .current_dir(folder.0.path())
            .status();
        assert!(made.unwrap().success());
        fs::remove_dir_all(folder.path("tree")).unwrap();
    };
    let text = "[boot]\nfrom_block = 0\n[[block]]\npath = 'a.img'\nroot = true\n";
    fill("vmlinuz-1", &bare::kernel(bare::POWER_OFF));
    folder.says(text, "");
    fill("vmlinuz-1", b"no kernel");
    folder.says(
        text,
        r"
error: the kernel /boot/vmlinuz-1 of `a.img` is no kernel: it is neither a bzImage nor an ELF file
 --> vm.toml:2:14
  |
2 | from_block = 0
  |              ^
  |
  = help: give a bzImage (a distribution's /boot/vmlinuz-…) or an ELF vmlinux
",
    );
    // An image that is not there is told as such, and only once.
    fs::remove_file(folder.path("a.img")).unwrap();
    folder.says(
        text,
        r"
error: cannot open `a.img`: No such file or directory
 --> vm.toml:4:8
  |
4 | path = 'a.img'
  |        ^^^^^^^
  |
  = help: create it with `launcher disk create`, or add `size` to its `[[block]]`
",
    );
}

#[test]
fn a_folder_that_is_the_initrd_is_looked_at() {
    let folder = Folder::new();
    fs::create_dir(folder.path("root")).unwrap();
    fs::write(folder.path("root/init"), "").unwrap();
    folder.says("boot.kernel = 'k'\nboot.initrd = 'root'\n", "");
}
