//! Messages as a front end sends them, of which now and then something is not as it should be.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create};

use super::connection::{GET_FEATURES, NEED_REPLY};
use super::guest::{Guest, MEMORY, QUEUES, USER, areas};
use super::script::Script;
use crate::serve::inflight;

/// VHOST_USER_F_PROTOCOL_FEATURES and VIRTIO_F_VERSION_1.
pub(super) const FEATURES: u64 = 1 << 30 | 1 << 32;
/// MQ, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
pub(super) const PROTOCOL: u64 = 1 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;
pub(super) const REPLY_ACK: u64 = 1 << 3;
/// VIRTIO_BLK_F_FLUSH, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES, INDIRECT_DESC and EVENT_IDX.
pub(super) const OPTIONAL: [u32; 7] = [9, 11, 12, 13, 14, 28, 29];

pub(super) const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const RESET_OWNER: u32 = 4;
pub(super) const SET_MEM_TABLE: u32 = 5;
pub(super) const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const SET_BACKEND_REQ_FD: u32 = 21;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const SET_CONFIG: u32 = 25;
pub(super) const GET_INFLIGHT_FD: u32 = 31;
pub(super) const SET_INFLIGHT_FD: u32 = 32;
pub(super) const RESET_DEVICE: u32 = 34;
const GET_MAX_MEM_SLOTS: u32 = 36;
pub(super) const ADD_MEM_REG: u32 = 37;
pub(super) const REM_MEM_REG: u32 = 38;

/// Messages, the more often the more they lead to; the last stands for any.
#[rustfmt::skip]
pub(super) const REQUESTS: [u32; 40] = [
    GET_FEATURES, SET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE, SET_MEM_TABLE,
    SET_VRING_NUM, SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE,
    GET_VRING_BASE, SET_VRING_KICK, SET_VRING_KICK, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_CALL,
    SET_VRING_ERR, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE,
    SET_VRING_ENABLE, SET_VRING_ENABLE, SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG, SET_CONFIG,
    GET_INFLIGHT_FD, GET_INFLIGHT_FD, SET_INFLIGHT_FD, SET_INFLIGHT_FD, RESET_DEVICE,
    GET_MAX_MEM_SLOTS, ADD_MEM_REG, ADD_MEM_REG, REM_MEM_REG, 0,
];

/// Parts of the memory, start and length: all of it, and its halves.
pub(super) const PARTS: [(u64, u64); 3] = [(0, MEMORY), (0, MEMORY / 2), (MEMORY / 2, MEMORY / 2)];

/// Descriptors of a record of requests in flight.
const RECORDED: u16 = 64;

/// Which of the [`Files`].
#[derive(Clone, Copy)]
pub(super) enum Sent {
    Memory,
    Kick(u64),
    Call,
    /// An eventfd that nobody waits for: it may be full.
    Full,
    /// The server's own memory for requests in flight, or some that was made as it makes it.
    Record,
    Unsealed,
    Device,
    Channel,
}

/// What a front end can send.
pub(super) struct Files {
    memory: OwnedFd,
    pub(super) kicks: [OwnedFd; QUEUES as usize],
    pub(super) call: OwnedFd,
    pub(super) full: OwnedFd,
    record: OwnedFd,
    pub(super) theirs: Option<OwnedFd>,
    unsealed: OwnedFd,
    device: OwnedFd,
    pub(super) channel: [OwnedFd; 2],
}

impl Files {
    pub(super) fn new(guest: &Guest) -> Files {
        let event = |flags| eventfd(0, EventfdFlags::CLOEXEC | flags).unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let unsealed = memfd_create("unsealed", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&unsealed, 0x4000).unwrap();
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        Files {
            memory: guest.file.try_clone().unwrap(),
            // One of each kind.
            kicks: [EventfdFlags::empty(), EventfdFlags::NONBLOCK].map(event),
            call: event(EventfdFlags::NONBLOCK),
            full: event(EventfdFlags::NONBLOCK),
            record: inflight::create(QUEUES, RECORDED).unwrap().into(),
            theirs: None,
            unsealed,
            device: rustix::fs::open("/dev/zero", flags, Mode::empty()).unwrap(),
            channel: [one.into(), other.into()],
        }
    }

    pub(super) fn of(&self, sent: Sent) -> BorrowedFd<'_> {
        match sent {
            Sent::Memory => self.memory.as_fd(),
            Sent::Kick(queue) => self.kicks[(queue % u64::from(QUEUES)) as usize].as_fd(),
            Sent::Call => self.call.as_fd(),
            Sent::Full => self.full.as_fd(),
            Sent::Record => self.theirs.as_ref().unwrap_or(&self.record).as_fd(),
            Sent::Unsealed => self.unsealed.as_fd(),
            Sent::Device => self.device.as_fd(),
            Sent::Channel => self.channel[0].as_fd(),
        }
    }
}

/// A message, and how it is sent.
pub(super) struct Message {
    pub(super) request: u32,
    pub(super) flags: u32,
    pub(super) body: Vec<u8>,
    pub(super) files: Vec<Sent>,
    /// Whether its effect is waited for.
    pub(super) settled: bool,
}

/// A message's content, word by word.
pub(super) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Two halves of a word.
pub(super) fn pair(low: u64, high: u64) -> u64 {
    low & 0xffff_ffff | high << 32
}

/// A memory region, as messages have it.
pub(super) fn region((start, len): (u64, u64)) -> [u64; 4] {
    [start, len, USER + start, start]
}

/// The content of a message about a record of requests in flight.
pub(super) fn record() -> [u64; 3] {
    let len = inflight::len(QUEUES, RECORDED) as u64;
    [len, 0, u64::from(QUEUES) | u64::from(RECORDED) << 16]
}

impl Message {
    /// The next one of a script, for virtqueues of `size` descriptors.
    pub(super) fn next(script: &mut Script<'_>, size: u16) -> Message {
        let mut request = script.choose(&REQUESTS);
        let how = script.byte();
        let index = u64::from(how & 1);
        let mut files = Vec::new();
        let mut body = match request {
            SET_FEATURES => {
                let others = OPTIONAL.iter().fold(0, |all, bit| all | 1 << bit);
                let chosen = u64::from(script.byte()) << 9 | u64::from(script.byte() & 3) << 28;
                vec![FEATURES | chosen & others]
            }
            SET_PROTOCOL_FEATURES => vec![PROTOCOL | (index * REPLY_ACK)],
            SET_VRING_NUM => vec![pair(index, size.into())],
            SET_VRING_BASE | GET_VRING_BASE => vec![pair(index, u64::from(how >> 4))],
            SET_VRING_ENABLE => vec![pair(index, u64::from(how >> 4 & 1))],
            SET_VRING_ADDR => {
                let [table, used, available] = areas(index as u16).map(|area| USER + area);
                vec![index, table, used, available, 0]
            }
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
                files.push(match (request, how >> 4 & 3) {
                    (SET_VRING_KICK, 0..3) => Sent::Kick(index),
                    (_, 3) => Sent::Full,
                    _ => Sent::Call,
                });
                vec![index]
            }
            SET_MEM_TABLE => {
                let parts = match how & 3 {
                    0 => &PARTS[1..],
                    other => &PARTS[usize::from(other) - 1..usize::from(other)],
                };
                files.extend(parts.iter().map(|_| Sent::Memory));
                let count = [parts.len() as u64];
                let parts = parts.iter().flat_map(|part| region(*part));
                count.into_iter().chain(parts).collect()
            }
            ADD_MEM_REG | REM_MEM_REG => {
                if request == ADD_MEM_REG {
                    files.push(Sent::Memory);
                }
                let part = PARTS[usize::from(how) % PARTS.len()];
                [0].into_iter().chain(region(part)).collect()
            }
            GET_CONFIG | SET_CONFIG => {
                let (offset, len) = match how & 3 {
                    0 => (0, 60),
                    1 => (32, 1),
                    _ => (u64::from(how), u64::from(script.byte())),
                };
                let count = 2 + (len + 4).div_ceil(8);
                let filler = u64::from(script.byte()) << 32 | 1;
                let mut body = vec![filler; count as usize];
                body[0] = pair(offset, len);
                body
            }
            GET_INFLIGHT_FD => record().to_vec(),
            SET_INFLIGHT_FD => {
                files.push(Sent::Record);
                record().to_vec()
            }
            SET_BACKEND_REQ_FD => {
                files.push(Sent::Channel);
                Vec::new()
            }
            0 => {
                request = u32::from(script.byte() % 46);
                (0..script.byte() % 6).map(|_| script.number()).collect()
            }
            _ => Vec::new(),
        };
        let wild = script.byte();
        if wild >= 0xe8 && !body.is_empty() {
            let at = usize::from(script.byte()) % body.len();
            let number = script.number();
            body[at] = match wild & 3 {
                0 => number,
                1 => pair(number, body[at] >> 32),
                2 => pair(body[at], number),
                _ => body[at] ^ number,
            };
        }
        if (0xdc..0xec).contains(&wild) {
            files = (0..script.byte() % 36)
                .map(|_| script.choose(&Self::FILES))
                .collect();
        }
        let mut bytes = words(&body);
        if matches!(request, GET_CONFIG | SET_CONFIG) && wild < 0xf8 {
            // What is configured may end anywhere: 12 bytes say what it is.
            let len = body.first().map_or(0, |word| (word >> 32) as usize);
            bytes.truncate(len.saturating_add(12));
        }
        Message {
            request,
            flags: u32::from(how & 8 != 0) * NEED_REPLY,
            body: bytes,
            files,
            settled: how & 4 == 0,
        }
    }

    const FILES: [Sent; 8] = [
        Sent::Memory,
        Sent::Kick(0),
        Sent::Call,
        Sent::Full,
        Sent::Record,
        Sent::Unsealed,
        Sent::Device,
        Sent::Channel,
    ];
}
