//! The signals that mean something to a VM.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};

use crate::{Error, Result, signals};

/// The signals that were caught and not looked at yet.
pub(super) struct Signals(UnixStream);

impl Signals {
    /// Catches them from now on.
    pub(super) fn catch() -> Result<Signals> {
        let failed = |what: &'static str| {
            move |error: io::Error| Error::failed(format!("cannot {what}: {error}"))
        };
        let (signals, sender) = UnixStream::pair().map_err(failed("make a socket pair"))?;
        signals
            .set_nonblocking(true)
            .map_err(failed("set up a socket pair"))?;
        let caught = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT];
        for signal in caught {
            // A parent that ignores them (nohup, a shell's job in the background) wants it so.
            if signal != SIGTERM && signals::is_ignored(signal) {
                continue;
            }
            // Each signal writes a byte of its own kind; the byte is what tells them apart.
            let sender = sender.try_clone().map_err(failed("copy a socket"))?;
            register(signal, sender).map_err(failed("catch signals"))?;
        }
        signals::unblock(caught);
        Ok(Signals(signals))
    }

    /// Readable when there are some.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Takes those that have come.
    pub(super) fn take(&mut self) -> Vec<i32> {
        let mut bytes = [0; 64];
        let count = self.0.read(&mut bytes).unwrap_or(0);
        bytes[..count].iter().copied().map(i32::from).collect()
    }
}

/// Has the handler of `signal` write its number to `sender`.
fn register(signal: i32, sender: UnixStream) -> io::Result<()> {
    sender.set_nonblocking(true)?;
    let action = move || {
        // Full means that unread signals wait already.
        let _ = rustix::io::write(&sender, &[signal as u8]);
    };
    // SAFETY: the action is async-signal-safe: it does nothing but one write(2) to a socket that
    // it owns, without allocation or lock.
    unsafe { signal_hook::low_level::register(signal, action) }?;
    Ok(())
}

/// A signal's name.
pub(super) fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("signal")
}
