//! A client of the control socket: a socket and JSON.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use crate::guest::{Folder, PATIENCE};

/// A connection to the running VM of a folder.
pub(crate) struct Client(BufReader<UnixStream>);

impl Client {
    pub(crate) fn of(folder: &Folder) -> Client {
        let mut places = std::fs::read_dir(folder.path("launcher")).unwrap();
        let place = places.next().unwrap().unwrap().path();
        let stream = UnixStream::connect(place.join("control.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client(BufReader::new(stream))
    }

    /// What a request is answered with, once it is done.
    pub(crate) fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.0.get_mut(), "{request}").unwrap();
        loop {
            let answer = self.line();
            if answer.get("progress").is_none() {
                return answer;
            }
        }
    }

    /// Resizes a disk; panics if that fails.
    pub(crate) fn resize(&mut self, disk: &str, size: &str) {
        let arguments = json!({"disk": disk, "size": size});
        let answer = self.ask(&json!({"command": "resize", "arguments": arguments}));
        assert!(answer["ok"].is_object(), "{disk} to {size}: {answer}");
    }

    /// How the VM is.
    pub(crate) fn status(&mut self) -> Value {
        self.ask(&json!({"command": "status"}))["ok"].clone()
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(
            self.0.read_line(&mut line).unwrap(),
            0,
            "the connection has ended"
        );
        serde_json::from_str(&line).unwrap()
    }
}
