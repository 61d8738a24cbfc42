//! Servers that are killed, and what a guest that goes on with the next one still has. What it was
//! told is done is there, or a flush fails.

use std::fs;
use std::path::Path;
use std::process::Command;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::guest::*;
use crate::{Folder, MIB, Server, bytes};

const IOERR: u8 = 1;
/// Sectors of a cluster.
const CLUSTER: u64 = 128;

fn qcow2(folder: &Folder) {
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "disk.qcow2", "64M"]);
}

/// Sound, as `qemu-img` sees it; space that nothing uses is what a kill may leave behind.
pub(crate) fn sound(image: &Path) {
    let mut judge = Command::new("qemu-img");
    let output = judge.args(["check", "-q"]).arg(image).output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
}

fn flush(guest: &mut Guest) -> u8 {
    guest.request(0, FLUSH, 0, &[]).0
}

/// The same image in the next server, after the one before was killed.
fn next(folder: &Folder, guest: &mut Guest, image: &str) -> (Server, Front) {
    let server = folder.serve(&[image]);
    let front = guest.attach_recording(&server.socket);
    (server, front)
}

#[test]
fn a_server_of_a_raw_image_that_is_killed_takes_nothing_with_it() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", 4 * MIB);
    let mut guest = Guest::new(1);
    for round in 1..8u8 {
        let (server, _front) = next(&folder, &mut guest, "disk.img");
        for number in 0..32 {
            guest.write(u64::from(number) * CLUSTER, &[round ^ number; 4096]);
        }
        server.kill();
        for number in 0..32 {
            let found = bytes(&image, u64::from(number) * CLUSTER, 4096);
            assert!(found == [round ^ number; 4096], "{round} {number}");
        }
    }
    let (server, front) = next(&folder, &mut guest, "disk.img");
    guest.flush();
    drop(front);
    assert_eq!(server.end(), "");
}

#[test]
fn a_server_of_a_qcow2_image_that_is_killed_with_writes_fails_one_flush_of_the_next() {
    let folder = Folder::new();
    qcow2(&folder);
    let mut guest = Guest::new(1);
    for round in 1..6u8 {
        let (mut server, front) = next(&folder, &mut guest, "disk.qcow2");
        let first = u64::from(round) * 8 * CLUSTER;
        for number in 0..8 {
            guest.write(first + number * CLUSTER, &[round; 4096]);
        }
        server.kill();
        drop(front);
        sound(&folder.path("disk.qcow2"));

        let front;
        (server, front) = next(&folder, &mut guest, "disk.qcow2");
        let said = server.line();
        assert!(said.contains("the server before was killed"), "{said}");
        assert_eq!(flush(&mut guest), IOERR);
        let said = server.line();
        assert!(said.contains("flush failed: "), "{said}");
        assert_eq!(flush(&mut guest), 0);
        // Written again and flushed, it stays.
        for number in 0..8 {
            guest.write(first + number * CLUSTER, &[round; 4096]);
        }
        guest.flush();
        server.kill();
        drop(front);
        sound(&folder.path("disk.qcow2"));
        let front;
        (server, front) = next(&folder, &mut guest, "disk.qcow2");
        for number in 0..8 {
            assert!(guest.read(first + number * CLUSTER, 4096) == [round; 4096]);
        }
        assert_eq!(flush(&mut guest), 0);
        drop(front);
        assert_eq!(server.end(), "");
    }
}

#[test]
fn a_server_of_a_qcow2_image_that_is_killed_with_everything_in_place_fails_nothing() {
    let folder = Folder::new();
    qcow2(&folder);
    let mut guest = Guest::new(1);
    let (server, front) = next(&folder, &mut guest, "disk.qcow2");
    guest.write(0, &[1; 8192]);
    guest.flush();
    guest.write(0, &[2; 4096]);
    server.kill();
    drop(front);
    let (server, front) = next(&folder, &mut guest, "disk.qcow2");
    assert!(guest.read(0, 4096) == [2; 4096]);
    assert_eq!(flush(&mut guest), 0);
    drop(front);
    assert_eq!(server.end(), "");
}

#[test]
fn a_loss_that_the_guest_was_not_told_of_is_told_however_many_servers_are_killed() {
    let folder = Folder::new();
    qcow2(&folder);
    let mut guest = Guest::new(1);
    for _ in 0..4 {
        let (server, _front) = next(&folder, &mut guest, "disk.qcow2");
        guest.write(0, &[1; 4096]);
        server.kill();
    }
    let (server, front) = next(&folder, &mut guest, "disk.qcow2");
    // Neither does a connection that is made again make a server forget.
    drop(front);
    let front = guest.attach_recording(&server.socket);
    assert_eq!(flush(&mut guest), IOERR);
    assert_eq!(flush(&mut guest), 0);
    drop(front);
    server.end();
}

#[test]
fn a_server_that_ends_as_it_should_or_sees_its_front_end_go_loses_nothing() {
    let folder = Folder::new();
    qcow2(&folder);
    let mut guest = Guest::new(1);
    // Ended while the front end is there.
    let (server, front) = next(&folder, &mut guest, "disk.qcow2");
    guest.write(0, &[1; 4096]);
    assert_eq!(server.end(), "");
    drop(front);
    // Killed after the front end has gone, and has come back.
    let (server, front) = next(&folder, &mut guest, "disk.qcow2");
    assert!(guest.read(0, 4096) == [1; 4096]);
    assert_eq!(flush(&mut guest), 0);
    guest.write(CLUSTER, &[2; 4096]);
    drop(front);
    let front = guest.attach_recording(&server.socket);
    server.kill();
    drop(front);
    let (server, front) = next(&folder, &mut guest, "disk.qcow2");
    assert!(guest.read(CLUSTER, 4096) == [2; 4096]);
    assert_eq!(flush(&mut guest), 0);
    drop(front);
    assert_eq!(server.end(), "");
}

#[test]
fn virtqueues_that_stop_and_start_forget_nothing_that_is_unflushed() {
    let folder = Folder::new();
    qcow2(&folder);
    let mut guest = Guest::new(1);
    let restart = |front: &mut Front| {
        front.frontend.set_vring_enable(0, false).unwrap();
        front.frontend.set_vring_enable(0, true).unwrap();
    };
    // Flushed after it, so nothing is lost: neither with a server that ends,
    let (server, mut front) = next(&folder, &mut guest, "disk.qcow2");
    guest.write(0, &[1; 4096]);
    restart(&mut front);
    guest.flush();
    assert_eq!(server.end(), "");
    drop(front);
    // nor with one that is killed.
    let (server, mut front) = next(&folder, &mut guest, "disk.qcow2");
    assert_eq!(flush(&mut guest), 0);
    guest.write(CLUSTER, &[2; 4096]);
    restart(&mut front);
    guest.flush();
    server.kill();
    drop(front);
    let (server, mut front) = next(&folder, &mut guest, "disk.qcow2");
    assert_eq!(flush(&mut guest), 0);
    assert!(guest.read(CLUSTER, 4096) == [2; 4096]);
    // Not flushed after it: lost.
    guest.write(2 * CLUSTER, &[3; 4096]);
    restart(&mut front);
    server.kill();
    drop(front);
    let (server, front) = next(&folder, &mut guest, "disk.qcow2");
    assert_eq!(flush(&mut guest), IOERR);
    assert_eq!(flush(&mut guest), 0);
    drop(front);
    server.end();
}

#[test]
fn what_a_front_end_without_a_record_has_written_is_flushed_when_it_goes() {
    let folder = Folder::new();
    qcow2(&folder);
    let mut guest = Guest::new(1);
    let server = folder.serve(&["disk.qcow2"]);
    let front = guest.attach(&server.socket);
    guest.write(0, &[1; 4096]);
    drop(front);
    // The next one is served when that is done.
    let front = guest.attach(&server.socket);
    server.kill();
    drop(front);
    let server = folder.serve(&["disk.qcow2"]);
    let front = guest.attach(&server.socket);
    assert!(guest.read(0, 4096) == [1; 4096]);
    drop(front);
    assert_eq!(server.end(), "");
}

#[test]
fn a_guest_that_writes_through_before_it_is_ready_loses_nothing_with_a_server() {
    let folder = Folder::new();
    qcow2(&folder);
    let mut guest = Guest::new(1);
    let server = folder.serve(&["disk.qcow2"]);
    // As QEMU does it, which tells the features when the driver is ready.
    let mut front = Front::greet(&server.socket, 1);
    front.write_through();
    front.accept();
    guest.share(&mut front);
    guest.start(&front);
    guest.write(0, &[9; 4096]);
    server.kill();
    drop(front);
    let (server, front) = next(&folder, &mut guest, "disk.qcow2");
    assert!(guest.read(0, 4096) == [9; 4096]);
    drop(front);
    assert_eq!(server.end(), "");
}

#[test]
fn a_guest_that_writes_through_loses_nothing_with_a_server() {
    let folder = Folder::new();
    qcow2(&folder);
    let mut guest = Guest::new(1);
    let (server, mut front) = next(&folder, &mut guest, "disk.qcow2");
    front.write_through();
    for number in 0..8 {
        guest.write(number * CLUSTER, &[9; 4096]);
    }
    server.kill();
    drop(front);
    let (server, front) = next(&folder, &mut guest, "disk.qcow2");
    for number in 0..8 {
        assert!(guest.read(number * CLUSTER, 4096) == [9; 4096]);
    }
    assert_eq!(flush(&mut guest), 0);
    drop(front);
    assert_eq!(server.end(), "");
}

/// QEMU says it once, and shows its guest what it said.
#[test]
fn a_guest_that_writes_through_does_so_with_the_next_servers_too() {
    let folder = Folder::new();
    qcow2(&folder);
    let mut guest = Guest::new(1);
    let (mut server, mut front) = next(&folder, &mut guest, "disk.qcow2");
    front.write_through();
    for number in 0..4u8 {
        server.kill();
        drop(front);
        (server, front) = next(&folder, &mut guest, "disk.qcow2");
        assert_eq!(front.config(32, 1), [0]);
        if number > 0 {
            assert!(guest.read(u64::from(number - 1) * CLUSTER, 4096) == [number - 1; 4096]);
        }
        guest.write(u64::from(number) * CLUSTER, &[number; 4096]);
    }
    // A front end that says otherwise is believed, and the one after it too.
    let flags = VhostUserConfigFlags::empty();
    front.frontend.set_config(32, flags, &[1]).unwrap();
    drop(front);
    let mut front = guest.attach_recording(&server.socket);
    assert_eq!(front.config(32, 1), [1]);
    drop(front);
    assert_eq!(server.end(), "");
}

#[test]
fn what_an_ephemeral_disk_was_given_is_lost_with_its_server_flushed_or_not() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let file = "[boot]\nkernel = \"vmlinuz\"\n[[block]]\npath = \"disk.img\"\nephemeral = true\n";
    fs::write(folder.path("vm.toml"), file).unwrap();
    let mut guest = Guest::new(1);
    let server = folder.serve(&["vm.toml", "0"]);
    let front = guest.attach_recording(&server.socket);
    guest.write(0, &[1; 512]);
    guest.flush();
    server.kill();
    drop(front);
    let server = folder.serve(&["vm.toml", "0"]);
    let front = guest.attach_recording(&server.socket);
    assert_eq!(flush(&mut guest), IOERR);
    assert_eq!(flush(&mut guest), 0);
    drop(front);
    server.end();
}

#[test]
fn a_record_of_another_program_s_server_is_taken_and_said_to_tell_less() {
    let folder = Folder::new();
    qcow2(&folder);
    let mut guest = Guest::new(1);
    // As libvhost-user makes it: nothing behind the virtqueues.
    let file = rustix::fs::memfd_create(
        "other",
        rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING,
    );
    let file = fs::File::from(file.unwrap());
    file.set_len(16 + 16 * u64::from(SIZE) + 48).unwrap();
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::SHRINK).unwrap();
    guest.record_in(file);
    let (server, front) = next(&folder, &mut guest, "disk.qcow2");
    guest.write(0, &[1; 4096]);
    guest.flush();
    assert!(guest.read(0, 4096) == [1; 4096]);
    drop(front);
    let said = server.end();
    assert!(said.contains("is another program's"), "{said}");
}
