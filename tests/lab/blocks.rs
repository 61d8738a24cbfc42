//! The options of a disk as a stock kernel sees them, and what discards do to the host's file.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::guest::{Folder, GUEST};
use crate::runner::cases;

cases![blocks:
    options_are_what_sysfs_shows,
    fstrim_frees_blocks_of_the_host,
    blkdiscard_frees_and_reads_as_zeroes,
    without_sparse_the_image_is_allocated_and_nothing_is_discarded,
    setro_and_setrw_are_the_guests_own,
    host_block_device_with_o_direct_holds_a_file_system,
];

const MIB: u64 = 1 << 20;

/// The test guest with disks of these options.
fn guest(disks: &[&str]) -> String {
    let disks = disks
        .iter()
        .map(|options| format!("[[block]]\n{options}\n"));
    format!("{GUEST}\n{}", disks.collect::<String>())
}

/// Bytes that the host has allocated for a file.
fn allocated(folder: &Folder, name: &str) -> u64 {
    fs::metadata(folder.path(name)).unwrap().blocks() * 512
}

fn options_are_what_sysfs_shows() {
    let folder = Folder::new();
    for name in ["a.img", "b.img", "c.img"] {
        folder.image(name, 8 * MIB);
    }
    let mut vm = folder.up(&guest(&[
        "path = \"a.img\"",
        "path = \"b.img\"\nblock_size = 4096\nqueues = 2\nid = \"SECOND\"",
        "path = \"c.img\"\nro = true",
    ]));
    vm.ready();
    let queue = |name: &str| format!("cat /sys/block/vd[abc]/queue/{name} | xargs");
    assert_eq!(vm.run(&queue("logical_block_size")), "512 4096 512");
    assert_eq!(
        vm.run(&queue("write_cache")),
        "write back write back write back"
    );
    // Discards need a disk that may be written.
    let discard = vm.run(&queue("discard_max_bytes"));
    let discard: Vec<u64> = discard.split(' ').map(|n| n.parse().unwrap()).collect();
    assert!(
        discard[0] > MIB && discard[1] > MIB && discard[2] == 0,
        "{discard:?}"
    );
    let zeroes = vm.run(&queue("write_zeroes_max_bytes"));
    assert!(
        !zeroes.starts_with("0 ") && zeroes.ends_with(" 0"),
        "{zeroes}"
    );
    assert_eq!(vm.run("cat /sys/block/vd[abc]/ro | xargs"), "0 0 1");
    assert_eq!(vm.run("cat /sys/block/vdb/serial"), "SECOND");
    // One vCPU uses one virtqueue, however many there are.
    assert_eq!(vm.run("ls /sys/block/vdb/mq | wc -l"), "1");
    vm.power_off();
}

fn fstrim_frees_blocks_of_the_host() {
    let folder = Folder::new();
    folder.image("data.img", 64 * MIB);
    let mut vm = folder.up(&guest(&["path = \"data.img\""]));
    vm.ready();
    vm.run("mkdir -p /mnt && mke2fs /dev/vda >/dev/null 2>&1 && mount -t ext4 /dev/vda /mnt");
    vm.run("dd if=/dev/urandom of=/mnt/data bs=64k count=256 2>/dev/null; sync");
    let full = allocated(&folder, "data.img");
    assert!(full >= 16 * MIB, "{full} bytes hold 16 MiB of data");
    vm.run("rm /mnt/data && sync && fstrim /mnt && sync");
    let trimmed = allocated(&folder, "data.img");
    assert!(
        trimmed + 15 * MIB < full,
        "fstrim left {trimmed} of {full} bytes allocated"
    );
    vm.run("umount /mnt");
    vm.power_off();
    folder.host("/sbin/e2fsck", &["-f", "-n", "data.img"]);
}

fn blkdiscard_frees_and_reads_as_zeroes() {
    let folder = Folder::new();
    folder.write("data.img", vec![0x55; 8 << 20]);
    let mut vm = folder.up(&guest(&["path = \"data.img\""]));
    vm.ready();
    vm.run("blkdiscard -o 1048576 -l 4194304 /dev/vda");
    vm.run("dd if=/dev/zero bs=1M count=4 2>/dev/null | cmp -n 4194304 /dev/vda - 1048576 0");
    vm.power_off();
    assert!(allocated(&folder, "data.img") <= 4 * MIB + 64 * 1024);
    let image = fs::read(folder.path("data.img")).unwrap();
    let (hole, rest) = (1 << 20..5 << 20, 5 << 20..8 << 20);
    assert!(image[hole].iter().all(|byte| *byte == 0));
    assert!(image[..1 << 20].iter().all(|byte| *byte == 0x55));
    assert!(image[rest].iter().all(|byte| *byte == 0x55));
}

fn without_sparse_the_image_is_allocated_and_nothing_is_discarded() {
    let folder = Folder::new();
    folder.image("data.img", 8 * MIB);
    let mut vm = folder.up(&guest(&["path = \"data.img\"\nsparse = false"]));
    vm.ready();
    assert!(allocated(&folder, "data.img") >= 8 * MIB);
    assert_eq!(vm.run("cat /sys/block/vda/queue/discard_max_bytes"), "0");
    let (status, _) = vm.attempt("blkdiscard /dev/vda");
    assert_ne!(status, 0, "a discard was taken that is not offered");
    vm.power_off();
    assert!(allocated(&folder, "data.img") >= 8 * MIB);
}

fn setro_and_setrw_are_the_guests_own() {
    let folder = Folder::new();
    folder.image("data.img", MIB);
    let mut vm = folder.up(&guest(&["path = \"data.img\""]));
    vm.ready();
    vm.run("blockdev --setro /dev/vda");
    let (status, _) = vm.attempt("echo no | dd of=/dev/vda conv=fsync 2>/dev/null");
    assert_ne!(status, 0, "a disk set read-only was written");
    vm.run("blockdev --setrw /dev/vda");
    vm.run("echo yes | dd of=/dev/vda conv=fsync 2>/dev/null");
    vm.power_off();
    let image = fs::read(folder.path("data.img")).unwrap();
    assert!(image.starts_with(b"yes\n"));
}

/// A loop device stands for any host block device; making one needs root.
fn host_block_device_with_o_direct_holds_a_file_system() {
    let folder = Folder::new();
    folder.image("backing", 32 * MIB);
    let device = folder.host("/bin/busybox", &["losetup", "-f"]);
    let device = device.trim();
    folder.host("/bin/busybox", &["losetup", device, "backing"]);
    let options = format!("path = \"{device}\"\nformat = \"raw\"\no_direct = true");
    let mut vm = folder.up(&guest(&[&format!("{options}\nblock_size = 4096")]));
    vm.ready();
    assert_eq!(
        vm.run("cat /sys/block/vda/queue/logical_block_size"),
        "4096"
    );
    assert_eq!(
        vm.run("blockdev --getsize64 /dev/vda"),
        (32 * MIB).to_string()
    );
    vm.run("mkdir -p /mnt && mke2fs -b 4096 /dev/vda >/dev/null 2>&1");
    vm.run("mount -t ext4 /dev/vda /mnt");
    vm.run("dd if=/dev/urandom of=/tmp/data bs=3000 count=1000 2>/dev/null");
    vm.run("cp /tmp/data /mnt && sync && echo 3 >/proc/sys/vm/drop_caches");
    vm.run("cmp /tmp/data /mnt/data");
    vm.run("umount /mnt");
    vm.power_off();
    folder.host("/bin/busybox", &["losetup", "-d", device]);
    folder.host("/sbin/e2fsck", &["-f", "-n", "backing"]);
}
