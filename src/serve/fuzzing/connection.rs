//! A connection over which anything may be sent, and that never waits for good: a server that
//! keeps it waiting for longer than [`PATIENCE`] is a finding.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
};

/// Seconds in which a sound server does anything, on a host that is busy with other work too.
/// fuzz/run has libFuzzer end an input after 20 s, and look at its clock by a signal each 11 s.
const PATIENCE: i64 = 8;

/// Length of a message's header.
const HEADER: usize = 12;
/// Bits of the flags: the version, an answer, an answer wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
pub(super) const NEED_REPLY: u32 = 8;

pub(super) const GET_FEATURES: u32 = 1;

/// Most files with one message: one more than a server takes.
pub(super) const MAX_FILES: usize = 33;

/// Waits until `fd` is ready; whether it is within some milliseconds.
pub(super) fn ready(fd: impl AsFd, flags: PollFlags, milliseconds: i64) -> bool {
    let patience = Timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: milliseconds % 1000 * 1_000_000,
    };
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), flags)];
    // A signal of the fuzzer's own begins the wait again.
    rustix::io::retry_on_intr(|| poll(&mut fds, Some(&patience))).unwrap() > 0
}

/// The same, of what a sound server makes ready sooner or later.
pub(super) fn expect_ready(fd: impl AsFd, flags: PollFlags, what: &str) {
    assert!(
        ready(fd, flags, PATIENCE * 1000),
        "the server hangs: {what}"
    );
}

/// A message as it should be.
pub(super) fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let header = [request, VERSION | flags, body.len() as u32].map(u32::to_ne_bytes);
    [header.as_flattened(), body].concat()
}

/// An answer.
pub(super) struct Answer {
    pub(super) request: u32,
    pub(super) body: Vec<u8>,
}

pub(super) struct Connection {
    socket: OwnedFd,
    /// What has come and is no whole answer yet.
    unread: Vec<u8>,
    /// The file that came last.
    pub(super) file: Option<OwnedFd>,
    /// The server has hung up.
    pub(super) gone: bool,
    /// What was sent is no whole message, or may be none.
    pub(super) torn: bool,
    /// Requests for features that are not answered yet.
    unanswered: usize,
}

impl Connection {
    pub(super) fn new(address: &SocketAddrUnix) -> Connection {
        let flags = SocketFlags::CLOEXEC;
        let kind = (AddressFamily::UNIX, SocketType::STREAM);
        let socket = rustix::net::socket_with(kind.0, kind.1, flags, None).unwrap();
        rustix::net::connect(&socket, address).unwrap();
        Connection {
            socket,
            unread: Vec::new(),
            file: None,
            gone: false,
            torn: false,
            unanswered: 0,
        }
    }

    /// Sends bytes, the files with the first of them. Answers are read meanwhile.
    pub(super) fn send(&mut self, mut bytes: &[u8], mut files: &[BorrowedFd<'_>]) {
        while !bytes.is_empty() && !self.gone {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !files.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(files)));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let parts = [IoSlice::new(bytes)];
            match rustix::net::sendmsg(&self.socket, &parts, &mut control, flags) {
                Ok(sent) => (bytes, files) = (&bytes[sent..], &[]),
                Err(Errno::AGAIN) => {
                    self.receive();
                    expect_ready(&self.socket, PollFlags::OUT, "it reads no message");
                }
                Err(Errno::INTR) => {}
                Err(_) => self.gone = true,
            }
        }
    }

    /// Sends a message as it should be.
    pub(super) fn say(&mut self, request: u32, flags: u32, body: &[u8], files: &[BorrowedFd<'_>]) {
        if request == GET_FEATURES {
            self.unanswered += 1;
        }
        self.send(&message(request, flags, body), files);
    }

    /// Reads what is there.
    fn receive(&mut self) {
        let mut bytes = [0; 4096];
        while !self.gone {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = rustix::net::recvmsg(&self.socket, &mut parts, &mut control, flags);
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(mut files) = message {
                    self.file = files.next();
                }
            }
            match received {
                Ok(received) if received.bytes == 0 => self.gone = true,
                Ok(received) => self.unread.extend(&bytes[..received.bytes]),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => self.gone = true,
            }
        }
    }

    /// The next answer that has come whole. Whatever was asked, it is well-formed.
    pub(super) fn answer(&mut self) -> Option<Answer> {
        self.receive();
        let header = self.unread.get(..HEADER)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags, size) = (word(0), word(4), word(8) as usize);
        assert_eq!(flags & !NEED_REPLY, VERSION | REPLY, "an answer's flags");
        assert!(size <= 4096, "an answer of {size} bytes");
        let body = self.unread.get(HEADER..HEADER + size)?.to_vec();
        self.unread.drain(..HEADER + size);
        if request == GET_FEATURES {
            self.unanswered -= 1;
        }
        Some(Answer { request, body })
    }

    /// Waits for the answer to a request, which is no other's; `None` if the server hangs up.
    pub(super) fn expect(&mut self, request: u32) -> Option<Answer> {
        loop {
            match self.answer() {
                Some(answer) if answer.request == request => return Some(answer),
                Some(_) => {}
                None if self.gone => return None,
                None => expect_ready(&self.socket, PollFlags::IN, "it does not answer"),
            }
        }
    }

    /// Waits until all that was sent has had its effect, or the server has hung up.
    pub(super) fn settle(&mut self) {
        if self.torn {
            return while self.answer().is_some() {};
        }
        self.say(GET_FEATURES, 0, &[], &[]);
        while self.unanswered > 0 && self.expect(GET_FEATURES).is_some() {}
    }

    /// Hangs up, and waits until the server does, which is the last thing it does.
    pub(super) fn end(mut self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        loop {
            while self.answer().is_some() {}
            if self.gone {
                return;
            }
            expect_ready(&self.socket, PollFlags::IN, "it does not hang up");
        }
    }
}
