//! The control socket of a running VM: one thread, `control`, for all of its clients.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use rustix::event::EventfdFlags;

use super::Subject;
use super::listener::Listener;
use super::messages::{Event, Failure, Progress, Stopped};
use super::place::{Claim, SOCKET};
use super::serve::Loop;
use crate::{Error, Result};

/// How long the end of the connections may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// What clients may take of the process.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// Connections at once.
    pub(super) connections: usize,
    /// Of these, subscribers.
    pub(super) subscribers: usize,
    /// Orders at once that do not end the VM, each on a thread.
    pub(super) orders: usize,
    /// Orders at once that do: they are answered when it has ended.
    pub(super) stops: usize,
    /// A line: bytes.
    pub(super) line: usize,
    /// What a client has not read: bytes.
    pub(super) unread: usize,
    /// Events that are on their way to the thread.
    pub(super) events: usize,
    /// Lines of a client before it is another's turn.
    pub(super) turn: usize,
    /// How long a client may be silent, take for a line, or leave something unread.
    pub(super) patience: Duration,
    /// How long the clients may take to read their last line.
    pub(super) farewell: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 64,
            subscribers: 32,
            orders: 8,
            stops: 16,
            line: 64 << 10,
            unread: 256 << 10,
            events: 1024,
            turn: 32,
            patience: Duration::from_secs(30),
            farewell: Duration::from_millis(1500),
        }
    }
}

/// What reaches the thread from others.
pub(super) enum Note {
    /// For the subscribers.
    Event(Event),
    /// How far an order of this connection is.
    Progress(u64, Progress),
    /// An order is carried out, or not.
    Done {
        /// The connection's.
        number: u64,
        /// Whether it is one that ends the VM.
        ends: bool,
        done: Result<serde_json::Value, Failure>,
    },
    /// The VM has ended, so or in a way that is not told.
    Close(Option<Stopped>),
}

/// Where others leave notes for the thread.
#[derive(Clone)]
pub(super) struct Notes {
    sender: Sender<Note>,
    wake: Arc<OwnedFd>,
}

impl Notes {
    /// Leaves a note and wakes the thread. That it has ended is no error.
    pub(super) fn leave(&self, note: Note) {
        let _ = self.sender.send(note);
        // Fails only where it is set to the brim, and so awake.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

/// Events that are on their way to the thread.
#[derive(Default)]
pub(super) struct Underway {
    pub(super) count: AtomicUsize,
    /// One more than there may be has been dropped.
    pub(super) lost: AtomicBool,
}

/// The control socket of a running VM.
pub struct Server {
    publisher: Publisher,
    /// Until it is waited for.
    ended: Option<Receiver<()>>,
}

/// Tells the subscribers what happens to the VM.
#[derive(Clone)]
pub struct Publisher {
    notes: Notes,
    underway: Arc<Underway>,
    most: usize,
}

impl Server {
    /// Listens in the place that is claimed, and at another path as well if one is given.
    ///
    /// # Errors
    ///
    /// A path is taken or cannot be bound to; the host starts no thread.
    pub fn start(
        claim: &Claim,
        socket: Option<&Path>,
        subject: Arc<dyn Subject>,
    ) -> Result<Server> {
        Server::start_with(claim, socket, subject, Limits::default())
    }

    pub(super) fn start_with(
        claim: &Claim,
        socket: Option<&Path>,
        subject: Arc<dyn Subject>,
        limits: Limits,
    ) -> Result<Server> {
        let path = claim.folder().path().join(SOCKET);
        let listener = Listener::bind(&path)?;
        // A name leads anywhere once the folder has been exchanged.
        let stat = claim.folder().stat(SOCKET);
        if !stat.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == listener.made()) {
            let folder = claim.folder().path().display();
            let message = format!("`{folder}` is not the folder that was locked any more");
            return Err(Error::failed(message).help("start the VM again"));
        }
        let mut listeners = vec![listener];
        if let Some(socket) = socket {
            // It stays what it is when the working directory changes.
            let socket = std::path::absolute(socket).map_err(|error| {
                Error::failed(format!("cannot listen at `{}`: {error}", socket.display()))
            })?;
            listeners.push(Listener::bind_again(&socket)?);
        }
        let failed = |error: std::io::Error| {
            Error::failed(format!("cannot start the control socket: {error}"))
        };
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(|errno| failed(errno.into()))?);
        let (sender, received) = mpsc::channel();
        let notes = Notes {
            sender,
            wake: wake.clone(),
        };
        let underway = Arc::new(Underway::default());
        let publisher = Publisher {
            notes: notes.clone(),
            underway: underway.clone(),
            most: limits.events,
        };
        let control = Loop::new(listeners, subject, limits, notes, received, wake, underway);
        // Dropped when the thread has ended, whatever the reason.
        let (alive, ended) = mpsc::channel();
        let thread = thread::Builder::new().name("control".to_owned());
        let thread = thread.spawn(move || {
            let _alive = alive;
            control.run();
        });
        thread.map_err(failed)?;
        Ok(Server {
            publisher,
            ended: Some(ended),
        })
    }

    /// For events.
    pub fn publisher(&self) -> Publisher {
        self.publisher.clone()
    }

    /// Tells how the VM has ended to who asked for that and to the subscribers, and ends the
    /// connections. Takes two seconds at the most, where clients do not read.
    pub fn close(mut self, stopped: Stopped) {
        self.end(Some(stopped));
    }

    fn end(&mut self, stopped: Option<Stopped>) {
        let Some(ended) = self.ended.take() else {
            return;
        };
        self.publisher.notes.leave(Note::Close(stopped));
        if let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(PATIENCE) {
            tracing::warn!("the control socket does not end");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(None);
    }
}

impl Publisher {
    /// Sends an event to the subscribers. Never waits. When more are on their way than the
    /// thread can be behind with, the subscribers lose their connections rather than an event.
    pub fn publish(&self, event: Event) {
        if self.underway.count.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.underway.count.fetch_sub(1, Ordering::Relaxed);
            self.underway.lost.store(true, Ordering::Relaxed);
            return;
        }
        self.notes.leave(Note::Event(event));
    }
}

#[cfg(test)]
mod tests;
