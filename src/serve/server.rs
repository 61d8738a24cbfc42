//! The socket, and the front ends that come to it one after another.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use libc::SIGHUP;
use rustix::event::{EventfdFlags, PollFd, PollFlags, poll};

use super::backend::Backend;
use super::unflushed::Holder;
use super::{faults, session};
use crate::control::Listener;
use crate::devices::throttle::Throttle;
use crate::devices::virtio::blk::{Blk, BlkHandle};
use crate::signals::Signals;
use crate::{Error, Result, exit, signals};

/// A disk that is served at a socket.
pub(crate) struct Server {
    disk: Arc<Mutex<Blk>>,
    handle: BlkHandle,
    number: Holder,
    listener: Listener,
    session: Option<Session>,
    /// Signalled when a session has ended.
    ended: OwnedFd,
    faulted: BorrowedFd<'static>,
    warnings: Throttle,
    /// As [`Backend::new`] takes it.
    records: Arc<Throttle>,
}

/// A front end that is connected.
struct Session {
    /// To end it from here.
    stream: UnixStream,
    thread: JoinHandle<io::Result<()>>,
}

/// Signals an eventfd when it goes, in a panic too.
struct OnEnd(OwnedFd);

impl Drop for OnEnd {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// Takes an eventfd's counter; whether there was one.
fn taken(event: impl AsFd) -> bool {
    rustix::io::read(event, &mut [0; 8]).is_ok()
}

impl Server {
    /// Listens at a path: mode 0600. What another one who was killed has left there is replaced;
    /// a path where somebody listens is refused with exit code 4.
    pub(crate) fn new(disk: Blk, socket: &Path) -> Result<Server> {
        let failed = |error: io::Error| Error::failed(format!("cannot set up a server: {error}"));
        let listener = Listener::at(socket).map_err(|error| {
            let mut refused =
                Error::failed(format!("cannot listen at `{}`: {error}", socket.display()))
                    .help("name another place with `--socket PATH`");
            if error.kind() == io::ErrorKind::AddrInUse {
                refused.exit = exit::ALREADY_RUNNING;
            }
            refused
        })?;
        let ended = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Server {
            handle: disk.handle(),
            number: Holder::new().map_err(failed)?,
            disk: Arc::new(Mutex::new(disk)),
            listener,
            session: None,
            ended: ended.map_err(|error| failed(error.into()))?,
            faulted: faults::survive().map_err(failed)?,
            warnings: Throttle::default(),
            records: Arc::default(),
        })
    }

    /// Serves until a signal ends it; then flushes and closes the image. SIGHUP does not end it,
    /// but is passed on, to a thread of its own: what it has done may take long, and is given up
    /// at the end.
    pub(crate) fn run(
        mut self,
        signals: &mut Signals,
        on_hangup: impl Fn(&BlkHandle) + Send + 'static,
    ) -> Result<()> {
        let handle = self.handle.clone();
        // One that comes while another waits is the same.
        let (hangups, receiver) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("hangup".into())
            .spawn(move || receiver.iter().for_each(|()| on_hangup(&handle)))
            .map_err(|error| Error::failed(format!("cannot set up a server: {error}")))?;
        let served = self.serve(signals, &hangups);
        self.handle.give_up();
        if let Some(session) = self.session.take() {
            // Fails only if the front end is gone already.
            let _ = session.stream.shutdown(Shutdown::Both);
            self.end(session);
        }
        let disk = Arc::try_unwrap(self.disk)
            .map_err(|_| Error::failed("cannot close the disk: it is still in use"))?;
        let closed = disk.into_inner().unwrap_or_else(PoisonError::into_inner);
        let closed = closed.close().map_err(|error| {
            Error::failed(format!("cannot flush the disk: {error}"))
                .help("what was written last may be lost; check the host's disk")
        });
        served.and(closed)
    }

    fn serve(&mut self, signals: &mut Signals, hangups: &SyncSender<()>) -> Result<()> {
        loop {
            let signals_fd = signals.as_fd();
            let mut ready = vec![
                PollFd::from_borrowed_fd(signals_fd, PollFlags::IN),
                PollFd::from_borrowed_fd(self.ended.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.faulted, PollFlags::IN),
            ];
            // One at a time: the others wait in the listener's queue.
            if self.session.is_none() {
                ready.push(PollFd::from_borrowed_fd(
                    self.listener.as_fd(),
                    PollFlags::IN,
                ));
            }
            match poll(&mut ready, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::failed(format!("cannot wait: {error}"))),
            }
            drop(ready);
            for signal in signals.take() {
                match signal {
                    SIGHUP => drop(hangups.try_send(())),
                    signal => {
                        tracing::info!("{}: the disk is closed", signals::name(signal));
                        return Ok(());
                    }
                }
            }
            if taken(self.faulted)
                && let Some(session) = &self.session
            {
                self.warn("its memory has become shorter");
                let _ = session.stream.shutdown(Shutdown::Both);
            }
            if taken(&self.ended)
                && let Some(session) = self.session.take()
            {
                self.end(session);
            }
            if self.session.is_none() {
                self.accept();
            }
        }
    }

    /// Begins to serve the next front end, if there is one and the host has room for it.
    fn accept(&mut self) {
        match self.next_session() {
            Ok(session) => self.session = session,
            Err(error) => {
                self.warn(&format!("it cannot be served: {error}"));
                // It waits in the listener's queue still, or another one will.
                thread::sleep(Duration::from_millis(100));
            }
        }
    }

    fn next_session(&self) -> io::Result<Option<Session>> {
        let Some(stream) = self.listener.accept()? else {
            return Ok(None);
        };
        let ours = stream.try_clone()?;
        let (disk, on_end) = (Arc::clone(&self.disk), OnEnd(self.ended.try_clone()?));
        let (number, records) = (self.number, Arc::clone(&self.records));
        let thread = thread::Builder::new()
            .name("front end".into())
            .spawn(move || {
                // In this order: the disk is free when the end is told.
                let _on_end = on_end;
                session::serve(stream, Backend::new(disk, number, records))
            })?;
        tracing::info!("a front end has connected");
        Ok(Some(Session {
            stream: ours,
            thread,
        }))
    }

    /// A session is over, or about to be.
    fn end(&self, session: Session) {
        let ended = session.thread.join();
        // A fault of this one's, with its last request too, is none of the next one's.
        let faulted = taken(self.faulted);
        match ended {
            Err(_) => self.warn("its thread has panicked"),
            _ if faulted => self.warn("its memory has become shorter"),
            Ok(Ok(())) => tracing::info!("the front end has gone"),
            Ok(Err(error)) => self.warn(&error.to_string()),
        }
        let _ = taken(&self.ended);
    }

    fn warn(&self, why: &str) {
        if let Some(held_back) = self.warnings.pass() {
            tracing::warn!(held_back, "the front end is disconnected: {why}");
        }
    }
}
