//! Scripts of front ends that do what they do every day, for a fuzzer to begin with: the files of
//! fuzz/seeds/vhost_user. `UPDATE_SEEDS=1 cargo test --lib serve::fuzzing` writes them.

use std::fs;
use std::path::Path;

use super::guest::{DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES};
use super::messages::*;
use super::run;

/// Of a request's second byte: the chain is an indirect one, and its answer is waited for.
const INDIRECT: u8 = 8;
const AWAITED: u8 = 0x50;
/// Of a message's second byte: an acknowledgement is asked for.
const ACKNOWLEDGED: u8 = 8;

/// First bytes of a script: which server.
const RAW: u8 = 0;
const QCOW2: u8 = 1;
const READ_ONLY: u8 = 3;

/// A server, and the bytes of [`super::front::Front::open`]: how the session begins.
fn open(server: u8, options: u8) -> Vec<u8> {
    vec![server, 0, options, 0, 0]
}

/// Those of a request to a virtqueue.
fn request(queue: u8, how: u8, kind: u32, sector: u8, sectors: u8) -> Vec<u8> {
    let kinds = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES];
    let at = kinds.iter().position(|it| *it == kind).unwrap();
    let kind_byte = [0, 3, 6, 7, 8, 9][at];
    let head = [0x60, queue, how | AWAITED, kind_byte, sector, 0];
    let rest: &[u8] = match kind {
        FLUSH | GET_ID => &[0],
        DISCARD | WRITE_ZEROES => &[0, sectors, 0],
        _ => &[sectors, 0, 0],
    };
    [&head, rest].concat()
}

/// Those of a message, with what is particular to it.
fn message(request: u32, how: u8, particular: &[u8]) -> Vec<u8> {
    let at = REQUESTS.iter().position(|it| *it == request).unwrap();
    [&[0, at as u8, how], particular, &[0]].concat()
}

fn seeds() -> [(&'static str, Vec<Vec<u8>>); 8] {
    let read = |queue| request(queue, 0, IN, 5, 8);
    let write = || request(0, 1, OUT, 7, 3);
    let flush = || request(0, 2, FLUSH, 0, 0);
    [
        (
            "read-only",
            vec![open(READ_ONLY, 0), read(0), request(0, INDIRECT, IN, 9, 1)],
        ),
        (
            "requests",
            vec![
                open(RAW, 1),
                read(0),
                write(),
                flush(),
                request(0, 3, GET_ID, 0, 0),
                request(0, 4, DISCARD, 16, 8),
                request(0, 5, WRITE_ZEROES, 8, 8),
            ],
        ),
        (
            "two-virtqueues",
            vec![open(RAW, 4 | 8), read(0), read(1), write()],
        ),
        (
            "stopped-and-started",
            vec![
                open(RAW, 2),
                write(),
                message(GET_VRING_BASE, 0, &[]),
                message(SET_VRING_KICK, ACKNOWLEDGED, &[]),
                read(0),
                flush(),
            ],
        ),
        (
            "requests-in-flight",
            vec![
                open(QCOW2, 0),
                message(GET_INFLIGHT_FD, 0, &[]),
                message(SET_INFLIGHT_FD, 0, &[]),
                write(),
                message(SET_INFLIGHT_FD, 0, &[]),
                flush(),
            ],
        ),
        (
            "memory",
            vec![
                open(RAW, 4),
                read(0),
                message(REM_MEM_REG, 2, &[]),
                message(ADD_MEM_REG, 2, &[]),
                read(0),
                message(SET_MEM_TABLE, 1, &[]),
                write(),
                // It becomes shorter.
                vec![0xe4, 4],
                read(0),
            ],
        ),
        (
            "configuration",
            vec![
                open(RAW, 0),
                message(SET_BACKEND_REQ_FD, 0, &[]),
                message(GET_CONFIG, 0, &[0]),
                message(SET_CONFIG, 1, &[0]),
                write(),
                // The disk grows.
                vec![0xe8, 7],
                request(0, 0, IN, 130, 1),
            ],
        ),
        (
            "reset",
            vec![
                open(RAW, 1),
                read(0),
                message(RESET_DEVICE, ACKNOWLEDGED, &[]),
                message(SET_VRING_NUM, 0, &[]),
                message(SET_VRING_ADDR, 0, &[]),
                message(SET_VRING_CALL, 0, &[]),
                message(SET_VRING_KICK, 0, &[]),
                message(SET_VRING_ENABLE, 0x10, &[]),
                write(),
            ],
        ),
    ]
}

#[test]
fn the_seeds_are_sessions_in_which_every_request_is_carried_out() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/vhost_user");
    if std::env::var_os("UPDATE_SEEDS").is_some() {
        fs::create_dir_all(&folder).unwrap();
        for (name, script) in seeds() {
            fs::write(folder.join(name), script.concat()).unwrap();
        }
    }
    for (name, script) in seeds() {
        let found = fs::read(folder.join(name)).unwrap();
        assert!(found == script.concat(), "{name}: UPDATE_SEEDS=1 writes it");
        let requests = script
            .iter()
            .filter(|it| it[0] == 0x60 && it[3] != 7)
            .count() as u64;
        // What shortens its memory takes the last one away.
        let expected = requests - u64::from(name == "memory");
        // On a busy host a script may be at its end before its last request is taken.
        let served = (0..50).any(|_| run(&found).served >= expected);
        assert!(served, "{name}: {expected} requests");
    }
    assert_eq!(fs::read_dir(folder).unwrap().count(), seeds().len());
}
