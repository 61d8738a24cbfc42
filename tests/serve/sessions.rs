//! Front ends that come and go, and servers that are killed.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::*;
use crate::messages::*;
use crate::{Folder, MIB, bytes};

#[test]
fn when_a_front_end_goes_the_next_one_is_served() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    for number in 0..20 {
        let mut guest = Guest::new(1);
        let _front = guest.attach(&server.socket);
        guest.write(number, &[0xee; 512]);
        if number > 0 {
            assert_eq!(guest.read(number - 1, 512), [0xee; 512]);
        }
    }
    assert_eq!(server.end(), "");
}

#[test]
fn a_second_front_end_waits_for_the_first_to_go() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let mut first = Guest::new(1);
    let front = first.attach(&server.socket);
    let socket = server.socket.clone();
    let second = std::thread::spawn(move || {
        let mut second = Guest::new(1);
        let _front = second.attach(&socket);
        second.read(3, 512)
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(!second.is_finished());
    assert_eq!(first.read(5, 512), [5; 512]);
    drop(front);
    assert_eq!(second.join().unwrap(), [3; 512]);
    server.end();
}

/// Makes a write of 4 KiB available in each slot; the data tells round and slot.
fn offer_writes(guest: &mut Guest, round: u8) {
    for slot in 0..SLOTS {
        let data = [round ^ (slot as u8) << 4; 4096];
        guest
            .memory
            .write_slice(&data, Guest::data(0, slot))
            .unwrap();
        guest.offer(0, slot, OUT, u64::from(slot) * 8, 4096);
    }
    guest.kick(0);
}

/// Waits for those of them that are not answered yet.
fn finish_writes(guest: &mut Guest, mut answered: Vec<u16>) {
    while answered.len() < usize::from(SLOTS) {
        let (slot, status) = guest.wait(0);
        assert_eq!(status, 0);
        answered.push(slot);
    }
    answered.sort_unstable();
    // Each was answered once.
    assert_eq!(answered, (0..SLOTS).collect::<Vec<_>>());
    assert_eq!(guest.wait_for(0, Duration::from_millis(1)), None);
}

fn expect_writes(read: impl Fn(u64) -> Vec<u8>, round: u8) {
    for slot in 0..SLOTS {
        let data = [round ^ (slot as u8) << 4; 4096];
        assert!(read(u64::from(slot) * 8) == data, "slot {slot}");
    }
}

#[test]
fn what_is_in_flight_when_a_front_end_goes_is_answered_before_the_next_one() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img", "--o-direct"]);
    let mut guest = Guest::new(1);
    let mut front = guest.attach(&server.socket);
    for round in 1..50 {
        offer_writes(&mut guest, round);
        // Gone without a word; the guest goes on, and its memory stays.
        drop(front);
        front = guest.attach(&server.socket);
        guest.kick(0);
        finish_writes(&mut guest, Vec::new());
        expect_writes(|sector| bytes(&image, sector, 4096), round);
    }
    drop(front);
    assert_eq!(server.end(), "");
}

/// Kills servers while writes are in flight; each time the next one answers the rest of them.
fn kills(folder: &Folder, image: &str) {
    let mut guest = Guest::new(1);
    let mut server = folder.serve(&[image]);
    let mut front = guest.attach_recording(&server.socket);
    // From here on a qcow2 image has all the clusters that are written.
    offer_writes(&mut guest, 0);
    finish_writes(&mut guest, Vec::new());
    guest.flush();
    for round in 1..25u8 {
        offer_writes(&mut guest, round);
        std::thread::sleep(Duration::from_micros(u64::from(round) * 60));
        server.kill();
        drop(front);
        let mut answered = Vec::new();
        while let Some(slot) = guest.used(0) {
            answered.push(slot);
        }
        server = folder.serve(&[image]);
        front = guest.attach_recording(&server.socket);
        finish_writes(&mut guest, answered);
        for slot in 0..SLOTS {
            let data = [round ^ (slot as u8) << 4; 4096];
            let read = guest.read(u64::from(slot) * 8, 4096);
            assert!(read == data, "round {round} slot {slot}: {}", read[0]);
        }
    }
    drop(front);
    server.end();
}

#[test]
fn what_is_in_flight_when_a_server_is_killed_is_done_by_the_next_one() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", MIB);
    kills(&folder, "disk.img");
    assert_eq!(bytes(&image, 200, 512), [200; 512]);
}

#[test]
fn a_killed_server_of_a_qcow2_image_leaves_it_whole() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "disk.qcow2", "64M"]);
    kills(&folder, "disk.qcow2");
    let mut judge = std::process::Command::new("qemu-img");
    let judge = judge.args(["check", "-q"]).arg(folder.path("disk.qcow2"));
    let output = judge.output().unwrap();
    // 3: space that nothing uses, which is what a kill may leave behind.
    let code = output.status.code();
    assert!(matches!(code, Some(0 | 3)), "{output:?}");
}

#[test]
fn requests_are_resumed_in_the_order_in_which_they_were_taken() {
    let folder = Folder::new();
    let image = folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let front = guest.attach_recording(&server.socket);
    // Stopped: what comes now is not taken by this server.
    assert_eq!(front.frontend.get_vring_base(0).unwrap(), 0);
    drop(front);
    // As if a server had taken the first three of four, one of which it has answered in the used
    // ring, but has not said so in its record; and then it was killed.
    for slot in 0..4 {
        let data = [0xd0 + slot as u8; 512];
        guest
            .memory
            .write_slice(&data, Guest::data(0, slot))
            .unwrap();
        guest.offer(0, slot, OUT, 40 + u64::from(slot), 512);
    }
    let record = guest.record();
    let state = |head: u64| 16 + 16 * head;
    for (counter, slot) in [(7u64, 1u64), (5, 2), (6, 0)] {
        record.write_all_at(&[1], state(slot * 3)).unwrap();
        let counter = counter.to_le_bytes();
        record.write_all_at(&counter, state(slot * 3) + 8).unwrap();
    }
    record.write_all_at(&0u16.to_le_bytes(), 12).unwrap();
    let used = [0u32, 1];
    guest
        .memory
        .write_obj(used, vm_memory::GuestAddress(USED + 4))
        .unwrap();
    guest
        .memory
        .write_obj(1u16, vm_memory::GuestAddress(USED + 2))
        .unwrap();

    let front = guest.attach_recording(&server.socket);
    let order: Vec<_> = (0..4).map(|_| guest.wait(0).0).collect();
    assert_eq!(order[0], 0);
    let mut rest = order[1..].to_vec();
    rest.sort_unstable();
    assert_eq!(rest, [1, 2, 3]);
    // The one that was answered was not done again.
    assert_eq!(bytes(&image, 40, 512), [40; 512]);
    for slot in 1..4 {
        assert_eq!(bytes(&image, 40 + slot, 512), [0xd0 + slot as u8; 512]);
    }
    assert_eq!(front.frontend.get_vring_base(0).unwrap(), 4);
    server.end();
}

#[test]
fn memory_comes_and_goes_while_requests_are_served() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let mut front = guest.attach(&server.socket);
    assert!(front.frontend.get_max_mem_slots().unwrap() >= 8);
    let more = Guest::new(0);
    for round in 0..20 {
        for slot in 0..SLOTS {
            guest.offer(0, slot, IN, u64::from(slot) + round, 512);
        }
        guest.kick(0);
        let mut region = more.region();
        region.guest_phys_addr = 1 << 32;
        front.frontend.add_mem_region(&region).unwrap();
        front.frontend.remove_mem_region(&region).unwrap();
        for _ in 0..SLOTS {
            let (slot, status) = guest.wait(0);
            assert_eq!(status, 0);
            let mut data = [0; 512];
            guest
                .memory
                .read_slice(&mut data, Guest::data(0, slot))
                .unwrap();
            assert_eq!(data, [slot as u8 + round as u8; 512]);
        }
    }
    // The whole table at once, as front ends without memory slots do.
    front.frontend.set_mem_table(&[guest.region()]).unwrap();
    assert_eq!(guest.read(9, 512), [9; 512]);
    server.end();
}

/// A driver that sleeps until it is interrupted hangs if one interrupt is lost.
#[test]
fn virtqueues_that_stop_and_start_lose_no_interrupt() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img", "--o-direct", "--queues", "2"]);
    let mut guest = Guest::new(2);
    let mut front = guest.attach(&server.socket);
    let more = Guest::new(0);
    let mut region = more.region();
    region.guest_phys_addr = 1 << 32;
    for round in 0..100u8 {
        offer_writes(&mut guest, round);
        std::thread::sleep(Duration::from_micros(u64::from(round % 7) * 40));
        let frontend = &mut front.frontend;
        match round % 5 {
            0 => {
                frontend.add_mem_region(&region).unwrap();
                frontend.remove_mem_region(&region).unwrap();
            }
            1 => drop(frontend.set_mem_table(&[guest.region()]).unwrap()),
            2 => {
                frontend.set_vring_enable(0, false).unwrap();
                frontend.set_vring_enable(0, true).unwrap();
            }
            3 => frontend.set_vring_num(1, SIZE).unwrap(),
            _ => {
                frontend.set_vring_enable(1, false).unwrap();
                frontend.set_vring_enable(1, true).unwrap();
            }
        }
        // It has not looked at the used ring since it said that it wants to be told of the next.
        assert!(guest.is_called(0, Duration::from_secs(20)), "round {round}");
        finish_writes(&mut guest, Vec::new());
    }
    drop(front);
    assert_eq!(server.end(), "");
}

/// A front end with memory slots exchanges a region so.
#[test]
fn a_virtqueue_whose_memory_is_taken_away_waits_until_it_is_there_again() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img", "--o-direct"]);
    let mut guest = Guest::new(1);
    let mut front = guest.attach(&server.socket);
    let region = guest.region();
    let more = Guest::new(0);
    let mut beside = more.region();
    beside.guest_phys_addr = 1 << 32;
    for round in 1..20 {
        offer_writes(&mut guest, round);
        front.frontend.remove_mem_region(&region).unwrap();
        let mut answered = Vec::new();
        while let Some(slot) = guest.used(0) {
            answered.push(slot);
        }
        // Another change does not hurt it.
        front.frontend.add_mem_region(&beside).unwrap();
        front.frontend.remove_mem_region(&beside).unwrap();
        guest.kick(0);
        assert_eq!(guest.used(0), None);
        front.frontend.add_mem_region(&region).unwrap();
        finish_writes(&mut guest, answered);
        expect_writes(
            |sector| bytes(&folder.path("disk.img"), sector, 4096),
            round,
        );
    }
    // It can be stopped meanwhile, and says where it is.
    front.frontend.remove_mem_region(&region).unwrap();
    let base = front.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, 19 * u32::from(SLOTS));
    // Whoever starts one there makes a mistake.
    let events = guest.events(0);
    drop(front);
    let raw = Raw::negotiated(&server.socket);
    let rings = guest.rings(0);
    let areas = [
        rings.desc_table_addr,
        rings.used_ring_addr,
        rings.avail_ring_addr,
    ];
    raw.send(SET_VRING_NUM, &words(&[pair(0, SIZE.into())]), &[]);
    raw.send(
        SET_VRING_ADDR,
        &words(&[0, areas[0], areas[1], areas[2], 0]),
        &[],
    );
    raw.send(SET_VRING_KICK, &words(&[0]), &events[..1]);
    raw.send(SET_VRING_ENABLE, &words(&[pair(0, 1)]), &[]);
    raw.expect_hang_up("a ring in no memory");
    let said = server.end();
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn a_device_that_was_reset_begins_anew() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let mut front = guest.attach_recording(&server.socket);
    guest.write(4, &[0xaa; 512]);
    front.frontend.reset_device().unwrap();
    guest.offer(0, 0, IN, 4, 512);
    guest.kick(0);
    assert_eq!(guest.wait_for(0, Duration::from_millis(50)), None);
    guest.start(&front);
    assert_eq!(guest.wait(0), (0, 0));
    assert_eq!(guest.read(4, 512), [0xaa; 512]);
    server.end();
}

#[test]
fn messages_come_in_the_order_in_which_qemu_sends_them() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    let mut guest = Guest::new(1);
    let qemu = Raw::connect(&server.socket);
    let offered = qemu.ask(GET_FEATURES, &[], &[])[0];
    let protocol = qemu.ask(GET_PROTOCOL_FEATURES, &[], &[])[0];
    qemu.send(SET_PROTOCOL_FEATURES, &words(&[protocol]), &[]);
    assert_eq!(qemu.ask(GET_QUEUE_NUM, &[], &[]), [1]);
    assert!(qemu.ask(GET_MAX_MEM_SLOTS, &[], &[])[0] >= 8);
    // Before any feature of virtio is negotiated, and with an answer.
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let channel = [ours.as_raw_fd()];
    assert_eq!(qemu.ask(SET_BACKEND_REQ_FD, &[], &channel), [0]);
    qemu.send(SET_OWNER, &[], &[]);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let event = [event.as_raw_fd()];
    qemu.send(SET_VRING_CALL, &words(&[0]), &event);
    qemu.send(SET_VRING_ERR, &words(&[0]), &event);
    let config = [&words(&[pair(0, 60)])[..], &[0; 64]].concat();
    assert_eq!(qemu.ask(GET_CONFIG, &config, &[]).len(), 9);
    // The guest's driver is ready; and later it resets the device, and is ready again.
    for round in 0..3 {
        let features = words(&[offered]);
        assert_eq!(qemu.ask(SET_FEATURES, &features, &[]), [0]);
        let region = guest.region();
        let place = words(&[0, 0, region.memory_size, region.userspace_addr, 0]);
        if round == 0 {
            let memory = [guest.file.as_raw_fd()];
            assert_eq!(qemu.ask(ADD_MEM_REG, &place, &memory), [0]);
        }
        let rings = guest.rings(0);
        let used = guest.load(0, USED + 2);
        qemu.send(SET_VRING_NUM, &words(&[pair(0, SIZE.into())]), &[]);
        qemu.send(SET_VRING_BASE, &words(&[pair(0, used.into())]), &[]);
        let addresses = [
            0,
            rings.desc_table_addr,
            rings.used_ring_addr,
            rings.avail_ring_addr,
            0,
        ];
        qemu.send(SET_VRING_ADDR, &words(&addresses), &[]);
        let [kick, call] = guest.events(0);
        qemu.send(SET_VRING_KICK, &words(&[0]), &[kick]);
        qemu.send(SET_VRING_CALL, &words(&[0]), &[call]);
        let enable = words(&[pair(0, 1)]);
        assert_eq!(qemu.ask(SET_VRING_ENABLE, &enable, &[]), [0]);
        for sector in 0..5 {
            assert!(guest.read(sector, 512) == [sector as u8; 512]);
        }
        let enable = words(&[pair(0, 0)]);
        assert_eq!(qemu.ask(SET_VRING_ENABLE, &enable, &[]), [0]);
        let stopped = qemu.ask(GET_VRING_BASE, &words(&[pair(0, 0)]), &[]);
        assert_eq!(stopped, [pair(0, 5 * (round + 1))]);
        assert_eq!(qemu.ask(RESET_DEVICE, &[], &[]), [0]);
    }
    assert_eq!(server.end(), "");
}

#[test]
fn a_front_end_that_asks_for_nothing_costs_nothing() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img"]);
    // Hundredths of a second of processor time, of its own and of the kernel.
    let spent = || -> u64 {
        let path = format!("/proc/{}/stat", server.child.id());
        let text = std::fs::read_to_string(path).unwrap();
        let (_, after_name) = text.rsplit_once(") ").unwrap();
        let fields: Vec<_> = after_name.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let mut guest = Guest::new(1);
    let _front = guest.attach(&server.socket);
    assert!(guest.read(1, 512) == [1; 512]);
    let before = spent();
    std::thread::sleep(Duration::from_millis(500));
    assert!(spent() - before <= 2);
    server.end();
}
