//! Whether a server is sound: what a front end that makes no mistake gets from it.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFlags, eventfd};

use super::connection::{Connection, GET_FEATURES, expect_ready};
use super::guest::*;
use super::messages::*;
use super::{Bench, DISK, Kind, pattern};

/// The sector that is looked at, and that is written to where that may be.
const SECTOR: u64 = 9;

impl Bench {
    /// Everything on the disk; of a raw image its file has the same.
    fn content(&self) -> Vec<u8> {
        let len = self.disk.size() as usize;
        let bytes = self.disk.read(0, len).unwrap();
        if self.kind != Kind::Qcow2 {
            let mut file = vec![0; len + 1];
            assert_eq!(rustix::io::pread(&self.image, &mut file, 0), Ok(len));
            assert!(file[..len] == bytes, "the file of the image");
        }
        bytes
    }

    /// The server is as it was before the session, and the image is what requests made it.
    pub(super) fn expect_sound(&self) {
        let before = self.content();
        if self.kind == Kind::ReadOnly {
            let fresh = (0..DISK).map(|at| pattern(at / 512));
            assert!(fresh.eq(before.iter().copied()), "a read-only image");
        }
        let mut driver = Driver::attach(self);
        let first = driver.request(IN, 0, &[0xee; 512]);
        assert!(first == before[..512], "sector 0 is not what it is");
        let at = 512 * SECTOR as usize;
        let there = driver.request(IN, SECTOR, &[0xee; 512]);
        assert!(there == before[at..at + 512], "a sector is not what it is");
        if self.kind != Kind::ReadOnly {
            let new = [there[0].wrapping_add(1); 512];
            driver.request(OUT, SECTOR, &new);
            driver.request(FLUSH, 0, &[]);
            let mut expected = before;
            expected[at..at + 512].copy_from_slice(&new);
            assert!(
                self.content() == expected,
                "a write has done something else"
            );
        }
        if self.kind == Kind::Qcow2 {
            // Of an image that has no room for them, writes are in the server's memory at first.
            driver.request(DISCARD, 0, &words(&[0, DISK / 512]));
        }
        driver.connection.end();
        // Nobody is there: it can be made as small as it was.
        if self.disk.size() != DISK {
            self.disk.resize(DISK).unwrap();
        }
    }
}

/// A driver and its front end, neither of which makes a mistake.
struct Driver {
    connection: Connection,
    guest: Guest,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Driver {
    fn attach(bench: &Bench) -> Driver {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let mut it = Driver {
            connection: Connection::new(&bench.address),
            guest: Guest::new(),
            kick: event(),
            call: event(),
        };
        let (connection, memory) = (&mut it.connection, it.guest.file.as_fd());
        let (kick, call) = (it.kick.as_fd(), it.call.as_fd());
        let [table, used, available] = areas(0).map(|area| USER + area);
        let whole = [&[0], region(PARTS[0]).as_slice()].concat();
        let addresses = [0, table, used, available, 0];
        connection.say(SET_PROTOCOL_FEATURES, 0, &words(&[PROTOCOL]), &[]);
        // VIRTIO_BLK_F_FLUSH: writes are not flushed one by one; VIRTIO_BLK_F_DISCARD.
        let features = match bench.kind {
            Kind::Qcow2 => FEATURES | 1 << 9 | 1 << 13,
            Kind::Raw | Kind::ReadOnly => FEATURES | 1 << 9,
        };
        connection.say(SET_FEATURES, 0, &words(&[features]), &[]);
        connection.say(ADD_MEM_REG, 0, &words(&whole), &[memory]);
        connection.say(SET_VRING_NUM, 0, &words(&[pair(0, 64)]), &[]);
        connection.say(SET_VRING_ADDR, 0, &words(&addresses), &[]);
        connection.say(SET_VRING_CALL, 0, &words(&[0]), &[call]);
        connection.say(SET_VRING_KICK, 0, &words(&[0]), &[kick]);
        connection.say(SET_VRING_ENABLE, 0, &words(&[pair(0, 1)]), &[]);
        connection.say(GET_FEATURES, 0, &[], &[]);
        let answer = connection.expect(GET_FEATURES);
        assert!(answer.is_some(), "a front end without mistakes is refused");
        it
    }

    /// Carries one request out; its data afterwards.
    fn request(&mut self, kind: u32, sector: u64, bytes: &[u8]) -> Vec<u8> {
        let request = Request {
            slot: 0,
            kind,
            sector,
            len: bytes.len() as u32,
            indirect: false,
        };
        self.guest.write(data(0, 0), bytes);
        let head = self.guest.request(0, request, |_| {});
        self.guest.publish(0, head);
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
        // A new call is signalled at once, whatever was served.
        while self.guest.read(status(0, 0), 1) == [0xff] {
            expect_ready(&self.call, PollFlags::IN, "it serves no request");
            let _ = rustix::io::read(&self.call, &mut [0; 8]);
        }
        assert_eq!(self.guest.read(status(0, 0), 1), [0], "request {kind}");
        self.guest.read(data(0, 0), bytes.len())
    }
}
