//! Images as tools of the host make them: what is taken from them, and what is refused.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use formats::{Engine, Image as FormatImage};

use super::*;
use crate::devices::virtio::blk::{Blk, BlkOptions};
use crate::exit;

const MIB: u64 = 1 << 20;
/// Type of a GPT partition with a root file system for x86-64.
const ROOT: &str = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709";
const LINUX: &str = "0FC63DAF-8483-4772-8E79-3D69D8477DE4";

struct Bench(tempfile::TempDir);

/// Runs a program of the host with `input`.
#[track_caller]
fn run(folder: &Path, program: &str, args: &[&str], input: &str) {
    use std::io::Write;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut child = Command::new(program)
        .args(args)
        .current_dir(folder)
        .env("PATH", format!("{path}:/sbin:/usr/sbin"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{program} (scripts/install-packages): {error}"));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    assert!(child.wait().unwrap().success(), "{program} {args:?}");
}

impl Bench {
    fn new() -> Bench {
        Bench(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, program: &str, args: &[&str]) {
        run(self.0.path(), program, args, "");
    }

    /// A file for a file system: its content is its own path, unless it is a link `PATH -> TARGET`.
    fn tree(&self, name: &str, files: &[&str]) {
        fs::create_dir_all(self.path(name)).unwrap();
        for file in files {
            let (path, target) = match file.split_once(" -> ") {
                Some((path, target)) => (path, Some(target)),
                None => (*file, None),
            };
            let place = self.path(name).join(path.trim_start_matches('/'));
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            match target {
                Some(target) => symlink(target, place).unwrap(),
                None => fs::write(place, path).unwrap(),
            }
        }
    }

    /// An ext4 file system with these files, as an image.
    fn ext4(&self, image: &str, files: &[&str]) {
        self.ext4_with(image, files, &[]);
    }

    fn ext4_with(&self, image: &str, files: &[&str], options: &[&str]) {
        let tree = format!("{image}.tree");
        self.tree(&tree, files);
        let usual = ["-q", "-F", "-t", "ext4", "-d", &tree];
        let args = [&usual[..], options, &[image, "8M"]].concat();
        self.run("mke2fs", &args);
    }

    /// A disk of `size` with these partitions, each of a line of sfdisk's and maybe what is in it.
    fn partitioned(&self, disk: &str, size: u64, table: &str, contents: &[(u64, &str)]) {
        let file = fs::File::create(self.path(disk)).unwrap();
        file.set_len(size).unwrap();
        run(self.0.path(), "sfdisk", &["--quiet", disk], table);
        for (offset, image) in contents {
            let image = fs::read(self.path(image)).unwrap();
            file.write_all_at(&image, *offset).unwrap();
        }
    }

    fn options(&self, image: &str, format: &str) -> BlkOptions {
        BlkOptions {
            image: FormatImage::new(self.path(image)),
            format: formats::find(format).unwrap(),
            ephemeral: false,
            id: None,
            queues: 1,
            engine: Engine::Auto,
            poll: None,
            cpus: Vec::new(),
        }
    }

    fn block(&self, image: &str, more: &str) -> Block {
        let file = self.path("vm.toml");
        let text =
            format!("boot.from_block = 0\n[[block]]\npath = '{image}'\nformat = 'raw'\n{more}\n");
        fs::write(&file, text).unwrap();
        crate::config::load(&file, &Default::default())
            .unwrap()
            .block
            .remove(0)
    }

    fn read(&self, image: &str) -> Result<BootFiles> {
        let disk = Blk::open(self.options(image, "sparse-raw")).unwrap();
        super::read(&disk.handle(), &self.block(image, "root = true"))
    }

    /// What is taken from an image: the kernel's path and the initrd's, and the root partition.
    #[track_caller]
    fn taken(&self, image: &str) -> (String, Option<String>, Option<u32>) {
        taken(self.read(image).unwrap())
    }

    #[track_caller]
    fn refused(&self, image: &str) -> String {
        let error = self.read(image).err().unwrap();
        assert_eq!(error.exit, exit::USAGE, "{error}");
        let folder = format!("{}/", self.0.path().display());
        error.to_string().replace(&folder, "")
    }
}

fn content(file: BootFile) -> String {
    let mut content = vec![0; file.size().unwrap() as usize];
    file.file.read_exact_at(&mut content, 0).unwrap();
    String::from_utf8(content).unwrap()
}

fn taken(files: BootFiles) -> (String, Option<String>, Option<u32>) {
    let root = files.root_partition;
    (content(files.kernel), files.initrd.map(content), root)
}

fn both(kernel: &str, initrd: &str, root: Option<u32>) -> (String, Option<String>, Option<u32>) {
    (kernel.to_owned(), Some(initrd.to_owned()), root)
}

#[test]
fn the_links_at_the_root_name_kernel_and_initrd() {
    let bench = Bench::new();
    let files = [
        "/vmlinuz -> boot/vmlinuz-6.1.0-9",
        "/initrd.img -> boot/initrd.img-6.1.0-9",
        "/boot/vmlinuz-6.1.0-9",
        "/boot/initrd.img-6.1.0-9",
        "/boot/vmlinuz-6.1.0-10",
        "/boot/initrd.img-6.1.0-10",
    ];
    bench.ext4("a.img", &files);
    let expected = both("/boot/vmlinuz-6.1.0-9", "/boot/initrd.img-6.1.0-9", None);
    assert_eq!(bench.taken("a.img"), expected);
}

#[test]
fn without_links_the_newest_kernel_is_taken_with_the_initrd_of_its_version() {
    let bench = Bench::new();
    let files = [
        "/boot/vmlinuz-6.1.0-9",
        "/boot/initrd.img-6.1.0-9",
        "/boot/vmlinuz-6.1.0-10",
        "/boot/initramfs-6.1.0-10.img",
        "/boot/vmlinuz-6.1.0-11.old",
        "/boot/vmlinuz-0-rescue-7f",
        "/boot/config-6.1.0-12",
    ];
    bench.ext4("a.img", &files);
    let expected = both(
        "/boot/vmlinuz-6.1.0-10",
        "/boot/initramfs-6.1.0-10.img",
        None,
    );
    assert_eq!(bench.taken("a.img"), expected);
}

#[test]
fn a_kernel_may_have_no_initrd() {
    let bench = Bench::new();
    bench.ext4("a.img", &["/boot/vmlinuz-6.1.0", "/boot/initrd.img-5.10.0"]);
    let expected = ("/boot/vmlinuz-6.1.0".to_owned(), None, None);
    assert_eq!(bench.taken("a.img"), expected);
}

#[test]
fn links_stay_inside_the_file_system() {
    let bench = Bench::new();
    fs::write(bench.path("outside"), "the host's").unwrap();
    let outside = bench.path("outside");
    let host = format!("/vmlinuz -> {}", outside.display());
    let up = "/boot/vmlinuz-2 -> ../../../../boot/vmlinuz-1";
    bench.ext4("a.img", &[&host, "/boot/vmlinuz-1", up]);
    assert_eq!(bench.taken("a.img").0, "/boot/vmlinuz-1");
}

#[test]
fn a_gpt_is_searched_from_its_root_partition_on() {
    let bench = Bench::new();
    bench.ext4("data", &["/vmlinuz"]);
    bench.ext4(
        "root",
        &["/boot/vmlinuz-1", "/boot/initrd.img-1", "/etc/fstab"],
    );
    let table = format!(
        "label: gpt\nstart=2048, size=16384, type={LINUX}\nstart=18432, size=16384, type={ROOT}\n"
    );
    let contents = [(MIB, "data"), (9 * MIB, "root")];
    bench.partitioned("a.img", 20 * MIB, &table, &contents);
    let expected = both("/boot/vmlinuz-1", "/boot/initrd.img-1", Some(2));
    assert_eq!(bench.taken("a.img"), expected);
}

#[test]
fn partitions_keep_their_numbers_where_some_are_missing() {
    let bench = Bench::new();
    bench.ext4("root", &["/boot/vmlinuz-1", "/etc/fstab"]);
    for (label, kind) in [("gpt", LINUX), ("dos", "83")] {
        let table = format!("label: {label}\n3: start=2048, size=16384, type={kind}\n");
        bench.partitioned("a.img", 20 * MIB, &table, &[(MIB, "root")]);
        let expected = ("/boot/vmlinuz-1".to_owned(), None, Some(3));
        assert_eq!(bench.taken("a.img"), expected, "{label}");
    }
}

#[test]
fn a_partition_that_is_too_small_for_a_file_system_is_passed_over() {
    let bench = Bench::new();
    bench.ext4("root", &["/boot/vmlinuz-1", "/etc/fstab"]);
    // As boot loaders have it for themselves, of one sector or a few.
    for len in [1, 30] {
        let table =
            format!("label: dos\nstart=34, size={len}, type=da\nstart=2048, size=16384, type=83\n");
        bench.partitioned("a.img", 20 * MIB, &table, &[(MIB, "root")]);
        let expected = ("/boot/vmlinuz-1".to_owned(), None, Some(2));
        assert_eq!(bench.taken("a.img"), expected, "{len}");
    }
}

#[test]
fn logical_partitions_of_an_mbr_are_searched() {
    let bench = Bench::new();
    bench.ext4("data", &["/lost"]);
    bench.ext4("root", &["/boot/vmlinuz-1", "/etc/fstab"]);
    let table = "label: dos\nstart=2048, size=16384, type=83\nstart=18432, type=5\n\
                 start=20480, size=16384, type=83\nstart=38912, size=16384, type=83\n";
    let contents = [(MIB, "data"), (10 * MIB, "data"), (19 * MIB, "root")];
    bench.partitioned("a.img", 32 * MIB, table, &contents);
    let expected = ("/boot/vmlinuz-1".to_owned(), None, Some(6));
    // The fifth is made first, with the first's content.
    assert_eq!(bench.taken("a.img"), expected);
}

#[test]
fn a_partition_of_its_own_for_boot_is_found_and_root_is_another() {
    let bench = Bench::new();
    bench.ext4(
        "boot",
        &["/vmlinuz-6.1.0", "/initrd.img-6.1.0", "/config-6.1.0"],
    );
    // As Debian leaves it: the link's end is on the other partition.
    bench.ext4("root", &["/vmlinuz -> boot/vmlinuz-6.1.0", "/etc/fstab"]);
    for (label, kind) in [("gpt", LINUX), ("dos", "83")] {
        let table = format!(
            "label: {label}\nstart=2048, size=16384, type={kind}\n\
             start=18432, size=16384, type={kind}\n"
        );
        let contents = [(MIB, "boot"), (9 * MIB, "root")];
        bench.partitioned("a.img", 20 * MIB, &table, &contents);
        let expected = both("/vmlinuz-6.1.0", "/initrd.img-6.1.0", Some(2));
        assert_eq!(bench.taken("a.img"), expected, "{label}");
    }
}

#[test]
fn a_root_that_cannot_be_told_is_refused_where_it_is_asked_for() {
    let bench = Bench::new();
    bench.ext4("boot", &["/vmlinuz-6.1.0"]);
    let table = "label: dos\nstart=2048, size=16384, type=83\nstart=18432, type=83\n";
    bench.partitioned("a.img", 20 * MIB, table, &[(MIB, "boot")]);
    assert_eq!(
        bench.refused("a.img"),
        "error: `root` is true, but no partition of `a.img` can be told to be the root\n\
         help: remove `root`, and name the partition: `cmdline = \"root=/dev/vdaN\"`"
    );
    let disk = Blk::open(bench.options("a.img", "sparse-raw")).unwrap();
    let files = super::read(&disk.handle(), &bench.block("a.img", "")).unwrap();
    assert_eq!(taken(files).0, "/vmlinuz-6.1.0");
}

#[test]
fn a_table_counts_in_the_disk_s_blocks() {
    let bench = Bench::new();
    bench.ext4("root", &["/boot/vmlinuz-1", "/etc/fstab"]);
    let table = format!("label: gpt\nstart=2048, size=16384, type={ROOT}\n");
    bench.partitioned("a.img", 20 * MIB, &table, &[(MIB, "root")]);
    let disk = Blk::open(bench.options("a.img", "sparse-raw")).unwrap();
    let block = bench.block("a.img", "block_size = 4096");
    let error = super::read(&disk.handle(), &block).err().unwrap();
    let said = error.to_string();
    assert!(
        said.contains("counts in sectors of 512 bytes, the disk in 4096"),
        "{said}"
    );
    assert!(said.contains("help: write `block_size = 512`"), "{said}");
}

#[test]
fn every_format_is_read_with_its_backing_files_and_what_was_just_written() {
    let bench = Bench::new();
    bench.ext4("base.img", &["/boot/vmlinuz-1", "/boot/initrd.img-1"]);
    bench.run(
        "qemu-img",
        &["convert", "-O", "qcow2", "-c", "base.img", "base.qcow2"],
    );
    let overlay = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        "base.qcow2",
        "top.qcow2",
    ];
    bench.run("qemu-img", &overlay);
    let mut options = bench.options("top.qcow2", "qcow2");
    options.image.backing = vec![bench.path("base.qcow2")];
    let disk = Blk::open(options).unwrap();
    let files = super::read(&disk.handle(), &bench.block("top.qcow2", "root = true")).unwrap();
    assert_eq!(
        taken(files),
        both("/boot/vmlinuz-1", "/boot/initrd.img-1", None)
    );
    let mut options = bench.options("base.img", "sparse-raw");
    options.ephemeral = true;
    let disk = Blk::open(options).unwrap();
    let files = super::read(&disk.handle(), &bench.block("base.img", "")).unwrap();
    assert_eq!(taken(files).0, "/boot/vmlinuz-1");
}

#[test]
fn old_and_small_file_systems_are_read_too() {
    let bench = Bench::new();
    let files = ["/boot/vmlinuz-1", "/boot/initrd.img-1"];
    for (image, options) in [
        (
            "ext2",
            vec!["-O", "^extents,^has_journal,^metadata_csum,^64bit"],
        ),
        ("small blocks", vec!["-b", "1024"]),
        ("large inodes", vec!["-I", "512", "-O", "^metadata_csum"]),
    ] {
        bench.ext4_with(image, &files, &options);
        let expected = both("/boot/vmlinuz-1", "/boot/initrd.img-1", None);
        assert_eq!(bench.taken(image), expected, "{image}");
    }
}

#[test]
fn a_file_system_without_a_kernel_is_refused_with_what_was_looked_for() {
    let bench = Bench::new();
    bench.ext4("a.img", &["/boot/config-1", "/etc/fstab"]);
    assert_eq!(
        bench.refused("a.img"),
        "error: `a.img` has no kernel: neither /vmlinuz nor /boot/vmlinuz-* is in its file \
         system\nhelp: install a kernel in it (Debian: `apt install linux-image-amd64`), or name \
         one of the host with `kernel`"
    );
}

#[test]
fn another_file_system_is_named() {
    let bench = Bench::new();
    for (offset, magic, name) in [
        (0, &b"XFSB"[..], "it is XFS"),
        (65600, b"_BHRfS_M", "it is Btrfs"),
        (0, b"LUKS\xba\xbe", "it is encrypted (LUKS)"),
        (0, b"nothing", "it is none that launcher knows"),
    ] {
        let file = fs::File::create(bench.path("a.img")).unwrap();
        file.set_len(MIB).unwrap();
        file.write_all_at(magic, offset).unwrap();
        assert_eq!(
            bench.refused("a.img"),
            format!(
                "error: `a.img` has no ext4 file system to take a kernel from: {name}\nhelp: write \
                 `kernel` and `initrd` instead of `from_block`: copies of those in the guest's \
                 /boot"
            )
        );
    }
    let table = "label: gpt\nstart=2048, size=2048\nstart=4096, size=2048\n";
    bench.partitioned("a.img", 4 * MIB, table, &[]);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(bench.path("a.img"))
        .unwrap();
    file.write_all_at(b"FAT32", MIB + 82).unwrap();
    file.write_all_at(b"XFSB", 2 * MIB).unwrap();
    let said = bench.refused("a.img");
    assert!(
        said.contains("partition 1 is FAT, partition 2 is XFS"),
        "{said}"
    );
}

#[test]
fn what_is_too_large_to_boot_is_refused() {
    let bench = Bench::new();
    bench.ext4("a.img", &["/boot/vmlinuz-1"]);
    let file = fs::File::create(bench.path("a.img.tree/boot/vmlinuz-2")).unwrap();
    file.set_len(257 * MIB).unwrap();
    fs::remove_file(bench.path("a.img")).unwrap();
    bench.run(
        "mke2fs",
        &["-q", "-t", "ext4", "-d", "a.img.tree", "a.img", "8M"],
    );
    assert_eq!(
        bench.refused("a.img"),
        "error: the kernel /boot/vmlinuz-2 of `a.img` is 257 MiB, expected at most 256 MiB"
    );
}

#[test]
fn links_that_lead_in_circles_are_refused() {
    let bench = Bench::new();
    bench.ext4(
        "a.img",
        &["/vmlinuz -> initrd.img", "/initrd.img -> vmlinuz"],
    );
    let said = bench.refused("a.img");
    let expected = "error: cannot read /vmlinuz of `a.img`: too many levels of symbolic links\n";
    assert!(said.starts_with(expected), "{said}");
}

#[test]
fn damage_is_refused_by_name() {
    let bench = Bench::new();
    bench.ext4("root", &["/boot/vmlinuz-1", "/etc/fstab"]);
    let damaged = |offset: u64, bytes: &[u8]| {
        fs::copy(bench.path("root"), bench.path("a.img")).unwrap();
        let file = fs::OpenOptions::new()
            .write(true)
            .open(bench.path("a.img"))
            .unwrap();
        file.write_all_at(bytes, offset).unwrap();
        bench.refused("a.img")
    };
    for (offset, bytes, what) in [
        (1024 + 0x18, &[7][..], "its block size is 1 KiB << 7"),
        (
            1024 + 4,
            &[0xff; 4],
            "more than the 8388608 bytes that it lies in",
        ),
        (1024 + 0x20, &[0; 4], "its block groups have 0 blocks each"),
        (1024 + 0x58, &[1, 0], "its inodes have 1 bytes"),
        (1024 + 0x70, &[1, 2, 3], "checksum"),
    ] {
        let said = damaged(offset, bytes);
        assert!(
            said.contains("the ext4 file system of `a.img` is damaged: "),
            "{said}"
        );
        assert!(said.contains(what), "{said}");
        assert!(said.ends_with(REPAIR), "{said}");
    }
    let table = format!("label: gpt\nstart=2048, size=16384, type={ROOT}\n");
    for (offset, what) in [
        (512 + 72, "has a header whose checksum is wrong"),
        (1024, "has entries whose checksum is wrong"),
        (512, "has no header"),
    ] {
        bench.partitioned("b.img", 20 * MIB, &table, &[(MIB, "root")]);
        let file = fs::OpenOptions::new()
            .write(true)
            .open(bench.path("b.img"))
            .unwrap();
        file.write_all_at(&[0xa5], offset).unwrap();
        let said = bench.refused("b.img");
        let expected =
            format!("error: the partition table of `b.img` is damaged: its GPT {what}\n");
        assert!(said.starts_with(&expected), "{said}");
    }
}

#[test]
fn a_list_of_logical_partitions_without_an_end_is_refused() {
    let bench = Bench::new();
    let table = "label: dos\nstart=2048, type=5\nstart=4096, size=2048, type=83\n";
    bench.partitioned("a.img", 8 * MIB, table, &[]);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(bench.path("a.img"))
        .unwrap();
    // The second entry of the table at the start of the extended one: that table again.
    let mut entry = [0; 16];
    entry[4] = 5;
    entry[8] = 1;
    entry[12] = 1;
    file.write_all_at(&entry, MIB + 462).unwrap();
    let mut sector = [0; 512];
    file.write_all_at(&entry, MIB + 512 + 462).unwrap();
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&sector[510..], MIB + 512 + 510).unwrap();
    assert_eq!(
        bench.refused("a.img"),
        "error: the partition table of `a.img` is damaged: its list of logical partitions has no \
         end\nhelp: repair it with sfdisk or sgdisk"
    );
}

#[test]
fn a_guest_that_was_killed_leaves_a_journal_that_is_no_obstacle() {
    let bench = Bench::new();
    for options in [&[][..], &["-O", "^metadata_csum"]] {
        bench.ext4_with("a.img", &["/boot/vmlinuz-1"], options);
        bench.run("debugfs", &["-w", "-R", "feature needs_recovery", "a.img"]);
        assert_eq!(bench.taken("a.img").0, "/boot/vmlinuz-1");
    }
}

/// Whatever is on a disk: an answer, in time.
#[test]
fn mutated_images_are_read_or_refused() {
    let bench = Bench::new();
    bench.ext4_with(
        "seed",
        &[
            "/boot/vmlinuz-1",
            "/boot/initrd.img-1",
            "/vmlinuz -> boot/vmlinuz-1",
            "/etc/fstab",
        ],
        &[
            "-b",
            "1024",
            "-O",
            "^metadata_csum,^has_journal",
            "-N",
            "64",
        ],
    );
    let seed = fs::read(bench.path("seed")).unwrap();
    // Where there is something to change.
    let used: Vec<_> = (1024..seed.len()).filter(|at| seed[*at] != 0).collect();
    // A small xorshift: the same images in every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    let block = bench.block("a.img", "");
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..300 {
        let mut image = seed.clone();
        for _ in 0..1 + random() % 4 {
            let at = used[random() % used.len()] + random() % 4;
            image[at] = random() as u8;
        }
        fs::write(bench.path("a.img"), image).unwrap();
        let disk = Blk::open(bench.options("a.img", "sparse-raw")).unwrap();
        match read_patiently(&disk.handle(), &block, Duration::from_secs(2)) {
            Ok(_) => taken += 1,
            Err(error) => {
                assert_eq!(error.exit, exit::USAGE, "{error}");
                refused += 1;
            }
        }
    }
    assert!(taken > 0 && refused > 0, "{taken} taken, {refused} refused");
}

/// A directory of two million blocks, which are all one, in a tree of nodes that are read once:
/// its reader asks for nothing new.
#[test]
fn a_file_system_that_is_built_to_keep_its_reader_busy_is_given_up() {
    let bench = Bench::new();
    let options = [
        "-b",
        "4096",
        "-O",
        "^metadata_csum,^has_journal,^dir_index,^64bit",
    ];
    bench.ext4_with("a.img", &["/a"], &options);
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(bench.path("a.img"))
        .unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from(u32::from_le_bytes(bytes))
    };
    // The root's inode is the second in the first group's table.
    let inode = number(4096 + 8) * 4096 + 256;
    let content = number(inode + 40 + 12 + 8) as u32;
    let node = |depth: u16, count: u16, child: u32| {
        let mut bytes = Vec::new();
        for field in [0xf30a, count, count, depth, 0, 0] {
            bytes.extend(u16::to_le_bytes(field));
        }
        for _ in 0..count {
            // An entry of a leaf: block 0 of the file, 1 block, there. Of a node: the child.
            let [second, third] = match depth {
                0 => [1, child],
                _ => [child, 0],
            };
            bytes.extend(
                [0, second, third]
                    .iter()
                    .flat_map(|it: &u32| it.to_le_bytes()),
            );
        }
        bytes
    };
    let size = 2_000_000_u64 * 4096;
    for (at, bytes) in [
        (inode + 4, (size as u32).to_le_bytes().to_vec()),
        (inode + 108, ((size >> 32) as u32).to_le_bytes().to_vec()),
        (inode + 40, node(3, 4, 2000)),
        (2000 * 4096, node(2, 340, 2001)),
        (2001 * 4096, node(1, 340, 2002)),
        (2002 * 4096, node(0, 340, content)),
    ] {
        file.write_all_at(&bytes, at).unwrap();
    }
    let disk = Blk::open(bench.options("a.img", "sparse-raw")).unwrap();
    let block = bench.block("a.img", "");
    let error = read_patiently(&disk.handle(), &block, Duration::from_secs(1));
    let error = error.err().unwrap();
    assert_eq!(error.exit, exit::USAGE);
    let said = error.to_string();
    assert!(said.contains("is damaged: it leads in circles\n"), "{said}");
}
