//! Messages written by hand, right or wrong.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_OWNER: u32 = 3;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const SET_VRING_ERR: u32 = 14;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const GET_INFLIGHT_FD: u32 = 31;
pub(crate) const SET_INFLIGHT_FD: u32 = 32;
pub(crate) const RESET_DEVICE: u32 = 34;
pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
pub(crate) const ADD_MEM_REG: u32 = 37;
pub(crate) const REM_MEM_REG: u32 = 38;

/// VHOST_USER_F_PROTOCOL_FEATURES and VIRTIO_F_VERSION_1.
pub(crate) const FEATURES: u64 = 1 << 30 | 1 << 32;

/// A connection over which anything may be sent.
pub(crate) struct Raw(UnixStream);

/// A message's content, word by word.
pub(crate) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Two halves of a word.
pub(crate) fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

impl Raw {
    pub(crate) fn connect(socket: &Path) -> Raw {
        let stream = UnixStream::connect(socket).unwrap();
        let patience = Some(Duration::from_secs(20));
        stream.set_read_timeout(patience).unwrap();
        stream.set_write_timeout(patience).unwrap();
        Raw(stream)
    }

    /// As far as every message is allowed.
    pub(crate) fn negotiated(socket: &Path) -> Raw {
        let raw = Raw::connect(socket);
        // CONFIG, MQ, BACKEND_REQ, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
        let protocol = 1 << 9 | 1 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 15;
        raw.send(SET_PROTOCOL_FEATURES, &words(&[protocol]), &[]);
        raw.send(SET_FEATURES, &words(&[FEATURES]), &[]);
        raw
    }

    /// Sends a message as it should be; a server that has hung up is no error here.
    pub(crate) fn send(&self, request: u32, body: &[u8], files: &[RawFd]) {
        let header = [request, 1, body.len() as u32].map(u32::to_ne_bytes);
        self.send_bytes(&[header.as_flattened(), body].concat(), files);
    }

    pub(crate) fn send_bytes(&self, bytes: &[u8], files: &[RawFd]) {
        let (head, rest) = bytes.split_at(bytes.len().min(12));
        let _ = match files {
            [] => (&self.0).write(head).map_err(|error| error.to_string()),
            files => self
                .0
                .send_with_fds(&[head], files)
                .map_err(|error| error.to_string()),
        };
        if !rest.is_empty() {
            let _ = (&self.0).write_all(rest);
        }
    }

    /// Sends a message that asks for an answer; its content, and that of the answer.
    pub(crate) fn ask(&self, request: u32, body: &[u8], files: &[RawFd]) -> Vec<u64> {
        let header = [request, 1 | 8, body.len() as u32].map(u32::to_ne_bytes);
        self.send_bytes(&[header.as_flattened(), body].concat(), files);
        let mut header = [0; 12];
        (&self.0).read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_ne_bytes(header[at..][..4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request, 1 | 4));
        let mut body = vec![0; word(8) as usize];
        (&self.0).read_exact(&mut body).unwrap();
        body.resize(body.len().next_multiple_of(8), 0);
        let words = body.chunks(8);
        words
            .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
            .collect()
    }

    /// Waits until the server hangs up; answers are skipped.
    pub(crate) fn expect_hang_up(mut self, what: &str) {
        let mut bytes = [0; 4096];
        loop {
            match self.0.read(&mut bytes) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
                Err(error) => panic!("{what}: the server does not hang up: {error}"),
            }
        }
    }
}

pub(crate) fn memfd(len: u64) -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("test", flags).unwrap();
    rustix::fs::ftruncate(&file, len).unwrap();
    File::from(file)
}
