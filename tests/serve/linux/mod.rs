//! A stock Linux guest under QEMU, whose disk `launcher disk serve` serves: file systems, fio and
//! e2fsck say whether it is one.

mod machine;

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;

use self::machine::Machine;
use crate::kills::sound;
use crate::{Folder, MIB, Server, done};

const SIZE: u64 = 256 * MIB;
const LARGER: u64 = 320 * MIB;

/// Writes a file at random places, 16 at a time, past the page cache; then reads and compares it.
const FIO: &str = "fio --name=job --filename=/mnt/fio --size=64M --bs=4k --rw=randwrite --direct=1 --iodepth=16 \
    --ioengine=io_uring --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=1024 --randrepeat=0 --eta=never --output=/tmp/fio";

/// An image, and how it is served.
struct Case {
    folder: Folder,
    image: &'static str,
    queues: &'static str,
}

impl Case {
    fn new(image: &'static str, queues: &'static str) -> Case {
        let folder = Folder::new();
        let format = if image.ends_with("qcow2") {
            "qcow2"
        } else {
            "raw"
        };
        let size = SIZE.to_string();
        folder.qemu_img(&["create", "-q", "-f", format, image, &size]);
        Case {
            folder,
            image,
            queues,
        }
    }

    fn serve(&self) -> Server {
        self.folder.serve(&[self.image, "--queues", self.queues])
    }

    fn boot(&self) -> Machine {
        let machine = Machine::boot(&self.folder, self.queues.parse().unwrap());
        println!("{} with {} virtqueues: booted", self.image, self.queues);
        machine
    }

    fn is_raw(&self) -> bool {
        self.image.ends_with("img")
    }

    /// The disk as a raw image; a qcow2 one is found in order before.
    fn judged(&self) -> PathBuf {
        if self.is_raw() {
            return self.folder.path(self.image);
        }
        sound(&self.folder.path(self.image));
        let to = ["-f", "qcow2", "-O", "raw", self.image, "judged.img"];
        self.folder.qemu_img(&[&["convert"], &to[..]].concat());
        self.folder.path("judged.img")
    }
}

/// Its file system is in order, as the host's e2fsck sees it.
fn check(image: &Path) {
    done(Command::new("/sbin/e2fsck").arg("-fn").arg(image));
}

/// The SHA-256 digest of a file in the file system of an image.
fn digest(folder: &Folder, image: &Path, name: &str) -> String {
    let copy = folder.path("copy");
    let request = format!("dump {name} {}", copy.display());
    done(
        Command::new("/sbin/debugfs")
            .args(["-R", &request])
            .arg(image),
    );
    let said = done(Command::new("sha256sum").arg(&copy));
    said.split(' ').next().unwrap().into()
}

/// Makes a file system, works it and fills it, with the guest's e2fsck content in between; the digest of
/// a file that is left there.
fn work(machine: &mut Machine) -> String {
    machine.done("/usr/sbin/mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    machine.done(FIO);
    machine.done("umount /mnt && /usr/sbin/e2fsck -fn /dev/vda && mount /dev/vda /mnt");
    let fill = "dd if=/dev/urandom of=/mnt/file bs=1M count=16 2>/dev/null && sha256sum /mnt/file && umount /mnt";
    let said = machine.done(fill);
    said.split(' ').next().unwrap().into()
}

/// What a guest has on a disk is there afterwards, on the host.
fn works(image: &'static str, queues: &'static str) {
    let case = Case::new(image, queues);
    let server = case.serve();
    let mut machine = case.boot();
    let expected = work(&mut machine);
    if case.is_raw() {
        let file = std::fs::File::options()
            .write(true)
            .open(case.folder.path(image))
            .unwrap();
        file.set_len(LARGER).unwrap();
        server.signal(Signal::HUP);
        let larger = LARGER.to_string();
        machine.until("blockdev --getsize64 /dev/vda", |said| said == larger);
    }
    drop(machine);
    let said = server.end();
    assert_eq!(said.contains("the disk has grown"), case.is_raw(), "{said}");
    assert_eq!(said.lines().count(), usize::from(case.is_raw()), "{said}");
    let image = case.judged();
    check(&image);
    assert_eq!(digest(&case.folder, &image, "/file"), expected);
}

#[test]
fn a_linux_guest_has_a_file_system_on_a_raw_image_which_grows() {
    works("disk.img", "1");
}

#[test]
fn a_linux_guest_has_a_file_system_on_a_qcow2_image_with_a_virtqueue_a_processor() {
    works("disk.qcow2", "2");
}

/// What fio at work came to while three servers were killed.
struct Killed {
    /// The one that serves now.
    server: Server,
    /// fio's exit code, and what it says.
    code: i32,
    fio: String,
    /// What the killed ones said.
    servers: String,
}

/// Has servers killed while the guest's fio writes, each with thousands of writes of its own.
fn kills(case: &Case, mut server: Server, machine: &mut Machine) -> Killed {
    machine.done("/usr/sbin/mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt");
    machine.done(&format!("({FIO}; echo $? >/tmp/code) &"));
    // Sectors, as long as fio is at work.
    let written = "[ -e /tmp/code ] && echo over || awk '{ print $7 }' /sys/block/vda/stat";
    let mut servers = String::new();
    for _ in 0..3 {
        let before: u64 = machine.done(written).trim().parse().unwrap_or(u64::MAX);
        machine.until(written, |said| match said.parse::<u64>() {
            Ok(sectors) => sectors > before.saturating_add(8000),
            Err(_) => said == "over",
        });
        servers += &server.kill();
        server = case.serve();
    }
    machine.until("cat /tmp/code", |said| said.parse::<i32>().is_ok());
    Killed {
        server,
        code: machine.done("cat /tmp/code").trim().parse().unwrap(),
        fio: machine.done("cat /tmp/fio"),
        servers,
    }
}

#[test]
fn a_linux_guest_on_a_raw_image_notices_nothing_of_servers_that_are_killed() {
    let case = Case::new("disk.img", "2");
    let server = case.serve();
    let mut machine = case.boot();
    let killed = kills(&case, server, &mut machine);
    assert_eq!(killed.code, 0, "{}\n{}", killed.fio, machine.console());
    machine.done("umount /mnt && /usr/sbin/e2fsck -fn /dev/vda");
    let console = machine.console();
    assert!(!console.contains("I/O error"), "{console}");
    drop(machine);
    assert_eq!(killed.servers, "");
    assert_eq!(killed.server.end(), "");
    check(&case.judged());
}

#[test]
fn a_linux_guest_on_a_qcow2_image_has_all_of_its_writes_or_an_error() {
    let case = Case::new("disk.qcow2", "1");
    let server = case.serve();
    let mut machine = case.boot();
    let killed = kills(&case, server, &mut machine);
    let console = machine.console();
    let told = console.contains("I/O error");
    println!("fio ended with {}, the guest was told: {told}", killed.code);
    if told {
        machine.run("umount /mnt");
    } else {
        assert_eq!(killed.code, 0, "{}\n{console}", killed.fio);
        machine.done("umount /mnt && /usr/sbin/e2fsck -fn /dev/vda");
    }
    // Nothing stays wrong: a guest that begins anew has a disk as any other.
    let expected = work(&mut machine);
    drop(machine);
    let said = killed.servers + &killed.server.end();
    assert_eq!(said.contains("flush failed"), told, "{said}\n{console}");
    let image = case.judged();
    check(&image);
    assert_eq!(digest(&case.folder, &image, "/file"), expected);
}
