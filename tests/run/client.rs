//! A client of the control socket with nothing but a socket and JSON.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use crate::vm::{Folder, PATIENCE, eventually};

/// A connection to a VM's control socket.
pub(crate) struct Client(BufReader<UnixStream>);

impl Client {
    /// Connects, as soon as the VM of this folder listens.
    pub(crate) fn of(folder: &Folder) -> Client {
        let mut client = None;
        eventually("it listens", || {
            client = folder
                .place()
                .and_then(|place| Client::at(&place.join("control.sock")));
            client.is_some()
        });
        client.unwrap()
    }

    pub(crate) fn at(socket: &Path) -> Option<Client> {
        let stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Some(Client(BufReader::new(stream)))
    }

    pub(crate) fn send(&mut self, line: &str) {
        self.0.get_mut().write_all(line.as_bytes()).unwrap();
        self.0.get_mut().write_all(b"\n").unwrap();
    }

    /// The next line; null at the end.
    pub(crate) fn line(&mut self) -> Value {
        let mut line = String::new();
        match self.0.read_line(&mut line).unwrap() {
            0 => Value::Null,
            _ => serde_json::from_str(&line).unwrap(),
        }
    }

    /// The answer to an order.
    pub(crate) fn ask(&mut self, line: &str) -> Value {
        self.send(line);
        loop {
            let answer = self.line();
            if answer.get("progress").is_none() {
                return answer;
            }
        }
    }

    /// The same for one without arguments.
    pub(crate) fn order(&mut self, command: &str) -> Value {
        self.ask(&format!("{{\"command\":\"{command}\"}}"))
    }

    pub(crate) fn status(&mut self) -> Value {
        self.order("status")["ok"].clone()
    }

    /// Waits for an event; those before it are passed over.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        loop {
            let line = self.line();
            assert!(!line.is_null(), "the connection ended before {name}");
            if line["event"] == name {
                return line;
            }
        }
    }

    /// Becomes the guest's console.
    pub(crate) fn console(mut self, scrollback: bool) -> UnixStream {
        let arguments = format!("{{\"scrollback\":{scrollback}}}");
        self.send(&format!(
            "{{\"command\":\"console\",\"arguments\":{arguments}}}"
        ));
        // A byte at a time: what follows the answer is the guest's.
        let mut stream = self.0.into_inner();
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            std::io::Read::read_exact(&mut stream, &mut byte).unwrap();
            line.extend(byte);
        }
        let answer: Value = serde_json::from_slice(&line).unwrap();
        assert!(answer.get("ok").is_some(), "{answer}");
        stream
    }
}
