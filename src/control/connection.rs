//! One client: its lines, and what it has yet to read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde::Serialize;

use super::messages::{Answer, Failure, Progress, Reply};

/// What is looked at in one go: bytes.
const PIECE: usize = 4096;

/// What a client's connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// It may send a line.
    Listening,
    /// An order is being carried out, which ends the VM or does not.
    Obeying {
        /// The request's.
        id: Option<u64>,
        /// Whether it is answered when the VM has ended.
        ends: bool,
    },
}

/// What has come of a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// A whole one, without its line feed. The last one needs none.
    Line(Vec<u8>),
    /// Not all of it yet.
    Unfinished,
    /// It is longer than any request.
    TooLong,
    /// Nothing more will come.
    End,
}

/// A client's connection.
pub(super) struct Connection {
    pub(super) number: u64,
    pub(super) doing: Doing,
    pub(super) subscribed: bool,
    /// Whether a request of it has ever been understood.
    pub(super) served: bool,
    /// It is to be closed when it has read what there is.
    pub(super) leaving: bool,
    stream: UnixStream,
    /// The beginning of a line.
    line: Vec<u8>,
    out: Vec<u8>,
    sent: usize,
    /// Since when it has been silent, or in the middle of a line.
    since: Instant,
    /// Since when there has been something to read for it.
    unread_since: Instant,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, number: u64) -> Self {
        let now = Instant::now();
        Connection {
            number,
            doing: Doing::Listening,
            subscribed: false,
            served: false,
            leaving: false,
            stream,
            line: Vec::new(),
            out: Vec::new(),
            sent: 0,
            since: now,
            unread_since: now,
        }
    }

    /// Whether it may send a line: what it sends otherwise stays in the socket.
    pub(super) fn listens(&self) -> bool {
        self.goes_on() && self.unread() == 0
    }

    /// Whether another line may be taken before it has read the answers to those in front.
    pub(super) fn goes_on(&self) -> bool {
        self.doing == Doing::Listening && !self.leaving && self.unread() < PIECE
    }

    /// Whether it can go: there is nothing that it waits for.
    pub(super) fn is_done(&self) -> bool {
        self.leaving && self.unread() == 0 && self.doing == Doing::Listening && !self.subscribed
    }

    /// Whether others may need its place more.
    pub(super) fn is_idle(&self) -> bool {
        self.doing == Doing::Listening && !self.subscribed
    }

    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// When it will have taken too long.
    pub(super) fn deadline(&self, patience: Duration) -> Option<Instant> {
        if self.unread() > 0 {
            return Some(self.unread_since + patience);
        }
        let waits = self.doing != Doing::Listening || self.subscribed && self.line.is_empty();
        (!waits).then(|| self.since + patience)
    }

    /// What to poll for.
    pub(super) fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.listens());
        flags.set(PollFlags::OUT, self.unread() > 0);
        flags
    }

    /// Takes no more than a line out of the socket, so that what follows it is still there for
    /// the console.
    pub(super) fn line(&mut self, longest: usize) -> io::Result<Input> {
        let mut piece = [0; PIECE];
        loop {
            let peeked = match self.receive(&mut piece, RecvFlags::PEEK)? {
                None => return Ok(Input::Unfinished),
                // JSON that was cut off is none, so that the end will do for a line's.
                Some(0) if !self.line.is_empty() => {
                    return Ok(Input::Line(std::mem::take(&mut self.line)));
                }
                Some(0) => return Ok(Input::End),
                Some(len) => len,
            };
            let end = piece[..peeked].iter().position(|byte| *byte == b'\n');
            let len = end.map_or(peeked, |end| end + 1);
            let Some(len) = self.receive(&mut piece[..len], RecvFlags::empty())? else {
                return Ok(Input::Unfinished);
            };
            if self.line.is_empty() {
                self.since = Instant::now();
            }
            self.line.extend(&piece[..len]);
            if end.is_some() {
                self.line.pop();
            }
            if self.line.len() > longest {
                self.line = Vec::new();
                return Ok(Input::TooLong);
            }
            if end.is_some() {
                return Ok(Input::Line(std::mem::take(&mut self.line)));
            }
        }
    }

    fn receive(&self, piece: &mut [u8], flags: RecvFlags) -> io::Result<Option<usize>> {
        loop {
            match rustix::net::recv(&self.stream, &mut *piece, flags | RecvFlags::DONTWAIT) {
                Ok((len, _)) => return Ok(Some(len)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Answers a request, which is done with.
    pub(super) fn answer(&mut self, id: Option<u64>, reply: Reply) {
        self.doing = Doing::Listening;
        self.since = Instant::now();
        self.tell(&Answer { id, reply });
    }

    /// As with [`Reply::Ok`], for what keeps the order of its fields.
    pub(super) fn answer_ok(&mut self, id: Option<u64>, ok: &impl Serialize) {
        #[derive(Serialize)]
        struct Ok<'a, T> {
            #[serde(skip_serializing_if = "Option::is_none")]
            id: Option<u64>,
            ok: &'a T,
        }
        self.since = Instant::now();
        self.tell(&Ok { id, ok });
    }

    /// Tells it how far its order is.
    pub(super) fn report(&mut self, id: Option<u64>, progress: Progress) {
        self.tell(&Answer {
            id,
            reply: Reply::Progress(progress),
        });
    }

    /// Tells it why nothing was done, and closes it afterwards.
    pub(super) fn dismiss(&mut self, failure: Failure) {
        self.subscribed = false;
        self.answer(None, Reply::Error(failure));
        self.leaving = true;
    }

    /// Puts a line into what it has to read.
    pub(super) fn tell(&mut self, line: &impl Serialize) {
        if self.unread() == 0 {
            self.unread_since = Instant::now();
            self.out.clear();
            self.sent = 0;
        }
        let whole = self.out.len();
        // Neither a vector nor these types can fail.
        match serde_json::to_writer(&mut self.out, line) {
            Ok(()) => self.out.push(b'\n'),
            Err(_) => self.out.truncate(whole),
        }
    }

    /// Bytes that it has not read yet, beyond what is in the socket.
    pub(super) fn unread(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Hands over what the socket takes.
    ///
    /// # Errors
    ///
    /// The client is gone.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.unread() > 0 {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.stream, &self.out[self.sent..], flags) {
                Ok(sent) => self.sent += sent,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        // One long reply is no reason to keep so much for good.
        if self.out.capacity() > PIECE {
            self.out = Vec::new();
            self.sent = 0;
        }
        Ok(())
    }

    /// Takes what the client has sent and nobody will look at: it would have its end of the
    /// connection fail before it has read ours.
    pub(super) fn discard(&mut self) {
        let mut piece = [0; PIECE];
        for _ in 0..16 {
            if !matches!(self.receive(&mut piece, RecvFlags::empty()), Ok(Some(1..))) {
                return;
            }
        }
    }

    /// The socket alone, once nothing is left to tell.
    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
