//! What a guest does with its disk.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::sync::{Arc, Mutex};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{FrontendReqHandler, VhostUserFrontend, VhostUserFrontendReqHandlerMut};
use vm_memory::Bytes;

use crate::guest::*;
use crate::messages::*;
use crate::{Folder, MIB, bytes, done};

/// A segment of a discard or write-zeroes request.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

#[test]
fn a_guest_reads_writes_and_flushes() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", 4 * MIB);
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let mut front = guest.attach(&server.socket);
    assert_eq!(front.capacity(), 4 * MIB / 512);
    assert_eq!(guest.read(9, 1024), [[9; 512], [10; 512]].concat());
    guest.write(100, &[0xab; 8192]);
    assert_eq!(guest.read(100, 8192), [0xab; 8192]);
    assert_eq!(guest.read(116, 512), [116; 512]);
    guest.flush();
    assert_eq!(bytes(&image, 100, 8192), [0xab; 8192]);
    // Past the end, and what no disk does.
    assert_eq!(guest.request(0, IN, 4 * MIB / 512, &[0; 512]).0, 1);
    assert_eq!(guest.request(0, 77, 0, &[0; 512]).0, 2);
    drop(front);
    let said = server.end();
    assert_eq!(said.matches("guest error").count(), 2, "{said}");
    assert_eq!(said.lines().count(), 2, "{said}");
}

#[test]
fn a_guest_discards_and_writes_zeroes() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", 4 * MIB);
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let _front = guest.attach(&server.socket);
    let before = fs::metadata(&image).unwrap().blocks();
    assert_eq!(guest.request(0, DISCARD, 0, &range(2048, 2048, 0)).0, 0);
    assert!(fs::metadata(&image).unwrap().blocks() <= before - 2000);
    let (status, _) = guest.request(0, WRITE_ZEROES, 0, &range(10, 3, 0));
    assert_eq!(status, 0);
    let zeroed = guest.read(9, 5 * 512);
    assert_eq!(
        zeroed,
        [[9; 512], [0; 512], [0; 512], [0; 512], [13; 512]].concat()
    );
    server.end();
}

#[test]
fn a_disk_has_the_id_block_size_and_queues_of_its_options() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&[
        "disk.img",
        "--id",
        "ROOT",
        "--block-size",
        "4096",
        "--queues",
        "3",
        "--ro",
    ]);
    let mut guest = Guest::new(3);
    let mut front = guest.attach(&server.socket);
    let (status, id) = guest.request(2, GET_ID, 0, &[0xff; 20]);
    assert_eq!((status, &id[..5]), (0, &b"ROOT\0"[..]));
    assert_eq!(front.config(20, 4), 4096u32.to_le_bytes());
    assert_eq!(front.config(34, 2), 3u16.to_le_bytes());
    // VIRTIO_BLK_F_RO, VIRTIO_BLK_F_MQ.
    assert_eq!(front.features & (1 << 5 | 1 << 12), 1 << 5 | 1 << 12);
    assert_eq!(guest.request(1, OUT, 0, &[1; 4096]).0, 1);
    for index in 0..3 {
        assert_eq!(guest.request(index, IN, 8, &[0; 4096]).1[..512], [8; 512]);
    }
    server.end();
}

#[test]
fn virtqueues_are_served_at_once_and_independently() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", 8 * MIB);
    let server = folder.serve(&["disk.img", "--queues", "4", "--o-direct"]);
    let mut guest = Guest::new(4);
    let front = guest.attach(&server.socket);
    for round in 0..20u64 {
        for slot in 0..SLOTS {
            for index in 0..4 {
                let number = u64::from(slot) * 4 + index as u64;
                let data = [(number + round) as u8; 4096];
                guest
                    .memory
                    .write_slice(&data, Guest::data(index, slot))
                    .unwrap();
                guest.offer(index, slot, OUT, number * 8, 4096);
            }
        }
        (0..4).for_each(|index| guest.kick(index));
        for index in 0..4 {
            let mut slots: Vec<_> = (0..SLOTS).map(|_| guest.wait(index)).collect();
            slots.sort_unstable();
            assert_eq!(slots, (0..SLOTS).map(|slot| (slot, 0)).collect::<Vec<_>>());
        }
        for number in 0..u64::from(SLOTS) * 4 {
            assert_eq!(
                bytes(&image, number * 8, 4096),
                [(number + round) as u8; 4096]
            );
        }
    }
    // One that is stopped is not served, and says where it is; the others are.
    let base = front.frontend.get_vring_base(1).unwrap();
    assert_eq!(base, 20 * u32::from(SLOTS));
    guest.offer(1, 0, IN, 0, 512);
    guest.kick(1);
    assert_eq!(guest.request(0, IN, 0, &[0; 512]).0, 0);
    assert_eq!(guest.used(1), None);
    server.end();
}

#[derive(Default)]
struct Told(u32);

impl VhostUserFrontendReqHandlerMut for Told {
    fn handle_config_change(&mut self) -> std::io::Result<u64> {
        self.0 += 1;
        Ok(0)
    }
}

#[test]
fn a_new_size_is_told_to_the_guest() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let text =
        |size| format!("[boot]\nkernel = 'k'\n[[block]]\npath = 'disk.img'\nsize = '{size}'\n");
    fs::write(folder.path("vm.toml"), text("1MiB")).unwrap();
    let mut server = folder.serve(&["vm.toml", "0"]);
    let mut guest = Guest::new(1);
    let mut front = guest.attach(&server.socket);
    let told = Arc::new(Mutex::new(Told::default()));
    let mut channel = FrontendReqHandler::new(Arc::clone(&told)).unwrap();
    struct Fd(std::os::fd::RawFd);
    impl std::os::fd::AsRawFd for Fd {
        fn as_raw_fd(&self) -> std::os::fd::RawFd {
            self.0
        }
    }
    let fd = Fd(channel.get_tx_raw_fd());
    front.frontend.set_backend_request_fd(&fd).unwrap();

    fs::write(folder.path("vm.toml"), text("3MiB")).unwrap();
    server.signal(Signal::HUP);
    channel.handle_request().unwrap();
    assert_eq!(told.lock().unwrap().0, 1);
    assert_eq!(server.line(), "the disk has grown from 1MiB to 3MiB\n");
    assert_eq!(front.capacity(), 3 * MIB / 512);
    guest.write(3 * MIB / 512 - 1, &[7; 512]);

    fs::write(folder.path("vm.toml"), text("2MiB")).unwrap();
    server.signal(Signal::HUP);
    assert!(server.line().contains("is not made as small as 2MiB"));
    assert_eq!(front.capacity(), 3 * MIB / 512);
    drop(front);
    server.end();
    let last = bytes(&folder.path("disk.img"), 3 * MIB / 512 - 1, 512);
    assert_eq!(last, [7; 512]);
}

#[test]
fn a_look_at_the_size_that_takes_long_holds_nothing_else_up() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    // Nobody writes it: to open it takes for ever.
    fs::remove_file(&image).unwrap();
    mknodat(CWD, &image, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    for _ in 0..3 {
        server.signal(Signal::HUP);
        let raw = Raw::negotiated(&server.socket);
        assert_eq!(raw.ask(GET_QUEUE_NUM, &[], &[]), [1]);
    }
    server.end();
}

#[test]
fn a_qcow2_image_with_a_backing_file_is_served() {
    let folder = Folder::new();
    let base = folder.raw("base.img", 4 * MIB);
    let before = fs::read(&base).unwrap();
    folder.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.img",
        "-F",
        "raw",
        "disk.qcow2",
    ]);
    // A backing file that nothing names is not opened.
    let (code, said) = folder.refused(&["disk.qcow2"]);
    assert!(code != 0 && said.contains("backing"), "{said}");
    let vm = "[boot]\nkernel = 'k'\n[[block]]\npath = 'disk.qcow2'\nbacking = ['base.img']\nid = 'ROOT'\n";
    fs::write(folder.path("vm.toml"), vm).unwrap();
    let server = folder.serve(&["vm.toml", "ROOT"]);
    let mut guest = Guest::new(1);
    let front = guest.attach(&server.socket);
    assert_eq!(guest.read(77, 512), [77; 512]);
    for number in 0..32u8 {
        guest.write(u64::from(number) * 200 + 3, &[number; 2048]);
    }
    let beside: Vec<u8> = (200..203).flat_map(|sector| [sector as u8; 512]).collect();
    assert_eq!(guest.read(200, 2048)[..1536], beside);
    drop(front);
    server.end();
    folder.qemu_img(&["check", "-q", "disk.qcow2"]);
    let flat = folder.path("flat.img");
    let mut expected = before.clone();
    for number in 0..32usize {
        expected[(number * 200 + 3) * 512..][..2048].fill(number as u8);
    }
    fs::write(&flat, expected).unwrap();
    folder.qemu_img(&[
        "compare",
        "-q",
        "-f",
        "raw",
        "-F",
        "qcow2",
        "flat.img",
        "disk.qcow2",
    ]);
    assert_eq!(fs::read(&base).unwrap(), before);
}

#[test]
fn what_a_guest_wrote_is_there_when_the_server_ends() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "disk.qcow2", "64M"]);
    let server = folder.serve(&["disk.qcow2"]);
    let mut guest = Guest::new(1);
    let _front = guest.attach(&server.socket);
    guest.write(5000, &[0x5a; 65536]);
    // The front end is still there.
    server.end();
    folder.qemu_img(&["check", "-q", "disk.qcow2"]);
    let mut judge = Command::new("qemu-io");
    let judge = judge.args(["-r", "-f", "qcow2", "-c", "read -P 0x5a 2560000 65536"]);
    let said = done(judge.arg(folder.path("disk.qcow2")));
    assert!(!said.contains("verification failed"), "{said}");
}

#[test]
fn a_driver_may_have_the_cache_written_through() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let mut front = guest.attach(&server.socket);
    assert_eq!(front.config(32, 1), [1]);
    front.write_through();
    assert_eq!(front.config(32, 1), [0]);
    // It holds while virtqueues stop and start.
    front.frontend.set_vring_enable(0, false).unwrap();
    front.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(front.config(32, 1), [0]);
    guest.write(1, &[1; 512]);
    // The next front end has a device that was reset.
    drop(front);
    let mut guest = Guest::new(1);
    let mut front = guest.attach(&server.socket);
    assert_eq!(front.config(32, 1), [1]);
    // While they are stopped, too.
    front.frontend.set_vring_enable(0, false).unwrap();
    front.write_through();
    assert_eq!(front.config(32, 1), [0]);
    front.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(front.config(32, 1), [0]);
    server.end();
}

/// A front end shows the next driver what it was told last, and does not say it again: so do we.
#[test]
fn a_cache_is_written_through_until_somebody_says_otherwise() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let mut front = Front::greet(&server.socket, 1);
    front.write_through();
    assert_eq!(front.config(32, 1), [0]);
    guest.share(&mut front);
    // A driver that knows little, then one that knows all; the second one resets the device.
    let few = front.features & !(1 << 29);
    for features in [few, front.features, front.features] {
        front.frontend.set_features(features).unwrap();
        guest.start(&front);
        assert_eq!(front.config(32, 1), [0]);
        guest.write(1, &[1; 512]);
        front.frontend.get_vring_base(0).unwrap();
        front.frontend.reset_device().unwrap();
        assert_eq!(front.config(32, 1), [0]);
    }
    let flags = VhostUserConfigFlags::empty();
    front.frontend.set_config(32, flags, &[1]).unwrap();
    guest.start(&front);
    assert_eq!(front.config(32, 1), [1]);
    // The next front end has a device of which nothing is known, started or not.
    front.frontend.get_vring_base(0).unwrap();
    front.frontend.set_features(few).unwrap();
    front.write_through();
    drop(front);
    assert_eq!(Front::greet(&server.socket, 1).config(32, 1), [1]);
    server.end();
}
