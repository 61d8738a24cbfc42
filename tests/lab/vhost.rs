//! Disks that another process serves over vhost-user-blk, as a stock kernel sees them.

use std::fs::File;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::guest::{Folder, GUEST, PATIENCE, Vm};
use crate::resize::is_now;
use crate::runner::cases;

cases![vhost:
    served_disk_holds_a_file_system_and_grows_under_it,
    served_root_is_booted_again_and_again,
    killed_server_is_a_pause_for_the_guest,
];

const MIB: u64 = 1 << 20;

/// Serves an image at `disk.sock`.
fn serve(folder: &Folder, image: &str, options: &[&str]) -> Vm {
    let command = ["disk", "serve", image, "--socket", "disk.sock"];
    let mut server = Vm::start(&mut folder.launcher(&[&command[..], options].concat()));
    let deadline = Instant::now() + PATIENCE;
    while !folder.path("disk.sock").exists() {
        assert!(
            server.alive() && Instant::now() < deadline,
            "it is not served"
        );
        thread::sleep(Duration::from_millis(10));
    }
    server
}

/// Ends a server as a user does.
fn end(mut server: Vm) {
    server.signal(Signal::TERM);
    assert_eq!(server.exit(), 0, "{}", server.errors());
}

/// The guest's kernel has met no error of a disk.
fn is_content(vm: &mut Vm) {
    let (_, errors) = vm.attempt("dmesg | grep -iE 'I/O error|EXT4-fs error|beyond end|WARNING'");
    assert_eq!(errors, "");
}

fn served_disk_holds_a_file_system_and_grows_under_it() {
    let folder = Folder::new();
    folder.image("data.img", 32 * MIB);
    let server = serve(&folder, "data.img", &["--queues", "2", "--id", "SERVED"]);
    let mut vm = folder.up(&format!(
        "cpus = 2\n{GUEST}\n[[block]]\nvhost_user = \"disk.sock\"\nqueues = 2\n"
    ));
    vm.ready();
    vm.run("dmesg -n 6");
    assert_eq!(vm.run("cat /sys/block/vda/serial"), "SERVED");
    assert_eq!(vm.run("ls /sys/block/vda/mq | wc -l"), "2");
    vm.run("mkdir -p /mnt && /usr/sbin/mke2fs -q -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt");
    vm.run("dd if=/dev/urandom of=/mnt/file bs=64k count=100 status=none");
    let written = vm.run("sha256sum </mnt/file");
    // It grows at its server, under the file system.
    let path = folder.path("data.img");
    let image = File::options().write(true).open(path).unwrap();
    image.set_len(48 * MIB).unwrap();
    server.signal(Signal::HUP);
    is_now(&mut vm, "vda", 48 * MIB);
    vm.run("dd if=/bin/busybox of=/dev/vda bs=64k count=1 seek=767 conv=notrunc,fsync status=none");
    vm.run("umount /mnt && mount -t ext4 /dev/vda /mnt");
    assert_eq!(vm.run("sha256sum </mnt/file"), written);
    vm.run("umount /mnt");
    is_content(&mut vm);
    vm.power_off();
    end(server);
    folder.host("/sbin/e2fsck", &["-f", "-n", "data.img"]);
    folder.host("/sbin/debugfs", &["-R", "dump /file file", "data.img"]);
    let read = folder.host("/bin/busybox", &["sha256sum", "file"]);
    assert_eq!(read.split(' ').next(), written.split(' ').next());
}

fn served_root_is_booted_again_and_again() {
    let folder = Folder::new();
    folder.root_disk("root.img");
    let server = serve(&folder, "root.img", &[]);
    let mut vm = folder.up(&format!(
        "{GUEST}\n[[block]]\nvhost_user = \"disk.sock\"\nroot = true\n"
    ));
    vm.ready();
    vm.run("mkdir /data && dd if=/dev/urandom of=/data/random bs=64k count=32 status=none");
    let written = vm.run("sha256sum /data/random");
    vm.run("sync");
    vm.send("reboot -f\n");
    vm.ready();
    assert_eq!(vm.run("sha256sum /data/random"), written);
    vm.run("mount -o remount,ro /");
    is_content(&mut vm);
    vm.power_off();
    end(server);
    folder.host("/sbin/e2fsck", &["-f", "-n", "root.img"]);
}

/// Files are written and synced, each with its sum, until there are enough.
const WRITER: &str = "(n=0; while [ ! -e /tmp/enough ]; do n=$((n + 1)); \
     dd if=/dev/urandom of=/mnt/f.$((n % 40)) bs=16k count=$((n % 7 + 1)) conv=fsync status=none || break; \
     echo $n >/tmp/written; done; sync; echo done >/tmp/ended) & true";

fn killed_server_is_a_pause_for_the_guest() {
    const KILLS: u32 = 8;
    let folder = Folder::new();
    folder.image("data.img", 32 * MIB);
    let mut server = serve(&folder, "data.img", &[]);
    let mut vm = folder.up(&format!("{GUEST}\n[[block]]\nvhost_user = \"disk.sock\"\n"));
    vm.ready();
    vm.run("mkdir -p /mnt && /usr/sbin/mke2fs -q -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt");
    // A block that is written over and over, past the page cache, beside the files.
    vm.run("dd if=/dev/zero of=/mnt/same bs=1M count=1 conv=fsync status=none");
    vm.run(WRITER);
    let mut before = 0;
    for _ in 0..KILLS {
        // It has gone on since the last one.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let written = vm.run("cat /tmp/written 2>/dev/null || echo 0");
            let written: u32 = written.parse().unwrap_or(0);
            if written >= before + 3 {
                before = written;
                break;
            }
            assert!(Instant::now() < deadline, "the guest writes no more");
        }
        server.signal(Signal::KILL);
        assert_eq!(server.exit(), -9);
        server = serve(&folder, "data.img", &[]);
    }
    vm.run("touch /tmp/enough; while [ ! -e /tmp/ended ]; do sleep 1; done");
    let sums = vm.run("cd /mnt && md5sum f.* && cd /");
    vm.run("umount /mnt && mount -t ext4 /dev/vda /mnt");
    assert_eq!(vm.run("cd /mnt && md5sum f.* && cd /"), sums);
    vm.run("umount /mnt");
    is_content(&mut vm);
    vm.power_off();
    end(server);
    folder.host("/sbin/e2fsck", &["-f", "-n", "data.img"]);
}
