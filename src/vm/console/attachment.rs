//! Connections that show the console: each with a thread that writes to it and one that reads.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::output::{Outlet, Output};
use super::{Console, Input, State};

/// Most attachments at a time.
const LIMIT: usize = 16;

/// Why a connection cannot be attached.
#[derive(Debug)]
pub(crate) enum AttachError {
    /// There are too many already.
    TooMany(usize),
    /// The VM is ending.
    Closed,
    /// The host has no more threads or open files.
    Host(io::Error),
}

/// A connection that shows the console.
pub(super) struct Attachment {
    id: u64,
    output: Output,
    connection: UnixStream,
}

impl Attachment {
    pub(super) fn push(&self, bytes: &[u8]) {
        self.output.push(bytes);
    }

    pub(super) fn end(&self) {
        self.output.end();
    }

    /// After [`Attachment::end`]: waits until all is written, but no longer than `patience` for
    /// one that takes nothing.
    pub(super) fn finish(self, patience: Duration) {
        // A write that hangs is at its end with the connection, and so is the read.
        let connection = self.connection;
        self.output.finish(patience);
        let _ = connection.shutdown(Shutdown::Both);
    }
}

impl Console {
    /// Shows the console at `connection`, what was printed before first if `scrollback`, and takes
    /// what is typed there. One that reads slowly misses some of it, and delays nobody.
    pub(crate) fn attach(
        self: &Arc<Self>,
        connection: UnixStream,
        scrollback: bool,
    ) -> Result<(), AttachError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let host = AttachError::Host;
        connection.set_nonblocking(false).map_err(host)?;
        connection.set_read_timeout(None).map_err(host)?;
        connection.set_write_timeout(None).map_err(host)?;
        let copy = || connection.try_clone().map_err(host);
        let (written, read, kept) = (copy()?, copy()?, copy()?);
        // Looked at again below, but nobody should have threads started in vain.
        if let Some(refusal) = self.refusal() {
            return Err(refusal);
        }
        let output = Output::start(Outlet::Attachment(written)).map_err(host)?;
        let mut state = self.lock();
        if let Some(refusal) = state.refusal() {
            output.end();
            return Err(refusal);
        }
        if scrollback {
            let (front, back) = state.scrollback.as_slices();
            output.push(front);
            output.push(back);
        }
        state.attachments.push(Attachment {
            id,
            output,
            connection: kept,
        });
        drop(state);
        let console = Arc::clone(self);
        let reader = std::thread::Builder::new()
            .name("attachment".into())
            .stack_size(128 << 10)
            .spawn(move || {
                read_keys(read, &console.input);
                console.detach(id);
            });
        reader.map(drop).map_err(|error| {
            self.detach(id);
            AttachError::Host(error)
        })
    }

    /// Why nobody can attach now.
    pub(crate) fn refusal(&self) -> Option<AttachError> {
        self.lock().refusal()
    }

    fn detach(&self, id: u64) {
        let mut state = self.lock();
        let index = state.attachments.iter().position(|found| found.id == id);
        let attachment = index.map(|index| state.attachments.swap_remove(index));
        drop(state);
        if let Some(attachment) = attachment {
            attachment.end();
            let _ = attachment.connection.shutdown(Shutdown::Both);
        }
    }

    /// Number of attachments.
    #[cfg(test)]
    pub(super) fn attached(&self) -> usize {
        self.lock().attachments.len()
    }
}

impl State {
    fn refusal(&self) -> Option<AttachError> {
        match self.attachments.len() {
            _ if self.closed => Some(AttachError::Closed),
            LIMIT.. => Some(AttachError::TooMany(LIMIT)),
            _ => None,
        }
    }
}

/// Gives what is typed to the guest until the other end is gone. One that only types no more
/// still watches.
fn read_keys(mut connection: UnixStream, input: &Input) {
    let mut buffer = [0; 1024];
    loop {
        match connection.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                let gone = || is_gone(&connection, Some(Duration::ZERO));
                if !input.push(&buffer[..count], || !gone()) {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
    is_gone(&connection, None);
}

/// Whether both directions are closed, waiting for that at most so long.
fn is_gone(connection: &UnixStream, wait: Option<Duration>) -> bool {
    let timeout = wait.map(|wait| Timespec {
        tv_sec: wait.as_secs() as _,
        tv_nsec: wait.subsec_nanos().into(),
    });
    // POLLHUP is told without being asked for.
    let mut fds = [PollFd::new(connection, PollFlags::empty())];
    loop {
        match poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true,
            Ok(ready) => return ready > 0,
        }
    }
}
