//! Front ends that send what they like: messages in any order, with numbers and files that make sense now and
//! then, and guests whose rings hold anything. The server is as it was, and no larger.

use std::os::fd::{AsRawFd, RawFd};

use formats::conformance::Random;
use vm_memory::{Bytes, GuestAddress};

use crate::Folder;
use crate::MIB;
use crate::guest::*;
use crate::hostile::{expect_sound, resident};
use crate::messages::*;

/// A number that is often at an edge.
fn number(random: &mut Random) -> u64 {
    match random.below(6) {
        0 => 0,
        1 => 1 << random.below(64),
        2 => u64::MAX - random.below(4),
        3 => random.number(),
        _ => random.below(128),
    }
}

#[test]
fn front_ends_that_send_anything_leave_a_server_that_serves() {
    let folder = Folder::new();
    folder.raw("disk.img", MIB);
    let server = folder.serve(&["disk.img", "--ro"]);
    let mut random = Random::new(2026);
    expect_sound(&server);
    let before = resident(&server);
    for session in 0..600 {
        let guest = Guest::new(1);
        for _ in 0..200 {
            let at = GuestAddress(random.below(0x4000) & !7);
            guest.memory.write_obj(number(&mut random), at).unwrap();
        }
        let region = guest.region();
        let rings = guest.rings(0);
        let inflight = memfd(MIB);
        let [kick, call] = guest.events(0);
        let files = [guest.file.as_raw_fd(), kick, call, inflight.as_raw_fd()];
        let raw = Raw::negotiated(&server.socket);
        // Most begin as they should, and are served.
        if random.chance(70) {
            let [table, used, available] = [
                rings.desc_table_addr,
                rings.used_ring_addr,
                rings.avail_ring_addr,
            ];
            let memory = [0, 0, MEMORY as u64, region.userspace_addr, 0];
            raw.send(ADD_MEM_REG, &words(&memory), &[files[0]]);
            raw.send(SET_VRING_NUM, &words(&[pair(0, SIZE.into())]), &[]);
            let areas = [0, table, used, available, 0];
            raw.send(SET_VRING_ADDR, &words(&areas), &[]);
            raw.send(SET_VRING_CALL, &words(&[0]), &[call]);
            raw.send(SET_VRING_KICK, &words(&[0]), &[kick]);
            raw.send(SET_VRING_ENABLE, &words(&[pair(0, 1)]), &[]);
            assert_eq!(raw.ask(GET_QUEUE_NUM, &[], &[]), [1]);
            guest.kick(0);
        }
        for _ in 0..random.below(60) {
            // A message as it should be, of which sometimes something is not.
            let index = if random.chance(90) {
                0
            } else {
                number(&mut random)
            };
            let state = |num: u64| vec![index as u32 as u64 | num << 32];
            let (request, mut body, file): (u32, Vec<u64>, Option<RawFd>) = match random.below(14) {
                0 => (SET_FEATURES, vec![FEATURES], None),
                1 | 2 => (
                    ADD_MEM_REG,
                    vec![0, 0, MEMORY as u64, region.userspace_addr, 0],
                    Some(files[0]),
                ),
                3 => (
                    REM_MEM_REG,
                    vec![0, 0, MEMORY as u64, region.userspace_addr, 0],
                    None,
                ),
                4 => (SET_VRING_NUM, state(SIZE.into()), None),
                5 => (SET_VRING_BASE, state(random.below(4)), None),
                6 | 7 => {
                    let [table, used, available] = [
                        rings.desc_table_addr,
                        rings.used_ring_addr,
                        rings.avail_ring_addr,
                    ];
                    (SET_VRING_ADDR, vec![index, table, used, available, 0], None)
                }
                8 | 9 => (SET_VRING_KICK, vec![index], Some(kick)),
                10 => (SET_VRING_CALL, vec![index], Some(call)),
                11 => (SET_VRING_ENABLE, state(random.below(2)), None),
                12 => (GET_VRING_BASE, state(0), None),
                _ => (
                    random.below(45) as u32,
                    vec![number(&mut random); random.below(6) as usize],
                    None,
                ),
            };
            if random.chance(8) && !body.is_empty() {
                let at = random.below(body.len() as u64) as usize;
                body[at] = number(&mut random);
            }
            let file = if random.chance(4) {
                Some(random.of(&files))
            } else {
                file
            };
            raw.send(request, &words(&body), file.as_slice());
            if random.chance(30) {
                guest.kick(0);
            }
        }
        drop(raw);
        if session % 25 == 0 {
            expect_sound(&server);
        }
    }
    expect_sound(&server);
    let grown = resident(&server).saturating_sub(before);
    assert!(grown < 32 * MIB, "{grown}");
    server.end();
}
