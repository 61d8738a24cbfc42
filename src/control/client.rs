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
    /// How long it waits for what a VM answers at once.
    patience: Duration,
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
        Client::connect_within(socket, PATIENCE)
    }

    fn connect_within(socket: &Path, patience: Duration) -> Result<Client> {
        let path = socket.display();
        let stream = connect(socket, patience).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ECONNREFUSED | libc::ENOTDIR) => {
                let mut error = Error::failed(format!("no VM is running at `{path}`"));
                error.exit = exit::NOT_RUNNING;
                error.help("`launcher ps` lists those that are")
            }
            Some(libc::EAGAIN) => hung(socket, patience),
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
            patience,
        })
    }

    /// Makes sure that the VM answers, before an order that takes as long as it takes: one left
    /// with a process that hangs would be carried out long after whoever gave it has gone.
    ///
    /// # Errors
    ///
    /// It does not; it has no use for another connection.
    pub fn attentive(mut self) -> Result<Client> {
        self.wait_for(Some(self.patience))?;
        self.send(Order::Status)?;
        // Where it has ended, what comes of the order says so.
        if let Some(line) = self.line()?
            && let Line::Answer(Answer {
                id: None,
                reply: Reply::Error(failure),
            }) = self.parse(&line)?
        {
            return Err(failure.into());
        }
        Ok(self)
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
        self.wait_for(at_once.then_some(self.patience))?;
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
        self.wait_for(Some(self.patience))?;
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
                self.wait_for(None)?;
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
        self.wait_for(None)?;
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

    fn wait_for(&self, patience: Option<Duration>) -> Result<()> {
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
            io::ErrorKind::WouldBlock => hung(&self.socket, self.patience),
            _ => Error::failed(format!(
                "the connection to `{}` broke: {error}",
                self.socket.display()
            )),
        }
    }
}

/// Connects, and gives up when nobody accepts for too long.
pub(crate) fn connect(socket: &Path, patience: Duration) -> io::Result<UnixStream> {
    let address = Address::of(socket)?;
    let fd = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // What a connection waits with, too.
    set_socket_timeout(&fd, Timeout::Send, Some(patience))?;
    let address = address.socket()?;
    loop {
        match rustix::net::connect(&fd, &address) {
            Err(Errno::INTR) => {}
            connected => break connected?,
        }
    }
    Ok(UnixStream::from(fd))
}

fn hung(socket: &Path, patience: Duration) -> Error {
    Error::failed(format!(
        "the VM at `{}` does not answer within {patience:?}",
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    const SOON: Duration = Duration::from_millis(100);

    /// What a client makes of a VM that says this in answer to whatever it is asked.
    fn answered(text: &'static str, order: Order) -> Result<Value> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let vm = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            stream.write_all(text.as_bytes()).unwrap();
        });
        let answer = Client::connect(&socket).unwrap().ask(order, &mut |_| {});
        vm.join().unwrap();
        answer
    }

    fn failed(text: &'static str) -> Error {
        answered(text, Order::Pause).unwrap_err()
    }

    #[test]
    fn the_answer_is_the_one_with_the_id_of_the_request() {
        let text = "{\"event\":\"booted\"}\n{\"id\":9,\"ok\":1}\n{\"id\":1,\"ok\":2}\n";
        assert_eq!(answered(text, Order::Pause).unwrap(), 2);
    }

    #[test]
    fn what_is_wrong_with_an_order_is_wrong_usage_and_the_rest_a_failure() {
        for (kind, code) in [
            ("invalid", exit::USAGE),
            ("no-such-disk", exit::USAGE),
            ("refused", exit::USAGE),
            ("unsupported", exit::FAILED),
            ("busy", exit::FAILED),
            ("ending", exit::FAILED),
            ("host", exit::FAILED),
        ] {
            let kind: FailureKind = serde_json::from_value(kind.into()).unwrap();
            let error = Error::from(Failure {
                kind,
                message: "it is so".to_owned(),
                help: Some("do this".to_owned()),
                errno: None,
            });
            assert_eq!(error.exit, code, "{kind:?}");
            assert_eq!(error.to_string(), "error: it is so\nhelp: do this");
        }
    }

    #[test]
    fn a_connection_that_ends_without_an_answer_is_an_error() {
        for text in ["", "{\"id\":1,\"ok\":", "{\"event\":\"booted\"}\n"] {
            let error = failed(text).to_string();
            assert!(error.ends_with("has gone without an answer"), "{error}");
        }
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        for text in ["hello\n", "{}\n", "{\"id\":1}\n", "\u{0}\n"] {
            let error = failed(text).to_string();
            assert!(error.contains("is no reply: "), "{error}");
        }
    }

    #[test]
    fn a_vm_that_has_no_use_for_a_connection_says_why_before_an_order_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let vm = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let busy = r#"{"error":{"kind":"busy","message":"there are too many"}}"#;
            writeln!(stream, "{busy}").unwrap();
            stream
        });
        let error = Client::connect(&socket).unwrap().attentive().err().unwrap();
        assert_eq!(error.to_string(), "error: there are too many");
        drop(vm.join().unwrap());
    }

    #[test]
    fn where_nobody_listens_no_vm_is_running() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let none = Client::connect(&socket).err().unwrap();
        drop(UnixListener::bind(&socket).unwrap());
        let dead = Client::connect(&socket).err().unwrap();
        for error in [none, dead] {
            assert_eq!(error.exit, exit::NOT_RUNNING);
            assert!(
                error
                    .to_string()
                    .starts_with("error: no VM is running at `")
            );
        }
    }

    #[test]
    fn a_process_that_hangs_is_not_waited_for_forever() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let mut clients = Vec::new();
        let full = loop {
            match Client::connect_within(&socket, SOON) {
                Ok(client) => clients.push(client),
                Err(error) => break error,
            }
            assert!(clients.len() < 10);
        };
        let status = clients[0].ask(Order::Status, &mut |_| {}).unwrap_err();
        let console = clients.remove(0).console(true).unwrap_err();
        let order = clients.remove(0).attentive().err().unwrap();
        for error in [full, status, console, order] {
            let text = error.to_string();
            assert!(text.contains("does not answer within 100ms"), "{text}");
        }
    }
}
