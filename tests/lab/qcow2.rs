//! Guests on qcow2 images: what they see is right, and QEMU's tools agree with what is in the file.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, symlink};

use rustix::process::Signal;

use crate::guest::{Folder, GUEST, Vm, debian_base};
use crate::runner::cases;

cases![qcow2:
    debian_root_over_a_base_installs_trims_and_grows,
    clusters_of_4_kib_with_o_direct_and_blocks_of_4096,
    extended_l2_allocates_subclusters,
    without_sparse_every_cluster_is_allocated_and_nothing_is_discarded,
    external_data_file_holds_the_guests_data,
];

const MIB: u64 = 1 << 20;

/// Bytes that the host has allocated for a file.
fn allocated(folder: &Folder, name: &str) -> u64 {
    fs::metadata(folder.path(name)).unwrap().blocks() * 512
}

/// Checks that `qemu-img check` finds nothing wrong with an image.
pub(crate) fn clean(folder: &Folder, image: &str) {
    folder.host("/usr/bin/qemu-img", &["check", "-f", "qcow2", image]);
}

/// What QEMU reads from an image, as a raw one.
pub(crate) fn convert(folder: &Folder, image: &str, raw: &str) {
    let arguments = ["convert", "-f", "qcow2", "-O", "raw", image, raw];
    folder.host("/usr/bin/qemu-img", &arguments);
}

/// A disk of the guest whose content is a shell script: `sh /dev/vdX` runs it.
pub(crate) fn script(folder: &Folder, name: &str, text: &str) {
    let padding = text.len().next_multiple_of(512) - text.len();
    let text = text.to_owned() + &"\n".repeat(padding);
    folder.write(name, text);
}

/// As many bytes as asked for that no other run has.
pub(crate) fn random(len: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let source = File::open("/dev/urandom").unwrap();
    source.take(len).read_to_end(&mut bytes).unwrap();
    bytes
}

/// The first word that a checksum program prints.
fn sum(printed: &str) -> &str {
    printed.split(' ').next().unwrap_or_default()
}

/// Stock Debian on an overlay that `launcher` makes: it lives as on any disk, gives back what it deletes, and
/// is grown while it runs; and the base stays what it was, byte by byte.
fn debian_root_over_a_base_installs_trims_and_grows() {
    let folder = Folder::new();
    let config = folder.config("debian");
    symlink(debian_base(), folder.path("base.img")).unwrap();
    let base = || folder.host("/bin/busybox", &["md5sum", "base.img"]);
    let before = base();
    let toml = {
        let raw = "path = \"root.img\"\nformat = \"raw\"";
        let overlay = "path = \"root.qcow2\"\nbacking = \"base.img\"\nsize = \"3GiB\"";
        assert!(config.contains(raw), "{config}");
        // The longest case there is: with one vCPU an emulated machine is less likely to lose its guest.
        config.replace(raw, overlay).replace("cpus = 2", "cpus = 1")
    };
    let boot = || {
        let mut vm = folder.up(&toml);
        vm.wait_for("root@debian:~#");
        vm.run("resize2fs /dev/vda");
        vm
    };
    let size = |vm: &mut Vm| -> u64 { vm.run("findmnt -bno SIZE /").trim().parse().unwrap() };

    let mut vm = boot();
    assert!(size(&mut vm) > 2800 * MIB, "the file system fills the disk");
    vm.run(
        "cd /var/tmp && mkdir -p tree/DEBIAN tree/opt && cp -a /usr/lib/x86_64-linux-gnu/perl-base tree/opt",
    );
    vm.run(
        "printf '%s\\n' 'Package: tree' 'Version: 1' 'Architecture: all' 'Maintainer: lab' \
         'Description: a tree' >tree/DEBIAN/control",
    );
    vm.run("dpkg-deb -Znone -b tree tree.deb && dpkg -i tree.deb && rm -r tree");
    vm.run("diff -r /usr/lib/x86_64-linux-gnu/perl-base /opt/perl-base && dpkg --verify tree");
    // What is in the base is removed as well as what is in the overlay.
    vm.run("rm -r /usr/share/zoneinfo && dpkg --verify dpkg coreutils perl-base libc6");
    vm.run("dd if=/dev/urandom of=big bs=1M count=48 status=none && sync");
    let full = allocated(&folder, "root.qcow2");
    vm.run("rm big && sync && fstrim / && sync");
    let trimmed = allocated(&folder, "root.qcow2");
    assert!(
        trimmed + 40 * MIB < full,
        "fstrim left {trimmed} of {full} bytes allocated"
    );
    vm.run("find /opt /usr/bin -xdev -type f -exec md5sum {} + >/root/sums && sync");
    vm.signal(Signal::TERM);
    assert_eq!(vm.exit(), 0, "{}", vm.errors());
    clean(&folder, "root.qcow2");

    let mut vm = boot();
    let grown = folder.ordered(&["disk", "resize", "vm.toml", "0", "+1GiB", "--save"]);
    assert!(grown.contains("has grown from 3GiB to 4GiB"), "{grown}");
    vm.run("resize2fs /dev/vda");
    assert!(size(&mut vm) > 3700 * MIB, "the file system fills the disk");
    vm.run("md5sum --quiet -c /root/sums");
    vm.run("dpkg -r tree && ! test -e /opt/perl-base && fstrim /");
    vm.signal(Signal::TERM);
    assert_eq!(vm.exit(), 0, "{}", vm.errors());

    clean(&folder, "root.qcow2");
    convert(&folder, "root.qcow2", "root.raw");
    folder.host("/sbin/e2fsck", &["-f", "-n", "root.raw"]);
    assert_eq!(base(), before, "the base has changed");
}

/// What the guest does to `/dev/vda`, with `/dev/vdc` as the source: long writes and, four at a time, short ones
/// that begin and end inside clusters; discards, write-zeroes of both kinds, and writes over those.
const PATTERN: &str = r#"
copy() {
    dd if=/dev/vdc of=/dev/vda bs=$2 count=1 iflag=skip_bytes oflag=seek_bytes skip=$1 seek=$1 \
        conv=notrunc,fsync status=none
}
scattered() {
    while [ $1 -lt 200 ]; do
        copy $((8388608 + $1 * 173 % 200 * 20480)) 20480 || exit 1
        set $(($1 + 4))
    done
}
trap '[ $? = 0 ] || echo "pattern failed -"' EXIT
set -e
dd if=/dev/vdc of=/dev/vda bs=1M count=8 conv=notrunc,fsync status=none
jobs=
for job in 0 1 2 3; do
    scattered $job &
    jobs="$jobs $!"
done
for job in $jobs; do wait $job; done
if [ "$(cat /sys/block/vda/queue/discard_max_bytes)" != 0 ]; then
    /usr/sbin/blkdiscard -o 1048576 -l 2097152 /dev/vda
else
    # Not offered, and refused if asked for all the same.
    if /usr/sbin/blkdiscard -o 1048576 -l 2097152 /dev/vda 2>/dev/null; then exit 1; fi
    /usr/sbin/blkdiscard -z -o 1048576 -l 2097152 /dev/vda
fi
/usr/sbin/blkdiscard -z -o 4194304 -l 1060864 /dev/vda
/usr/bin/fallocate -p -o 6295552 -l 1048576 /dev/vda
copy 2097152 307200
copy 4718592 4096
echo 3 >/proc/sys/vm/drop_caches
echo "pattern $(md5sum </dev/vda)"
"#;

/// What [`PATTERN`] leaves on a disk.
fn patterned(source: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; source.len()];
    let mut copy =
        |at: usize, len: usize| disk[at..at + len].copy_from_slice(&source[at..at + len]);
    copy(0, 8 << 20);
    copy(8 << 20, 200 * 20480);
    for (at, len) in [
        (1 << 20, 2 << 20),
        (4 << 20, 1_060_864),
        (6_295_552, 1 << 20),
    ] {
        disk[at..at + len].fill(0);
    }
    let mut copy =
        |at: usize, len: usize| disk[at..at + len].copy_from_slice(&source[at..at + len]);
    copy(2 << 20, 307_200);
    copy(4_718_592, 4096);
    disk
}

/// A disk, and what of it the host may see.
struct Disk<'a> {
    /// Where its images are, with a slash.
    place: &'a str,
    /// Lines of `[[block]]`.
    options: &'a str,
    /// Lines of `[block.qcow2]`; NAME stands for the image's name without its extension.
    table: &'a str,
    /// Extension of the file that has the guest's data.
    data: &'a str,
    /// Whether what the guest discards is freed.
    sparse: bool,
}

/// A guest writes a pattern on one disk of these options and uses a file system on another; both images are then
/// whole, hold what they should for QEMU too, and are as large as they should be.
fn used_by_a_guest(folder: &Folder, disk: &Disk<'_>) {
    let source = random(32 * MIB);
    folder.write("source.img", &source);
    folder.write("expected.img", patterned(&source));
    script(folder, "script.img", PATTERN);
    let mut toml = GUEST.to_owned();
    for (name, size) in [("a", 32), ("b", 48)] {
        let Disk {
            place,
            options,
            table,
            ..
        } = disk;
        toml += &format!(
            "[[block]]\npath = \"{place}{name}.qcow2\"\nsize = \"{size}MiB\"\n{options}\n\
             [block.qcow2]\n{}\n",
            table.replace("NAME", name)
        );
    }
    for name in ["source.img", "script.img"] {
        toml += &format!("[[block]]\npath = \"{name}\"\nro = true\n");
    }
    let image = |name: &str| format!("{}{name}.qcow2", disk.place);
    let data = format!("{}b.{}", disk.place, disk.data);

    let mut vm = folder.up(&toml);
    vm.ready();
    let discards = vm.run("cat /sys/block/vda/queue/discard_max_bytes");
    assert_eq!(
        discards != "0",
        disk.sparse,
        "discard_max_bytes is {discards}"
    );
    vm.send("sh /dev/vdd\n");
    vm.wait_for("pattern ");
    let seen = vm.wait_for(" ");
    let is = folder.host("/bin/busybox", &["md5sum", "expected.img"]);
    assert_eq!(
        seen,
        sum(&is),
        "what the guest reads is not what it has written"
    );

    vm.run("/usr/sbin/mke2fs -q -t ext4 /dev/vdb");
    vm.run("mkdir -p /mnt && mount -t ext4 /dev/vdb /mnt && cp -a /bin /lib /mnt");
    vm.run("dd if=/dev/urandom of=/mnt/gone bs=64k count=320 status=none && sync");
    let full = allocated(folder, &data);
    assert!(full >= 20 * MIB, "{full} bytes hold 20 MiB of data");
    let (status, printed) = vm.attempt("rm /mnt/gone && sync && fstrim /mnt && sync");
    let trimmed = allocated(folder, &data);
    match disk.sparse {
        true => {
            assert_eq!(status, 0, "{printed}");
            assert!(
                trimmed + 18 * MIB < full,
                "fstrim left {trimmed} of {full} bytes allocated"
            );
        }
        false => {
            assert_ne!(status, 0, "a discard was taken that is not offered");
            assert!(trimmed >= 48 * MIB, "only {trimmed} bytes are allocated");
        }
    }
    vm.run("umount /mnt && mount -t ext4 -o ro /dev/vdb /mnt && cmp /bin/busybox /mnt/bin/busybox");
    vm.run("umount /mnt");
    vm.power_off();

    for name in ["a", "b"] {
        clean(folder, &image(name));
    }
    folder.host(
        "/usr/bin/qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            "expected.img",
            &image("a"),
        ],
    );
    convert(folder, &image("b"), "b.raw");
    folder.host("/sbin/e2fsck", &["-f", "-n", "b.raw"]);
}

/// An ext4 file system in a file, mounted: unlike where temporary files are, there is O_DIRECT. Needs root.
pub(crate) struct Mounted<'a>(&'a Folder);

impl Mounted<'_> {
    pub(crate) fn new(folder: &Folder) -> Mounted<'_> {
        folder.image("direct.img", 256 * MIB);
        folder.host("/sbin/mke2fs", &["-q", "-t", "ext4", "direct.img"]);
        fs::create_dir(folder.path("direct")).unwrap();
        let mount = ["mount", "-t", "ext4", "-o", "loop", "direct.img", "direct"];
        folder.host("/bin/busybox", &mount);
        Mounted(folder)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let folder = self.0.path("direct");
        let _ = std::process::Command::new("/bin/busybox")
            .arg("umount")
            .arg(folder)
            .status();
    }
}

fn clusters_of_4_kib_with_o_direct_and_blocks_of_4096() {
    let folder = Folder::new();
    let _mounted = Mounted::new(&folder);
    let disk = Disk {
        place: "direct/",
        options: "o_direct = true\nblock_size = 4096",
        table: "cluster_size = \"4KiB\"",
        data: "qcow2",
        sparse: true,
    };
    used_by_a_guest(&folder, &disk);
}

fn extended_l2_allocates_subclusters() {
    let disk = Disk {
        place: "",
        options: "",
        table: "extended_l2 = true\ncluster_size = \"128KiB\"",
        data: "qcow2",
        sparse: true,
    };
    used_by_a_guest(&Folder::new(), &disk);
}

fn without_sparse_every_cluster_is_allocated_and_nothing_is_discarded() {
    let disk = Disk {
        place: "",
        options: "sparse = false",
        table: "",
        data: "qcow2",
        sparse: false,
    };
    used_by_a_guest(&Folder::new(), &disk);
}

fn external_data_file_holds_the_guests_data() {
    let folder = Folder::new();
    let disk = Disk {
        place: "",
        options: "",
        table: "data_file = \"NAME.data\"\ndata_file_raw = true",
        data: "data",
        sparse: true,
    };
    used_by_a_guest(&folder, &disk);
    // `data_file_raw`: the data file alone is the disk.
    assert!(
        fs::read(folder.path("a.data")).unwrap() == fs::read(folder.path("expected.img")).unwrap(),
        "the data file is not the disk"
    );
    assert!(allocated(&folder, "a.qcow2") < MIB);
}
