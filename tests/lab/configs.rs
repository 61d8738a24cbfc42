//! The checked-in configurations boot to what their READMEs promise.

use std::fs;
use std::os::unix::fs::symlink;

use rustix::process::Signal;

use crate::guest::{Folder, Vm, repository};
use crate::qcow2::Mounted;
use crate::runner::cases;

cases![configs:
    configs_hello_says_hello_and_powers_off,
    configs_debian_reaches_a_root_shell_and_powers_off,
    configs_debian_qcow2_grows_and_keeps_what_is_written,
    configs_fleet_shares_an_image_that_none_writes,
    configs_kernel_dev_boots_what_is_in_the_folder,
    configs_blocklab_writes_to_every_disk,
];

fn configs_hello_says_hello_and_powers_off() {
    let folder = Folder::new();
    let mut vm = folder.up(&folder.config("hello"));
    vm.wait_for("Hello from Linux");
    assert_eq!(vm.exit(), 0, "{}", vm.errors());
}

/// What a newcomer sees: stock kernel, stock initrd, systemd, a shell; and the button, answered by logind. Kernel and
/// initrd are those of the disk: there are no others in the folder.
fn configs_debian_reaches_a_root_shell_and_powers_off() {
    let folder = Folder::new();
    let toml = folder.config("debian");
    let image = repository().join("configs/debian/root.img");
    if fs::metadata(&image).unwrap().is_file() {
        folder.host(
            "cp",
            &["--sparse=always", image.to_str().unwrap(), "root.img"],
        );
    } else {
        symlink(image, folder.path("root.img")).unwrap();
    }
    let mut vm = folder.up(&toml);
    for text in ["automatic login", "root@debian:~#"] {
        vm.wait_for(text);
    }
    assert_eq!(vm.run("findmnt -no SOURCE,FSTYPE /"), "/dev/vda ext4");
    assert_eq!(vm.run("lsblk -no SERIAL /dev/vda"), "ROOT");
    assert_eq!(vm.run("nproc"), "2");
    vm.run("test -e /boot/vmlinuz-$(uname -r)");
    assert_eq!(vm.run("systemctl is-system-running --wait"), "running");
    vm.signal(Signal::TERM);
    assert_eq!(vm.exit(), 0, "{}", vm.errors());
}

/// The overlay has eight GiB over a base of two; the next start has what this one wrote.
fn configs_debian_qcow2_grows_and_keeps_what_is_written() {
    let folder = Folder::new();
    let toml = folder.config("debian-qcow2");
    let mut vm = folder.up(&toml);
    vm.wait_for("root@debian:~#");
    assert_eq!(vm.run("systemctl is-system-running --wait"), "running");
    let size: u64 = vm.run("findmnt -bno SIZE /").parse().unwrap();
    assert!(size > 7 << 30, "the file system has {size} bytes");
    vm.run("echo kept >/root/kept");
    vm.signal(Signal::TERM);
    assert_eq!(vm.exit(), 0, "{}", vm.errors());
    let mut vm = folder.up(&toml);
    vm.wait_for("root@debian:~#");
    assert_eq!(vm.run("cat /root/kept"), "kept");
    vm.signal(Signal::TERM);
    assert_eq!(vm.exit(), 0, "{}", vm.errors());
}

/// Three at once, each with a name of its own, and nothing of what one writes in another or at its next start.
fn configs_fleet_shares_an_image_that_none_writes() {
    let folder = Folder::new();
    folder.config("fleet");
    let configs = repository().join("configs/fleet");
    for file in ["base.toml", "web.toml", "db.toml", "cache.toml"] {
        symlink(configs.join(file), folder.path(file)).unwrap();
    }
    let start = |name: &str| {
        let console = "console.mode=stdio";
        Vm::start(&mut folder.launcher(&["up", &format!("{name}.toml"), "--set", console]))
    };
    let login = |vm: &mut Vm, name: &str| {
        vm.wait_for(&format!("root@{name}:~#"));
        assert_eq!(
            vm.attempt("test -e /root/mark").0,
            1,
            "{name} has another's file"
        );
        vm.run("touch /root/mark && sync");
    };
    let names = ["web", "db", "cache"];
    let mut fleet = names.map(start);
    for (vm, name) in fleet.iter_mut().zip(names) {
        login(vm, name);
    }
    for mut vm in fleet {
        vm.signal(Signal::TERM);
        assert_eq!(vm.exit(), 0, "{}", vm.errors());
    }
    let mut again = start("web");
    login(&mut again, "web");
    again.signal(Signal::TERM);
    assert_eq!(again.exit(), 0, "{}", again.errors());
}

/// What one puts into the folder is in the guest at its next boot.
fn configs_kernel_dev_boots_what_is_in_the_folder() {
    let folder = Folder::new();
    let toml = folder
        .config("kernel-dev")
        .replace("ignore_loglevel", "quiet");
    let rootfs = repository().join("configs/kernel-dev/rootfs");
    folder.host(
        "/bin/busybox",
        &["cp", "-a", rootfs.to_str().unwrap(), "rootfs"],
    );
    for file in ["one", "two"] {
        folder.write(&format!("rootfs/{file}"), file);
        let mut vm = folder.up(&toml);
        vm.wait_for("kernel-dev: Linux");
        assert_eq!(vm.run(&format!("cat /{file}")), file);
        assert_eq!(vm.run("stat -c %u:%g /init /bin/busybox"), "0:0\n0:0");
        vm.send("exit\n");
        assert_eq!(vm.exit(), 0, "{}", vm.errors());
    }
}

fn configs_blocklab_writes_to_every_disk() {
    let folder = Folder::new();
    let _mounted = Mounted::new(&folder);
    let toml = folder.config("blocklab");
    let disks = toml.matches("[[block]]").count();
    let toml = toml.replace("\"direct.img\"", "\"direct/direct.img\"");
    let mut vm = folder.up(&toml);
    let table = vm.wait_for(&format!("blocklab: {disks} disks, 0 of them failed"));
    for line in [
        "direct             64  4096      1 yes",
        "queues             64   512      2 yes",
    ] {
        assert!(table.contains(line), "no {line:?} in\n{table}");
    }
    assert_eq!(vm.exit(), 0, "{}", vm.errors());
}
