//! Disks as a guest sees them, and what is on the host's side afterwards.

use std::fs;

use crate::guest::{Folder, GUEST};
use crate::runner::cases;

cases![disks:
    root_keeps_what_was_written_over_a_reboot,
    ro_root_is_mounted_and_never_written,
    what_the_guest_writes_is_in_the_image,
    what_is_in_the_image_the_guest_reads,
    ephemeral_root_is_writable_and_its_image_never_written,
    pci_path_and_serial_are_as_configured,
    block_size_is_the_guests_logical_block_size,
    thirty_disks_are_vda_to_vdad,
    blocking_threads_serve_where_io_uring_is_refused,
];

/// The test guest with its root file system on the first disk.
fn root(options: &str) -> String {
    format!("{GUEST}\n[[block]]\npath = \"root.img\"\nroot = true\n{options}")
}

fn root_keeps_what_was_written_over_a_reboot() {
    let folder = Folder::new();
    folder.root_disk("root.img");
    let mut vm = folder.up(&root(""));
    vm.ready();
    assert_eq!(
        vm.run("awk '$2 == \"/\" && $1 == \"/dev/vda\" { print $3 }' /proc/mounts"),
        "ext4"
    );
    vm.run("mkdir /data && dd if=/dev/urandom of=/data/random bs=64k count=64 2>/dev/null");
    let written = vm.run("sha256sum /data/random");
    vm.run("sync");
    vm.send("reboot -f\n");
    vm.ready();
    assert_eq!(vm.run("sha256sum /data/random"), written);
    vm.run("mount -o remount,ro /");
    vm.power_off();

    folder.host("/sbin/e2fsck", &["-f", "-n", "root.img"]);
    folder.host(
        "/sbin/debugfs",
        &["-R", "dump /data/random random", "root.img"],
    );
    assert_eq!(fs::metadata(folder.path("random")).unwrap().len(), 4 << 20);
    let read = folder.host("/bin/busybox", &["sha256sum", "random"]);
    assert_eq!(read.split(' ').next(), written.split(' ').next());
}

fn ro_root_is_mounted_and_never_written() {
    let folder = Folder::new();
    folder.root_disk("root.img");
    let before = fs::read(folder.path("root.img")).unwrap();
    let mut vm = folder.up(&root("ro = true"));
    vm.ready();
    assert_eq!(vm.run("cat /sys/block/vda/ro"), "1");
    let (status, printed) = vm.attempt("touch /written");
    assert!(
        status != 0 && printed.contains("Read-only"),
        "touch on a read-only root: status {status}, {printed:?}"
    );
    let (status, _) = vm.attempt("mount -o remount,rw /");
    assert_ne!(status, 0, "a read-only disk was remounted for writing");
    vm.power_off();
    assert!(
        fs::read(folder.path("root.img")).unwrap() == before,
        "the image has changed"
    );
}

fn ephemeral_root_is_writable_and_its_image_never_written() {
    let folder = Folder::new();
    folder.root_disk("root.img");
    let before = fs::read(folder.path("root.img")).unwrap();
    // Twice: the second guest finds nothing of the first one's.
    for _ in 0..2 {
        let mut vm = folder.up(&root("ephemeral = true"));
        vm.ready();
        vm.run("mkdir /data && cp /bin/busybox /data && sync");
        vm.run("cmp /bin/busybox /data/busybox");
        vm.power_off();
        assert!(
            fs::read(folder.path("root.img")).unwrap() == before,
            "the image has changed"
        );
    }
}

fn what_the_guest_writes_is_in_the_image() {
    let folder = Folder::new();
    folder.image("data.img", 8 << 20);
    let mut vm = folder.up(&format!("{GUEST}\n[[block]]\npath = \"data.img\""));
    vm.ready();
    assert_eq!(vm.run("blockdev --getsize64 /dev/vda"), "8388608");
    vm.run("dd if=/dev/urandom of=/tmp/data bs=512 count=3001 2>/dev/null");
    let written = vm.run("sha256sum </tmp/data");
    // Not at the start, and not a whole number of pages.
    vm.run("dd if=/tmp/data of=/dev/vda bs=512 seek=77 conv=fsync 2>/dev/null");
    vm.power_off();
    folder.host(
        "/bin/busybox",
        &[
            "dd",
            "if=data.img",
            "of=read",
            "bs=512",
            "skip=77",
            "count=3001",
        ],
    );
    assert_eq!(
        folder
            .host("/bin/busybox", &["sha256sum", "read"])
            .split(' ')
            .next(),
        written.split(' ').next()
    );
    let image = fs::read(folder.path("data.img")).unwrap();
    let (start, end) = (77 * 512, (77 + 3001) * 512);
    assert!(
        image[..start]
            .iter()
            .chain(&image[end..])
            .all(|byte| *byte == 0),
        "something beside the written range has changed"
    );
}

fn what_is_in_the_image_the_guest_reads() {
    let folder = Folder::new();
    let content: Vec<u8> = (0..1u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    folder.write("data.img", &content);
    let mut vm = folder.up(&format!(
        "{GUEST}\n[[block]]\npath = \"data.img\"\nro = true"
    ));
    vm.ready();
    let seen = vm.run("sha256sum </dev/vda");
    let is = folder.host("/bin/busybox", &["sha256sum", "data.img"]);
    assert_eq!(seen.split(' ').next(), is.split(' ').next());
    vm.power_off();
}

fn pci_path_and_serial_are_as_configured() {
    let folder = Folder::new();
    folder.image("a.img", 1 << 20);
    folder.image("b.img", 2 << 20);
    let mut vm = folder.up(&format!(
        "{GUEST}\n[[block]]\npath = \"a.img\"\nid = \"FIRST\"\n\
         [[block]]\npath = \"b.img\"\nid = \"twenty characters ok\""
    ));
    vm.ready();
    let path = vm.run("readlink -f /sys/block/vda");
    let parts: Vec<_> = path
        .trim_start_matches("/sys/devices/")
        .split('/')
        .collect();
    assert!(
        parts.first() == Some(&"pci0000:00")
            && parts.iter().any(|part| part.starts_with("virtio"))
            && path.ends_with("/block/vda"),
        "{path}"
    );
    assert_eq!(vm.run("cat /sys/block/vda/serial"), "FIRST");
    assert_eq!(vm.run("cat /sys/block/vdb/serial"), "twenty characters ok");
    assert_eq!(vm.run("cat /sys/block/vdb/size"), "4096");
    vm.power_off();
}

fn block_size_is_the_guests_logical_block_size() {
    let folder = Folder::new();
    folder.image("data.img", 4 << 20);
    let mut vm = folder.up(&format!(
        "{GUEST}\n[[block]]\npath = \"data.img\"\nblock_size = 4096"
    ));
    vm.ready();
    assert_eq!(
        vm.run("cat /sys/block/vda/queue/logical_block_size"),
        "4096"
    );
    assert_eq!(vm.run("cat /sys/block/vda/size"), "8192");
    vm.run("echo hello | dd of=/dev/vda bs=4096 seek=1000 conv=sync,fsync 2>/dev/null");
    vm.power_off();
    let image = fs::read(folder.path("data.img")).unwrap();
    assert!(image[1000 * 4096..].starts_with(b"hello\n"));
}

fn thirty_disks_are_vda_to_vdad() {
    let folder = Folder::new();
    let mut toml = GUEST.to_owned();
    for n in 0..30 {
        folder.write(
            &format!("{n}.img"),
            format!("{:<4096}", format!("disk {n}\n")),
        );
        toml += &format!("[[block]]\npath = \"{n}.img\"\nid = \"D{n}\"\n");
    }
    let mut vm = folder.up(&toml);
    vm.ready();
    let letters = 'a'..='z';
    let names: Vec<_> = letters
        .clone()
        .map(|letter| format!("vd{letter}"))
        .chain(letters.take(4).map(|letter| format!("vda{letter}")))
        .collect();
    let seen = vm.run(
        "for disk in /sys/block/vd*; do name=${disk##*/}; \
         echo $name $(cat $disk/serial) $(head -n 1 /dev/$name); done",
    );
    let mut seen: Vec<_> = seen.lines().collect();
    seen.sort_by_key(|line| (line.split(' ').next().map(str::len), *line));
    let expected: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(n, name)| format!("{name} D{n} disk {n}"))
        .collect();
    assert_eq!(seen, expected);
    vm.run("echo written | dd of=/dev/vdad conv=sync,fsync 2>/dev/null");
    vm.power_off();
    assert!(
        fs::read(folder.path("29.img"))
            .unwrap()
            .starts_with(b"written\n")
    );
}

fn blocking_threads_serve_where_io_uring_is_refused() {
    let folder = Folder::new();
    folder.root_disk("root.img");
    let mut command = folder.command(&root(""));
    let mut vm = crate::guest::Vm::start(command.env("LAUNCHER_IO", "threads"));
    vm.ready();
    vm.run("dd if=/dev/urandom of=/data bs=64k count=16 2>/dev/null && sync");
    let written = vm.run("sha256sum </data");
    vm.run("echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(vm.run("sha256sum </data"), written);
    vm.run("mount -o remount,ro /");
    vm.power_off();
    folder.host("/sbin/e2fsck", &["-f", "-n", "root.img"]);
}
