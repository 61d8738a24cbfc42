//! The other end of the control socket: what the commands speak through.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::Deserialize;
use serde_json::Value;

use super::address::{self, Address};
use super::messages::{Answer, Event, Failure, FailureKind, Order, Progress, Reply, Request};
use crate::{Error, Result, exit};

/// How long a VM may take to accept a connection, and to answer what it answers at once.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest line that is taken from a VM: bytes.
const LONGEST: u64 = 16 << 20;

/// A connection to a VM's control socket.
pub struct Client {
    stream: BufReader<UnixStream>,
    socket: PathBuf,
    id: u64,
}

/// A line from a VM.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Answer(Answer),
    Event(Event),
}

impl Client {
    /// Connects to a VM.
    ///
    /// # Errors
    ///
    /// Nobody listens there ([`exit::NOT_RUNNING`]); somebody else does; it does not respond.
    pub fn connect(socket: &Path) -> Result<Client> {
        let path = socket.display();
        let stream = connect(socket).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ECONNREFUSED | libc::ENOTDIR) => {
                let mut error = Error::failed(format!("no VM is running at `{path}`"));
                error.exit = exit::NOT_RUNNING;
                error.help("`launcher ps` lists those that are")
            }
            Some(libc::EAGAIN) => hung(socket),
            _ => Error::failed(format!("cannot connect to `{path}`: {error}")),
        })?;
        let us = rustix::process::geteuid().as_raw();
        let peer = address::peer(&stream)
            .map_err(|error| Error::failed(format!("cannot tell who is at `{path}`: {error}")))?;
        if peer != us && peer != 0 && us != 0 {
            let message = format!("user {peer} listens at `{path}`, expected user {us}");
            return Err(Error::failed(message));
        }
        Ok(Client {
            stream: BufReader::new(stream),
            socket: socket.to_owned(),
            id: 0,
        })
    }

    /// Has an order carried out, and waits as long as that takes; what the reply holds.
    ///
    /// # Errors
    ///
    /// Why it was not carried out; the connection broke.
    pub fn ask(&mut self, order: Order, on_progress: &mut dyn FnMut(Progress)) -> Result<Value> {
        let at_once = matches!(
            order,
            Order::Status | Order::Subscribe | Order::Console { .. }
        );
        self.patience(at_once.then_some(PATIENCE))?;
        self.send(order)?;
        loop {
            let Some(line) = self.line()? else {
                return Err(Error::failed(format!(
                    "the VM at `{}` has gone without an answer",
                    self.socket.display()
                )));
            };
            match self.parse(&line)? {
                Line::Event(_) => {}
                // Without an id: a line of ours that was none, or the connection as a whole.
                Line::Answer(answer) if answer.id.is_some_and(|id| id != self.id) => {}
                Line::Answer(answer) => match answer.reply {
                    Reply::Ok(value) => return Ok(value),
                    Reply::Error(failure) => return Err(failure.into()),
                    Reply::Progress(progress) => on_progress(progress),
                },
            }
        }
    }

    /// Becomes the guest's console: what it prints is read, what is written it reads.
    ///
    /// # Errors
    ///
    /// As [`Client::ask`]: the VM has no console, or too many are attached.
    pub fn console(mut self, scrollback: bool) -> Result<UnixStream> {
        self.patience(Some(PATIENCE))?;
        self.send(Order::Console { scrollback })?;
        // A byte at a time: what follows the line is the guest's, and not for a buffer.
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') && (line.len() as u64) < LONGEST {
            match self.stream.get_mut().read(&mut byte) {
                Ok(0) => break,
                Ok(_) => line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(&error)),
            }
        }
        match self.parse(&line)? {
            Line::Answer(Answer {
                reply: Reply::Error(failure),
                ..
            }) => Err(failure.into()),
            _ => {
                self.patience(None)?;
                Ok(self.stream.into_inner())
            }
        }
    }

    /// The VM's events from now on. They end when it has.
    ///
    /// # Errors
    ///
    /// As [`Client::ask`].
    pub fn subscribe(mut self) -> Result<impl Iterator<Item = Result<Event>>> {
        self.ask(Order::Subscribe, &mut |_| {})?;
        self.patience(None)?;
        let mut ended = false;
        Ok(std::iter::from_fn(move || {
            while !ended {
                let line = match self.line() {
                    Ok(Some(line)) => self.parse(&line),
                    Ok(None) => break,
                    Err(error) => Err(error),
                };
                match line {
                    Ok(Line::Event(event)) => return Some(Ok(event)),
                    Ok(Line::Answer(Answer {
                        reply: Reply::Error(failure),
                        ..
                    })) => {
                        ended = true;
                        return Some(Err(failure.into()));
                    }
                    Ok(Line::Answer(_)) => {}
                    Err(error) => {
                        ended = true;
                        return Some(Err(error));
                    }
                }
            }
            None
        }))
    }

    fn patience(&self, patience: Option<Duration>) -> Result<()> {
        self.stream
            .get_ref()
            .set_read_timeout(patience)
            .map_err(|error| self.broken(&error))
    }

    fn send(&mut self, order: Order) -> Result<()> {
        self.id += 1;
        let request = Request {
            id: Some(self.id),
            order,
        };
        let sent = serde_json::to_vec(&request)
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                self.stream.get_mut().write_all(&line)
            });
        match sent {
            // It may have said why before it hung up.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(self.broken(&error)),
            _ => Ok(()),
        }
    }

    /// The next line; `None` at the end of the connection.
    fn line(&mut self) -> Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let read = (&mut self.stream)
            .take(LONGEST)
            .read_until(b'\n', &mut line);
        match read {
            Ok(_) if line.ends_with(b"\n") => Ok(Some(line)),
            Ok(_) if line.len() as u64 == LONGEST => {
                Err(self.broken(&io::Error::other("a line of it is too long")))
            }
            Ok(_) => Ok(None),
            // It was closed with a request unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(self.broken(&error)),
        }
    }

    fn parse(&self, line: &[u8]) -> Result<Line> {
        serde_json::from_slice(line).map_err(|error| {
            let path = self.socket.display();
            Error::failed(format!("what came from `{path}` is no reply: {error}"))
        })
    }

    fn broken(&self, error: &io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::WouldBlock => hung(&self.socket),
            _ => Error::failed(format!(
                "the connection to `{}` broke: {error}",
                self.socket.display()
            )),
        }
    }
}

/// Connects, and gives up when nobody accepts for too long.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let address = Address::of(socket)?;
    let fd = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // What a connection waits with, too.
    set_socket_timeout(&fd, Timeout::Send, Some(PATIENCE))?;
    let address = address.socket()?;
    loop {
        match rustix::net::connect(&fd, &address) {
            Err(Errno::INTR) => {}
            connected => break connected?,
        }
    }
    Ok(UnixStream::from(fd))
}

fn hung(socket: &Path) -> Error {
    let seconds = PATIENCE.as_secs();
    Error::failed(format!(
        "the VM at `{}` does not answer within {seconds} s",
        socket.display()
    ))
    .help("its process may be stopped: look at it with `ps`")
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let error = match failure.kind {
            FailureKind::Invalid | FailureKind::NoSuchDisk | FailureKind::Refused => {
                Error::usage(failure.message)
            }
            FailureKind::Unsupported
            | FailureKind::Busy
            | FailureKind::Ending
            | FailureKind::Host => Error::failed(failure.message),
        };
        match failure.help {
            Some(help) => error.help(help),
            None => error,
        }
    }
}
