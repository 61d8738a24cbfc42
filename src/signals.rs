//! What this process inherits and expects of signals.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::ptr;

use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};

use crate::{Error, Result};

/// Whether `signal` is ignored: a parent that had it ignored, as nohup(1) does, wants it so.
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: all zeroes is a valid `sigaction`, which the call overwrites.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action nothing is changed; the pointer is valid for a write.
    let asked = unsafe { libc::sigaction(signal, ptr::null(), &mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Lets `signals` through to this thread and those that it starts, whatever a parent has blocked.
pub(crate) fn unblock(signals: impl IntoIterator<Item = libc::c_int>) {
    // SAFETY: all zeroes is a valid set, and sigemptyset makes it the empty one anyway.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointers are valid; a number that is no signal is refused, and changes nothing.
    unsafe {
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut());
    }
}

/// The signals with which a user, a shell or a terminal ends or stops a process, caught: those that have come and were
/// not looked at yet.
pub(crate) struct Signals(UnixStream);

impl Signals {
    /// Catches them from now on.
    pub(crate) fn catch() -> Result<Signals> {
        Signals::catch_only(&[SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT])
    }

    /// Catches some of them from now on.
    pub(crate) fn catch_only(caught: &[libc::c_int]) -> Result<Signals> {
        let failed = |what: &'static str| {
            move |error: io::Error| Error::failed(format!("cannot {what}: {error}"))
        };
        let (signals, sender) = UnixStream::pair().map_err(failed("make a socket pair"))?;
        signals
            .set_nonblocking(true)
            .map_err(failed("set up a socket pair"))?;
        for &signal in caught {
            // A parent that ignores them (nohup, a shell's job in the background) wants it so.
            if signal != SIGTERM && is_ignored(signal) {
                continue;
            }
            // Each signal writes a byte of its own kind; the byte is what tells them apart.
            let sender = sender.try_clone().map_err(failed("copy a socket"))?;
            register(signal, sender).map_err(failed("catch signals"))?;
        }
        unblock(caught.iter().copied());
        Ok(Signals(signals))
    }

    /// Readable when there are some.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Takes those that have come.
    pub(crate) fn take(&mut self) -> Vec<i32> {
        let mut bytes = [0; 64];
        let count = self.0.read(&mut bytes).unwrap_or(0);
        bytes[..count].iter().copied().map(i32::from).collect()
    }
}

/// The keys of a terminal that end a process, which mean nothing to this one while this is there:
/// as while system(3) waits for another.
pub(crate) struct KeysIgnored(Actions);

/// What SIGINT and SIGQUIT do.
#[derive(Clone, Copy)]
pub(crate) struct Actions([libc::sigaction; 2]);

const KEYS: [libc::c_int; 2] = [libc::SIGINT, libc::SIGQUIT];

impl KeysIgnored {
    /// Ignores them from now on.
    pub(crate) fn begin() -> Self {
        KeysIgnored(Actions(KEYS.map(|signal| {
            // SAFETY: all zeroes is a valid `sigaction`: no flags, no mask.
            let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
            let ignore = libc::sigaction {
                sa_sigaction: libc::SIG_IGN,
                ..before
            };
            // SAFETY: both are valid; to ignore a signal runs no handler.
            unsafe { libc::sigaction(signal, &ignore, &mut before) };
            before
        })))
    }

    /// What they did before, for a process that is started meanwhile.
    pub(crate) fn before(&self) -> Actions {
        self.0
    }
}

impl Drop for KeysIgnored {
    fn drop(&mut self) {
        self.0.set();
    }
}

impl Actions {
    /// Has the signals do this. Two system calls, which are async-signal-safe.
    pub(crate) fn set(&self) {
        for (signal, action) in KEYS.iter().zip(&self.0) {
            // SAFETY: it is what sigaction(2) has said the signal did, in this process or in the
            // one that it was forked from; the old action is not asked for.
            unsafe { libc::sigaction(*signal, action, ptr::null_mut()) };
        }
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
pub(crate) fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("signal")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_is_told_from_one_with_its_default_action() {
        assert!(!is_ignored(libc::SIGWINCH));
        // The standard library starts programs so.
        assert!(is_ignored(libc::SIGPIPE));
    }

    #[test]
    fn keys_that_were_ignored_for_a_time_do_what_they_did() {
        let ignored = || [libc::SIGINT, libc::SIGQUIT].map(is_ignored);
        // In a script's background they are ignored from the first on.
        let before = ignored();
        let keys = KeysIgnored::begin();
        assert_eq!(ignored(), [true; 2]);
        drop(keys);
        assert_eq!(ignored(), before);
    }
}
