//! `launcher init`: what it writes, and that it boots.

#![allow(clippy::unwrap_used)]

mod bare;
mod program;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use launcher::config::{self, Choice, KEYS, Key, Vm};
use tempfile::TempDir;

use self::program::{Done, launcher};

/// A folder that is looked at, and another.
struct Folder(TempDir, TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().canonicalize().unwrap().join(name)
    }

    fn kernel(self, name: &str) -> Folder {
        fs::write(self.path(name), bare::kernel(bare::POWER_OFF)).unwrap();
        self
    }

    fn file(self, name: &str) -> Folder {
        fs::write(self.path(name), "something").unwrap();
        self
    }

    fn raw(self, name: &str) -> Folder {
        let image = File::create(self.path(name)).unwrap();
        image.set_len(1 << 20).unwrap();
        self
    }

    fn qcow2(self, name: &str, backing: &[&str]) -> Folder {
        self.does(
            "qemu-img",
            &[&["create", "-q", "-f", "qcow2"], backing, &[name, "1M"]].concat(),
        );
        self
    }

    fn does(&self, program: &str, arguments: &[&str]) {
        let mut command = Command::new(program);
        let done = command.args(arguments).current_dir(self.0.path()).output();
        let done = done.unwrap();
        assert!(done.status.success(), "{done:?}");
    }

    fn launcher(&self, arguments: &[&str]) -> Command {
        launcher(self.0.path(), self.1.path(), arguments)
    }

    /// Runs `launcher init` to its end.
    fn init(&self, arguments: &[&str]) -> Done {
        let arguments = [&["init"], arguments].concat();
        self.launcher(&arguments).output().unwrap().into()
    }

    /// What `launcher init` writes, which passes `launcher check`.
    #[track_caller]
    fn written(&self, arguments: &[&str]) -> Vm {
        let Done { code, err, .. } = self.init(arguments);
        assert_eq!((code, &*err), (0, ""));
        let check = self.launcher(&["check"]).status().unwrap();
        assert!(check.success());
        config::load(&self.path("vm.toml"), &Choice::default()).unwrap()
    }

    fn text(&self) -> String {
        fs::read_to_string(self.path("vm.toml")).unwrap()
    }
}

fn kernel(vm: &Vm) -> &Path {
    &vm.boot.kernel.as_ref().unwrap().path
}

#[test]
fn what_a_folder_has_is_found_said_and_boots() {
    let folder = Folder::new()
        .kernel("vmlinuz-6.9")
        .kernel("vmlinuz-6.10")
        .file("initrd.img-6.9")
        .file("initrd.img-6.10")
        .file("README")
        .raw("data.img")
        .qcow2("root.qcow2", &[]);
    let Done { code, out, err } = folder.init(&[]);
    assert_eq!((code, &*err), (0, ""));
    assert_eq!(
        out,
        "wrote vm.toml\n\n\
         kernel  vmlinuz-6.10\n\
         initrd  initrd.img-6.10\n\
         disk    root.qcow2 (qcow2, root file system)\n\
         disk    data.img (raw)\n\n\
         next: launcher up\n"
    );
    let vm = config::load(&folder.path("vm.toml"), &Choice::default()).unwrap();
    assert_eq!(kernel(&vm), folder.path("vmlinuz-6.10"));
    let initrd = vm.boot.initrd.as_ref().unwrap();
    assert_eq!(initrd.path, folder.path("initrd.img-6.10"));
    let disks: Vec<_> = vm
        .block
        .iter()
        .map(|disk| (&*disk.format, disk.root, disk.ro))
        .collect();
    assert_eq!(
        disks,
        [("qcow2", true, false), ("sparse-raw", false, false)]
    );
    assert_eq!((vm.cpus, vm.memory), (1, 512 << 20));
    let up = folder.launcher(&["up", "--force"]).output().unwrap();
    if let Some(end) = bare::ended(up) {
        assert_eq!(end, (0, String::new()));
    }
}

#[test]
fn each_key_is_there_with_its_words() {
    fn each(keys: &[Key], text: &str) {
        for key in keys {
            let line = |line: &str| {
                let line = line.trim_start_matches("# ");
                line.starts_with(&format!("{} = ", key.name)) || line == key.spelled()
            };
            assert!(text.lines().any(line), "{} is not there:\n{text}", key.name);
            let first = key.doc.split_whitespace().take(4).collect::<Vec<_>>();
            assert!(text.contains(&first.join(" ")), "{}:\n{text}", key.name);
            each(key.keys(), text);
        }
    }
    let folder = Folder::new().kernel("bzImage").raw("a.raw");
    folder.written(&["--cpus", "2", "--memory", "256MiB"]);
    let text = folder.text();
    each(KEYS, &text);
    assert!(
        text.contains("\ncpus = 2\n") && text.contains("\nmemory = \"256MiB\"\n"),
        "{text}"
    );
    assert!(
        text.contains("\n# Number of virtqueues.\n# queues = 1\n"),
        "{text}"
    );
    assert!(text.lines().all(|line| line.len() <= 100), "{text}");
}

#[test]
fn what_is_named_goes_before_what_is_found() {
    let folder = Folder::new()
        .kernel("vmlinuz")
        .kernel("mine")
        .raw("a.img")
        .raw("b");
    folder.does("mkdir", &["vm"]);
    let Done { code, out, err } = folder.init(&["vm", "--kernel=mine", "--disk=b", "--format=raw"]);
    assert_eq!((code, &*err), (0, ""));
    assert!(out.ends_with("\nnext: launcher up vm\n"), "{out}");
    let vm = config::load(&folder.path("vm/vm.toml"), &Choice::default()).unwrap();
    assert_eq!(kernel(&vm), folder.path("mine"));
    assert_eq!(
        (vm.block.len(), &*vm.block[0].path),
        (1, &*folder.path("b"))
    );
    assert!(vm.block[0].format_written);
    let text = fs::read_to_string(folder.path("vm/vm.toml")).unwrap();
    let note = "# An absolute path: it is not below this file's folder.\nkernel = \"/";
    assert!(text.contains(note), "{text}");
}

#[test]
fn a_vm_toml_that_is_there_stays_but_by_force() {
    let folder = Folder::new().kernel("vmlinuz").raw("a.img");
    fs::write(folder.path("vm.toml"), "mine").unwrap();
    let Done { code, out, err } = folder.init(&[]);
    assert_eq!((code, &*out), (2, ""));
    assert_eq!(
        err,
        "error: vm.toml is there already\nhelp: `--force` replaces it\n"
    );
    assert_eq!(folder.text(), "mine");
    folder.written(&["--force"]);
    assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 3);
}

#[test]
fn a_folder_with_nothing_says_what_to_put_there_and_what_names_it() {
    let folder = Folder::new();
    let Done { code, out, err } = folder.init(&[]);
    assert_eq!((code, &*out), (2, ""));
    assert_eq!(
        err,
        "error: this folder has neither a kernel nor a disk image\n\
         help: put a `vmlinuz` there (a distribution's /boot/vmlinuz-…, a bzImage or vmlinux of \
         your own) and an image or an `initrd.img`, or name them with `--kernel FILE`, `--disk \
         IMAGE` and `--initrd FILE`\n"
    );
    let folder = folder.kernel("vmlinuz");
    let Done { code, err, .. } = folder.init(&[]);
    assert_eq!(code, 2);
    assert_eq!(
        err,
        "error: this folder has a kernel, but no disk image or initrd\n\
         help: put an image there (`*.qcow2`, `*.img`, `*.raw`) or an `initrd.img`, or name one \
         with `--disk IMAGE` or `--initrd FILE`\n"
    );
    let Done { code, err, .. } = folder.init(&["none"]);
    assert_eq!(code, 2);
    assert_eq!(
        err,
        "error: cannot read the folder none: No such file or directory\n"
    );
    assert!(!folder.path("vm.toml").exists());
}

#[test]
fn what_is_called_a_kernel_and_is_none_is_passed_over() {
    let folder = Folder::new()
        .file("vmlinuz")
        .kernel("vmlinuz-6.1")
        .file("initrd.img");
    let Done { out, .. } = folder.init(&[]);
    assert!(out.contains("\nkernel  vmlinuz-6.1\n"), "{out}");
    assert!(
        out.contains("\nnot     vmlinuz (is no kernel: it is neither a bzImage nor an ELF file)\n"),
        "{out}"
    );
    let folder = Folder::new().file("vmlinuz").file("initrd.img");
    let Done { code, err, .. } = folder.init(&[]);
    assert_eq!(code, 2);
    let said = "error: this folder has no kernel that boots: vmlinuz is no kernel: it is neither a bzImage nor an ELF file\n";
    assert!(err.starts_with(said), "{err}");
}

#[test]
fn a_special_file_is_no_image_and_is_not_waited_for() {
    let folder = Folder::new().kernel("vmlinuz");
    folder.does("mkfifo", &["disk.qcow2"]);
    let Done {
        code, err: errors, ..
    } = folder.init(&["--disk", "disk.qcow2"]);
    assert_eq!(
        (code, &*errors),
        (
            2,
            "error: the image disk.qcow2 is a special file, expected a file or a block device\n"
        )
    );
}

#[test]
fn a_folder_that_is_called_as_the_home_folder_is_not_taken_for_it() {
    let folder = Folder::new().kernel("vmlinuz");
    fs::create_dir(folder.path("~")).unwrap();
    let folder = folder.raw("~/disk.img");
    let vm = folder.written(&["--disk", "./~/disk.img"]);
    assert_eq!(vm.block[0].path, folder.path("./~/disk.img"));
}

#[test]
fn what_no_vm_can_have_is_refused_before_anything_is_written() {
    let folder = Folder::new().kernel("vmlinuz").raw("disk.img");
    assert_eq!(folder.init(&["--cpus", "0"]).code, 2);
    assert!(!folder.path("vm.toml").exists());
}

#[test]
fn an_overlay_comes_with_its_backing_files() {
    let folder = Folder::new()
        .kernel("vmlinuz")
        .qcow2("base.qcow2", &[])
        .qcow2("middle.qcow2", &["-b", "base.qcow2", "-F", "qcow2"])
        .qcow2("top.qcow2", &["-b", "middle.qcow2", "-F", "qcow2"]);
    let vm = folder.written(&[]);
    assert_eq!(vm.block.len(), 1);
    assert_eq!(vm.block[0].path, folder.path("top.qcow2"));
    let backing: Vec<_> = vm.block[0]
        .backing
        .iter()
        .map(|file| file.path.clone())
        .collect();
    assert_eq!(
        backing,
        ["middle.qcow2", "base.qcow2"].map(|name| folder.path(name))
    );
}

#[test]
fn a_backing_file_elsewhere_is_left_to_the_user_to_approve() {
    let folder = Folder::new().kernel("vmlinuz").raw("secret.raw");
    let secret = folder.path("secret.raw");
    folder.does("mkdir", &["vm"]);
    let backing = ["-b", secret.to_str().unwrap(), "-F", "raw"];
    let folder = folder.qcow2("vm/a.qcow2", &backing);
    let Done { code, out, err } = folder.init(&["vm", "--kernel", "vmlinuz"]);
    assert_eq!(code, 2);
    assert!(out.starts_with("wrote vm/vm.toml\n"), "{out}");
    assert!(
        err.contains("which the configuration does not name"),
        "{err}"
    );
}

#[test]
fn an_image_that_contradicts_its_name_is_not_guessed() {
    let folder = Folder::new().kernel("vmlinuz").qcow2("a", &[]);
    fs::rename(folder.path("a"), folder.path("cloud.img")).unwrap();
    let Done { code, err, .. } = folder.init(&[]);
    assert_eq!(code, 2);
    assert_eq!(
        err,
        "error: `cloud.img` begins like a qcow2 image, but its name makes it a raw one\n\
         help: say which it is: `--disk cloud.img --format qcow2`, or `--format raw` if these \
         bytes are the disk's own\n"
    );
    let vm = folder.written(&["--disk", "cloud.img", "--format", "qcow2"]);
    assert_eq!(vm.block[0].format, "qcow2");
}

#[test]
fn a_disk_with_a_kernel_of_its_own_is_booted_from() {
    let folder = Folder::new().raw("root.img");
    folder.does("mkdir", &["tree"]);
    let folder = folder.kernel("tree/vmlinuz");
    folder.does(
        "mke2fs",
        &["-q", "-t", "ext4", "-d", "tree", "root.img", "8M"],
    );
    let Done { code, out, err } = folder.init(&[]);
    assert_eq!((code, &*err), (0, ""));
    assert!(
        out.contains("\nkernel  that of root.img, with its initrd\n"),
        "{out}"
    );
    let vm = config::load(&folder.path("vm.toml"), &Choice::default()).unwrap();
    assert_eq!(vm.boot_disk(), Some(0));
    assert!(vm.boot.kernel.is_none() && vm.block[0].root);
    let up = folder.launcher(&["up", "--force"]).output().unwrap();
    if let Some(end) = bare::ended(up) {
        assert_eq!(end, (0, String::new()));
    }
}

#[test]
fn a_root_file_system_in_a_partition_is_named_to_the_kernel() {
    let folder = Folder::new().kernel("vmlinuz").raw("disk.img");
    folder.does(
        "mkdir",
        &[
            "-p",
            "tree/sbin",
            "tree/etc",
            "tree/bin",
            "tree/usr",
            "tree/dev",
        ],
    );
    fs::write(folder.path("tree/sbin/init"), "").unwrap();
    folder.does("mke2fs", &["-q", "-t", "ext4", "-d", "tree", "part", "8M"]);
    let disk = File::options()
        .write(true)
        .open(folder.path("disk.img"))
        .unwrap();
    disk.set_len(10 << 20).unwrap();
    folder.does(
        "sh",
        &["-c", "echo 'start=2048, type=83' | sfdisk --quiet disk.img"],
    );
    let part = fs::read(folder.path("part")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &part, 1 << 20).unwrap();
    let vm = folder.written(&[]);
    assert_eq!(vm.boot.cmdline, "root=/dev/vda1");
    assert!(vm.block[0].root);
}
