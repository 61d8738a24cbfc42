//! Front ends and guests that mean harm, or are broken: they lose their connection, and that is all.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost::VhostBackend;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::*;
use crate::messages::*;
use crate::{Folder, MIB, Server};

/// The server is as it was.
pub(crate) fn expect_sound(server: &Server) {
    let mut guest = Guest::new(1);
    let _front = guest.attach(&server.socket);
    assert!(guest.read(9, 512) == [9; 512]);
}

/// A request, and its content.
type Message = (u32, Vec<u8>);

fn region(guest: u64, len: u64, user: u64, offset: u64) -> Vec<u8> {
    words(&[0, guest, len, user, offset])
}

#[test]
fn a_message_that_makes_no_sense_ends_its_connection() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", MIB);
    let before = fs::read(&image).unwrap();
    let server = folder.serve(&["disk.img"]);
    let memory = memfd(1 << 20);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let (zero, (one, other)) = (
        File::open("/dev/zero").unwrap(),
        UnixStream::pair().unwrap(),
    );
    let (pipe, _pipe) = rustix::pipe::pipe().unwrap();
    let read_only = File::open(&image).unwrap();
    let m = memory.as_raw_fd();
    let (e, z, s) = (event.as_raw_fd(), zero.as_raw_fd(), one.as_raw_fd());
    let (p, t, r) = (pipe.as_raw_fd(), other.as_raw_fd(), read_only.as_raw_fd());
    let add = |guest, len, user, offset| (ADD_MEM_REG, region(guest, len, user, offset));
    let state = |request, index, num| (request, words(&[pair(index, num)]));
    let inflight = |len, offset, queues: u16, size: u16| {
        let last = u64::from(queues) | u64::from(size) << 16;
        words(&[len, offset, last])
    };
    let cases: &[(Message, &[RawFd])] = &[
        ((0, vec![]), &[]),
        ((999, vec![]), &[]),
        ((SET_OWNER, words(&[1])), &[]),
        ((SET_OWNER, vec![]), &[e]),
        ((SET_FEATURES, vec![1, 2, 3, 4]), &[]),
        ((SET_FEATURES, words(&[FEATURES | 1 << 63])), &[]),
        ((SET_FEATURES, words(&[FEATURES | 1 << 26])), &[]),
        ((SET_PROTOCOL_FEATURES, words(&[u64::MAX])), &[]),
        // Virtqueues that there are not, and sizes that none has.
        (state(SET_VRING_NUM, 1, 64), &[]),
        (state(SET_VRING_NUM, u32::MAX, 64), &[]),
        (state(SET_VRING_NUM, 0, 0), &[]),
        (state(SET_VRING_NUM, 0, 3), &[]),
        (state(SET_VRING_NUM, 0, 2048), &[]),
        (state(SET_VRING_NUM, 0, 65536), &[]),
        (state(SET_VRING_BASE, 0, 65536), &[]),
        (state(GET_VRING_BASE, 7, 0), &[]),
        (state(SET_VRING_ENABLE, 0, 2), &[]),
        (state(SET_VRING_ENABLE, 9, 1), &[]),
        ((SET_VRING_ADDR, words(&[0, 8, 0, 0, 0])), &[]),
        ((SET_VRING_ADDR, words(&[pair(0, 4), 0, 0, 0, 0])), &[]),
        ((SET_VRING_KICK, words(&[0])), &[]),
        ((SET_VRING_KICK, words(&[0])), &[z]),
        ((SET_VRING_KICK, words(&[0])), &[p]),
        ((SET_VRING_KICK, words(&[0])), &[e, e]),
        ((SET_VRING_KICK, words(&[0x100])), &[]),
        ((SET_VRING_KICK, words(&[3])), &[e]),
        ((SET_VRING_CALL, words(&[0])), &[m]),
        ((SET_VRING_CALL, words(&[9])), &[e]),
        // Memory.
        (add(0, 1 << 20, 0, 0), &[]),
        (add(0, 1 << 20, 0, 0), &[m, m]),
        (add(0, 0, 0, 0), &[m]),
        (add(0, 1 << 21, 0, 0), &[m]),
        (add(0, 1 << 62, 0, 0), &[m]),
        (add(u64::MAX - 5, 1 << 20, 0, 0), &[m]),
        (add(0, 1 << 20, u64::MAX - 5, 0), &[m]),
        (add(0, 1 << 20, 0, u64::MAX - 5), &[m]),
        (add(0, 1 << 12, 0, 17), &[m]),
        (add(0, 1 << 12, 0, 0), &[z]),
        (add(0, 1 << 12, 0, 0), &[p]),
        (add(0, 1 << 12, 0, 0), &[r]),
        ((REM_MEM_REG, region(0, 1 << 20, 0, 0)), &[]),
        ((SET_MEM_TABLE, words(&[0])), &[]),
        ((SET_MEM_TABLE, words(&[1, 0, 1 << 20, 0, 0])), &[]),
        ((SET_MEM_TABLE, words(&[2, 0, 1 << 20, 0, 0])), &[m, m]),
        ((SET_MEM_TABLE, words(&[200])), &[m]),
        (
            (SET_MEM_TABLE, words(&[2, 0, 4096, 0, 0, 0, 4096, 0, 0])),
            &[m, m],
        ),
        // The configuration space, and other descriptors.
        ((GET_CONFIG, words(&[pair(0xfff, 0x1000), 0])), &[]),
        ((GET_CONFIG, words(&[pair(0, 8)])), &[]),
        ((GET_INFLIGHT_FD, inflight(0, 0, u16::MAX, u16::MAX)), &[]),
        ((GET_INFLIGHT_FD, inflight(0, 0, 0, 0)), &[]),
        ((SET_INFLIGHT_FD, inflight(1 << 20, 0, 1, 64)), &[m]),
        ((SET_INFLIGHT_FD, inflight(1 << 20, 0, 1, 64)), &[z]),
        ((SET_INFLIGHT_FD, inflight(1 << 20, 0, 1, 64)), &[]),
        ((SET_INFLIGHT_FD, inflight(0, u64::MAX, 9, 64)), &[m]),
        ((SET_BACKEND_REQ_FD, vec![]), &[]),
        ((SET_BACKEND_REQ_FD, vec![]), &[e]),
        ((SET_BACKEND_REQ_FD, vec![]), &[s, t]),
        ((SET_BACKEND_REQ_FD, words(&[1])), &[s]),
    ];
    for ((request, body), files) in cases {
        let raw = Raw::negotiated(&server.socket);
        raw.send(*request, body, files);
        raw.expect_hang_up(&format!("request {request}: {body:?}"));
    }
    for bytes in [
        &[1u32, 1, u32::MAX][..],
        &[1, 1, 4097],
        &[1, 0, 0],
        &[1, 2, 0],
        &[1, 5, 0],
        &[1, 0x11, 0],
        &[u32::MAX; 3],
    ] {
        let raw = Raw::connect(&server.socket);
        let bytes: Vec<u8> = bytes.iter().flat_map(|word| word.to_ne_bytes()).collect();
        raw.send_bytes(&bytes, &[]);
        raw.expect_hang_up(&format!("{bytes:?}"));
    }
    // What was not negotiated.
    for request in [SET_BACKEND_REQ_FD, ADD_MEM_REG, GET_INFLIGHT_FD, GET_CONFIG] {
        let raw = Raw::connect(&server.socket);
        raw.send(request, &[], &[]);
        raw.expect_hang_up(&format!("request {request}"));
    }
    expect_sound(&server);
    let said = server.end();
    assert!(said.contains("the front end is disconnected: "), "{said}");
    // However many there are, the log is no flood.
    assert!(said.lines().count() < 30, "{said}");
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn a_message_with_more_files_than_any_has_ends_its_connection() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    for (request, body) in [(SET_OWNER, vec![]), (SET_VRING_CALL, words(&[0]))] {
        let raw = Raw::negotiated(&server.socket);
        raw.send(request, &body, &[event.as_raw_fd(); 33]);
        raw.expect_hang_up(&format!("request {request}"));
    }
    expect_sound(&server);
    let said = server.end();
    assert!(said.contains("the files of a message"), "{said}");
}

#[test]
fn a_front_end_that_stops_in_the_middle_holds_nothing_up() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    for bytes in [&[1u8, 0, 0][..], &[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 5]] {
        let raw = Raw::connect(&server.socket);
        raw.send_bytes(bytes, &[]);
        drop(raw);
        expect_sound(&server);
    }
    let raw = Raw::connect(&server.socket);
    raw.send_bytes(&[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 5], &[]);
    std::thread::sleep(Duration::from_millis(50));
    // It is still there, and the server ends.
    server.end();
    drop(raw);
}

#[test]
fn a_front_end_that_reads_no_answer_holds_nothing_up() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let stream = UnixStream::connect(&server.socket).unwrap();
    stream.set_nonblocking(true).unwrap();
    let header = [GET_FEATURES, 1, 0].map(u32::to_ne_bytes);
    let mut refused = 0;
    while refused < 20 {
        use std::io::Write;
        if (&stream).write(header.as_flattened()).is_err() {
            refused += 1;
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    server.end();
}

/// Bytes of memory that a process has.
pub(crate) fn resident(server: &Server) -> u64 {
    let path = format!("/proc/{}/statm", server.child.id());
    let text = fs::read_to_string(path).unwrap();
    let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn files(server: &Server) -> usize {
    let path = format!("/proc/{}/fd", server.child.id());
    fs::read_dir(path).unwrap().count()
}

#[test]
fn a_flood_takes_no_memory_and_no_files() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    expect_sound(&server);
    let (memory_before, files_before) = (resident(&server), files(&server));
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    for _ in 0..50 {
        let raw = Raw::negotiated(&server.socket);
        for _ in 0..400 {
            raw.send(SET_VRING_CALL, &words(&[0]), &[event.as_raw_fd()]);
            raw.send(SET_VRING_NUM, &words(&[pair(0, 64)]), &[]);
        }
    }
    let memory = memfd(1 << 20);
    let raw = Raw::negotiated(&server.socket);
    for at in 0..1000u64 {
        let body = region(at << 12, 1 << 12, at << 12, 0);
        raw.send(ADD_MEM_REG, &body, &[memory.as_raw_fd()]);
    }
    raw.expect_hang_up("memory without end");
    expect_sound(&server);
    // The last front end may still be leaving.
    for _ in 0..100 {
        if files(&server) <= files_before {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(files(&server) <= files_before);
    assert!(resident(&server) < memory_before + (16 << 20));
    server.end();
}

#[test]
fn rings_outside_the_memory_shared_end_the_connection() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let memory = memfd(1 << 20);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    // The table, the used and the available ring.
    for (table, used, available) in [
        (1 << 21, 0x2000, 0x1000),
        (0, 0x2000, (1 << 20) - 4),
        (0, (1 << 20) - 4, 0x1000),
        ((1 << 20) - 16, 0x2000, 0x1000),
        (u64::MAX - 15, 0x2000, 0x1000),
        (0, u64::MAX - 3, 0x1000),
    ] {
        let raw = Raw::negotiated(&server.socket);
        let body = region(0, 1 << 20, 0, 0);
        raw.send(ADD_MEM_REG, &body, &[memory.as_raw_fd()]);
        raw.send(SET_VRING_NUM, &words(&[pair(0, 64)]), &[]);
        let body = words(&[0, table, used, available, 0]);
        raw.send(SET_VRING_ADDR, &body, &[]);
        raw.send(SET_VRING_KICK, &words(&[0]), &[event.as_raw_fd()]);
        raw.send(SET_VRING_ENABLE, &words(&[pair(0, 1)]), &[]);
        raw.expect_hang_up(&format!("{table:#x} {used:#x} {available:#x}"));
    }
    // No memory at all, no size, and no addresses.
    let raw = Raw::negotiated(&server.socket);
    raw.send(SET_VRING_KICK, &words(&[0]), &[event.as_raw_fd()]);
    raw.send(SET_VRING_ENABLE, &words(&[pair(0, 1)]), &[]);
    raw.expect_hang_up("no memory");
    expect_sound(&server);
    server.end();
}

#[test]
fn memory_that_is_taken_away_ends_the_connection() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", MIB);
    let before = fs::read(&image).unwrap();
    let server = folder.serve(&["disk.img"]);
    for len in [0, 0x1000, 0x2000, 0x3000, DATA_BEGINS] {
        let mut guest = Guest::new(1);
        let front = guest.attach(&server.socket);
        assert!(guest.read(9, 512) == [9; 512]);
        for slot in 0..SLOTS {
            guest.offer(0, slot, IN, u64::from(slot), 4096);
        }
        ftruncate(&guest.file, len).unwrap();
        guest.kick(0);
        // Whatever is done with it, there is an end.
        std::thread::sleep(Duration::from_millis(30));
        drop(front);
        expect_sound(&server);
    }
    let said = server.end();
    assert!(said.contains("its memory has become shorter"), "{said}");
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn records_of_others_are_no_flood_of_the_log() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    for forged in [false, true] {
        let mut guest = Guest::new(1);
        let mut front = guest.attach_recording(&server.socket);
        let record = guest.record();
        let end = record.metadata().unwrap().len() - 64;
        // The record of unflushed writes: of nobody who is known, or of a server that was killed.
        let words = match forged {
            true => [u64::from_le_bytes(*b"unflush\x01"), 5],
            false => [0, 0],
        };
        record
            .write_all_at(words.map(u64::to_le_bytes).as_flattened(), end)
            .unwrap();
        for _ in 0..300 {
            guest.record_again(&mut front);
        }
    }
    let said = server.end();
    let about = |what: &str| said.matches(what).count();
    assert!(about("is another program's") > 0, "{said}");
    assert!(said.lines().count() < 30, "{said}");
}

const DATA_BEGINS: u64 = 0x1_0000;

#[test]
fn a_record_of_requests_in_flight_that_is_made_of_huge_pages_is_refused() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    // The host may have none left: then an access is a SIGBUS, however long the file is.
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    let huge = memfd_create("huge", flags).unwrap();
    ftruncate(&huge, 2 * MIB).unwrap();
    fcntl_add_seals(&huge, SealFlags::SHRINK).unwrap();
    let raw = Raw::negotiated(&server.socket);
    let place = words(&[4096, 0, 1 | 64 << 16]);
    raw.send(SET_INFLIGHT_FD, &place, &[huge.as_raw_fd()]);
    raw.expect_hang_up("a record of huge pages");
    expect_sound(&server);
    server.end();
}

#[test]
fn a_broken_ring_is_told_and_others_are_served_after_it() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let front = guest.attach(&server.socket);
    let error = EventFd::new(0).unwrap();
    front.frontend.set_vring_err(0, &error).unwrap();
    // More than the virtqueue holds.
    let index = GuestAddress(AVAILABLE + 2);
    guest.memory.write_obj(0x8000u16, index).unwrap();
    guest.kick(0);
    assert_eq!(error.read().unwrap(), 1);
    drop(front);
    expect_sound(&server);
    let said = server.end();
    assert!(said.contains("device needs reset"), "{said}");
}

#[test]
fn chains_that_are_loops_or_point_outside_are_refused_one_by_one() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", MIB);
    let before = fs::read(&image).unwrap();
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let front = guest.attach(&server.socket);
    let table = |guest: &Guest, at: u64, address: u64, len: u32, flags: u16, next: u16| {
        let at = GuestAddress(at * 16);
        guest.memory.write_obj(address, at).unwrap();
        let rest = GuestAddress(at.0 + 8);
        guest.memory.write_obj(len, rest).unwrap();
        let rest = GuestAddress(at.0 + 12);
        guest.memory.write_obj([flags, next], rest).unwrap();
    };
    for (address, len, flags, next) in [
        (0x3000, 16, 1, 60),
        (0x3000, 16, 1, 9999),
        (u64::MAX - 3, 16, 0, 0),
        (1 << 40, 512, 2, 0),
        (MEMORY as u64 - 8, 512, 2, 0),
        (0x3000, u32::MAX, 2, 0),
        (0x3000, 16, 4, 0),
        (u64::MAX - 3, 32, 4, 0),
    ] {
        table(&guest, 60, address, len, flags, next);
        guest.publish(0, 60);
        guest.kick(0);
        guest.wait(0);
        assert!(guest.read(5, 512) == [5; 512]);
    }
    drop(front);
    server.end();
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn messages_at_random_end_nothing_but_connections() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", MIB);
    let before = fs::read(&image).unwrap();
    let server = folder.serve(&["disk.img", "--ro", "--queues", "2"]);
    let memory = memfd(1 << 20);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let (one, _other) = UnixStream::pair().unwrap();
    let files = [memory.as_raw_fd(), event.as_raw_fd(), one.as_raw_fd()];
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for _ in 0..300 {
        let raw = Raw::negotiated(&server.socket);
        raw.send(ADD_MEM_REG, &region(0, 1 << 20, 0, 0), &files[..1]);
        for _ in 0..random(40) {
            let request = [8, 9, 10, 11, 12, 13, 14, 18, 24, 31, 37, 38, 5, 2, 34, 21];
            let request = request[random(16) as usize];
            let value = |random: &mut dyn FnMut(u64) -> u64| match random(5) {
                0 => pair(random(3) as u32, 1 << random(11)),
                1 => random(16) << 12,
                2 => 1 << random(64),
                3 => 0,
                _ => pair(random(2) as u32, random(2) as u32),
            };
            let count = match request {
                9 => 5,
                37 | 38 => 5,
                31 => 3,
                34 | 21 => 0,
                5 => 5,
                _ => 1,
            };
            let body: Vec<_> = (0..count).map(|_| value(&mut random)).collect();
            let sent = match random(4) {
                0 => &files[..0],
                _ if matches!(request, 12..=14) => &files[1..2],
                _ if matches!(request, 37 | 5) => &files[..1],
                _ if request == 21 => &files[2..],
                _ => &files[..0],
            };
            raw.send(request, &words(&body), sent);
        }
    }
    let mut guest = Guest::new(2);
    let _front = guest.attach(&server.socket);
    assert!(guest.read(9, 512) == [9; 512]);
    server.end();
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn eventfds_that_are_read_or_filled_by_the_front_end_hold_nothing_up() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    for flags in [0, EFD_NONBLOCK] {
        let mut guest = Guest::new(1);
        let front = guest.attach(&server.socket);
        let kick = EventFd::new(flags).unwrap();
        let call = EventFd::new(flags).unwrap();
        call.write(u64::MAX - 1).unwrap();
        front.frontend.set_vring_call(0, &call).unwrap();
        front.frontend.set_vring_kick(0, &kick).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Whatever wakes the server by this eventfd may be taken before it looks.
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = kick.write(1);
                    let _ = kick.read();
                }
            });
            for slot in 0..SLOTS {
                guest.offer(0, slot, IN, 0, 512);
                kick.write(1).unwrap();
            }
            std::thread::sleep(Duration::from_millis(20));
            drop(front);
            expect_sound(&server);
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            kick.write(1).unwrap();
        });
    }
    server.end();
}
