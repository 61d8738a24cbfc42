//! `launcher wait`.

use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};

use super::span;
use super::target::Target;
use crate::control::Client;
use crate::control::messages::{Event, Stopped};
use crate::{Error, Result, exit};

/// Wait for a VM to end, or to be up
///
/// When it ends, exits with what `launcher up` exits with. A VM that does not run has ended
/// already; one that is to come up has to run.
#[derive(Args)]
#[command(after_help = "Example:\n  launcher wait web --for booted --timeout 2m")]
pub(super) struct Wait {
    /// TOML file of the VM, the folder of its vm.toml, or its name [default: vm.toml]
    vm: Option<PathBuf>,
    /// What to wait for: its end, or the guest's init or login prompt
    #[arg(
        long = "for",
        value_name = "WHAT",
        value_enum,
        default_value = "stopped"
    )]
    awaited: Awaited,
    /// How long, such as 500ms, 30s or 2m, before it is a failure [default: as long as it takes]
    #[arg(long, value_name = "TIME", value_parser = span::parse)]
    timeout: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Awaited {
    Stopped,
    Booted,
}

impl Wait {
    pub(super) fn run(mut self) -> Result<u8> {
        let vm = self.vm.take();
        let deadline = self.timeout.map(|timeout| Instant::now() + timeout);
        let target = match self.awaited {
            Awaited::Stopped => Target::of(vm)?,
            Awaited::Booted => Target::running(vm)?,
        };
        if !target.is_running() {
            return Ok(exit::DONE);
        }
        let events = match target.connect() {
            Ok(client) => listen(client)?,
            // It has ended just now.
            Err(error) if error.exit == exit::NOT_RUNNING && self.awaited == Awaited::Stopped => {
                return Ok(exit::DONE);
            }
            Err(error) => return Err(error),
        };
        // What came before the events is in the status.
        if self.awaited == Awaited::Booted && target.status()?.booted {
            return Ok(exit::DONE);
        }
        let name = target.name();
        loop {
            let event = match deadline {
                None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => {
                    events.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                }
            };
            match event {
                Ok(event) => match self.after(&name, event?) {
                    Some(done) => return done,
                    None => continue,
                },
                Err(RecvTimeoutError::Timeout) => return Err(self.late(&name)),
                // Killed, it has told nobody.
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::failed(format!(
                        "`{name}` has ended, and did not say how"
                    )));
                }
            }
        }
    }

    /// The end of the wait, if an event is one.
    fn after(&self, name: &str, event: Event) -> Option<Result<u8>> {
        match (self.awaited, event) {
            (Awaited::Booted, Event::Booted) => Some(Ok(exit::DONE)),
            (Awaited::Stopped, Event::Stopped(Stopped { exit_code, .. })) => Some(Ok(exit_code)),
            (Awaited::Booted, Event::Stopped(Stopped { why, .. })) => {
                let why = why.map_or_else(String::new, |why| format!(": {why}"));
                let message = format!("`{name}` has ended before it was up{why}");
                let help = format!("see `launcher logs {name}`");
                Some(Err(Error::failed(message).help(help)))
            }
            _ => None,
        }
    }

    fn late(&self, name: &str) -> Error {
        let awaited = match self.awaited {
            Awaited::Stopped => "has not ended",
            Awaited::Booted => "is not up",
        };
        let timeout = self.timeout.unwrap_or_default();
        Error::failed(format!("`{name}` {awaited} within {timeout:?}"))
    }
}

/// A VM's events, on a thread that ends with the connection or with the process.
fn listen(client: Client) -> Result<mpsc::Receiver<Result<Event>>> {
    let (sender, events) = mpsc::channel();
    let (ready, subscribed) = mpsc::channel();
    let listener = move || {
        let source = match client.subscribe() {
            Ok(source) => source,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let _ = ready.send(Ok(()));
        for event in source {
            if sender.send(event).is_err() {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("events".into());
    thread
        .spawn(listener)
        .map_err(|error| Error::failed(format!("cannot start a thread: {error}")))?;
    match subscribed.recv() {
        Ok(result) => result.map(|()| events),
        Err(_) => Err(Error::failed("the connection broke")),
    }
}
