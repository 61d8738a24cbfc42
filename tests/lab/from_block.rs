//! Kernels from the file systems of disks.

use std::fs;
use std::io::Write;

use crate::guest::{Folder, files};
use crate::runner::cases;

cases![from_block:
    boots_the_kernel_of_a_partition_whose_root_it_names,
    boots_through_a_qcow2_overlay,
    boots_the_kernel_that_the_guest_has_installed,
    boots_after_the_guest_was_killed_in_the_midst_of_writing,
];

/// The root file system of a disk is its first partition: behind a MiB.
const OFFSET: u64 = 1 << 20;

/// A disk with one partition that has the test guest and, in /boot, the kernel that runs it.
fn disk(folder: &Folder, name: &str) {
    fs::create_dir_all(folder.path("tree/boot")).unwrap();
    fs::create_dir_all(folder.path("tree/etc")).unwrap();
    fs::copy(
        files().join("vmlinuz"),
        folder.path("tree/boot/vmlinuz-6.1.0-9"),
    )
    .unwrap();
    fs::copy(
        files().join("guest.img"),
        folder.path("tree/boot/initrd.img-6.1.0-9"),
    )
    .unwrap();
    folder.host(
        "/sbin/mke2fs",
        &["-q", "-t", "ext4", "-d", "tree", "root", "96M"],
    );
    fs::remove_dir_all(folder.path("tree")).unwrap();
    folder.image(name, 98 << 20);
    let table = "label: gpt\nstart=2048, size=196608\n";
    folder.write("table", table);
    let mut sfdisk = std::process::Command::new("/sbin/sfdisk")
        .args(["--quiet", name])
        .current_dir(folder.path(""))
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    sfdisk
        .stdin
        .take()
        .unwrap()
        .write_all(table.as_bytes())
        .unwrap();
    assert!(sfdisk.wait().unwrap().success());
    let seek = format!("seek={}", OFFSET >> 20);
    let to = format!("of={name}");
    let copy = ["dd", "if=root", &to, "bs=1M", &seek, "conv=notrunc"];
    folder.host("/bin/busybox", &copy);
    fs::remove_file(folder.path("root")).unwrap();
}

/// The test guest in its initramfs; its disk is at hand, not its root.
fn toml(disk: &str) -> String {
    format!("[boot]\nfrom_block = 0\ncmdline = \"quiet\"\n[[block]]\n{disk}\n")
}

fn boots_the_kernel_of_a_partition_whose_root_it_names() {
    let folder = Folder::new();
    disk(&folder, "disk.img");
    // The test guest switches to what the last `root=` names: to nothing.
    let toml = toml("path = \"disk.img\"\nroot = true").replace("quiet", "quiet root=");
    let mut vm = folder.up(&toml);
    vm.ready();
    let line = vm.run("cat /proc/cmdline");
    assert!(line.contains("root=/dev/vda1 rw"), "{line}");
    vm.run("mkdir -p /mnt && mount -t ext4 /dev/vda1 /mnt && test -e /mnt/boot/vmlinuz-6.1.0-9");
    vm.power_off();
}

fn boots_through_a_qcow2_overlay() {
    let folder = Folder::new();
    disk(&folder, "disk.img");
    let convert = ["convert", "-O", "qcow2", "disk.img", "base.qcow2"];
    folder.host("/usr/bin/qemu-img", &convert);
    fs::remove_file(folder.path("disk.img")).unwrap();
    let block = "path = \"top.qcow2\"\nbacking = \"base.qcow2\"\nsize = \"256MiB\"";
    let mut vm = folder.up(&toml(block));
    vm.ready();
    assert_eq!(vm.run("cat /sys/block/vda/size"), "524288");
    vm.power_off();
}

/// In the image itself, and where the image is not written.
fn boots_the_kernel_that_the_guest_has_installed() {
    for (kind, ephemeral) in [("kept", "false"), ("dropped", "true")] {
        let folder = Folder::new();
        disk(&folder, "disk.img");
        let block = format!("path = \"disk.img\"\nephemeral = {ephemeral}");
        let mut vm = folder.up(&toml(&block));
        vm.ready();
        vm.run("mkdir -p /mnt && mount -t ext4 /dev/vda1 /mnt");
        // A newer version, by its name, whose initrd has one file more.
        vm.run("cp /mnt/boot/vmlinuz-6.1.0-9 /mnt/boot/vmlinuz-6.1.0-10");
        vm.run(
            "cd /tmp && echo second >second && (cat /mnt/boot/initrd.img-6.1.0-9; \
             echo second | cpio -o -H newc) >/mnt/boot/initrd.img-6.1.0-10",
        );
        vm.run("cd / && umount /mnt");
        assert_eq!(vm.attempt("test -e /second").0, 1, "{kind}");
        vm.send("reboot -f\n");
        vm.ready();
        assert_eq!(vm.run("cat /second"), "second", "{kind}");
        vm.power_off();
        // At a new start too, if it was written to the image.
        let mut vm = folder.up(&toml(&block));
        vm.ready();
        let found = vm.attempt("test -e /second").0 == 0;
        assert_eq!(found, kind == "kept");
        vm.power_off();
    }
}

/// The file system is left as it was mounted, its journal to be replayed.
fn boots_after_the_guest_was_killed_in_the_midst_of_writing() {
    let folder = Folder::new();
    disk(&folder, "disk.img");
    let mut vm = folder.up(&toml("path = \"disk.img\""));
    vm.ready();
    vm.run("mkdir -p /mnt && mount -t ext4 /dev/vda1 /mnt");
    vm.run(
        "mkdir /mnt/many && cd /mnt/many && for n in $(seq 500); do echo $n >file-$n; done; sync",
    );
    vm.run("mv /mnt/boot/vmlinuz-6.1.0-9 /mnt/boot/vmlinuz-6.1.0-10");
    vm.run(
        "mv /mnt/boot/initrd.img-6.1.0-9 /mnt/boot/initrd.img-6.1.0-10 && sync && rm -r /mnt/many",
    );
    folder.ordered(&["reboot", "vm.toml"]);
    vm.ready();
    vm.run("mkdir -p /mnt && mount -t ext4 /dev/vda1 /mnt && test -e /mnt/boot/vmlinuz-6.1.0-10");
    vm.power_off();
}
