//! The terminal on standard input: raw mode, and its end on every way out of the process.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::{panic, ptr};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// Whether the terminal is in raw mode: then a line feed alone does not return the carriage.
pub static RAW: AtomicBool = AtomicBool::new(false);

/// The settings to go back to, for the handler of fatal signals. Set once, never freed.
static SAVED: AtomicPtr<libc::termios> = AtomicPtr::new(ptr::null_mut());

/// Raw mode, for as long as it lives.
pub struct RawMode {
    saved: Termios,
}

impl RawMode {
    /// Puts the terminal on standard input into raw mode, so that every key reaches the guest.
    /// `None` if standard input is no terminal, or one that a job in the foreground uses.
    pub fn enter() -> io::Result<Option<RawMode>> {
        if !in_foreground() {
            return Ok(None);
        }
        let stdin = rustix::stdio::stdin();
        let saved = tcgetattr(stdin)?;
        prepare_for_the_worst();
        let mode = RawMode { saved };
        mode.apply()?;
        Ok(Some(mode))
    }

    /// Sets raw mode (again: after the process was stopped, the shell has set its own).
    pub fn apply(&self) -> io::Result<()> {
        let mut raw = self.saved.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
        RAW.store(true, Ordering::SeqCst);
        Ok(())
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        RAW.store(false, Ordering::SeqCst);
        if let Err(error) = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.saved) {
            tracing::warn!("the terminal stays in raw mode (type `reset`): {error}");
        }
    }
}

/// Whether standard input is a terminal.
pub fn is_input() -> bool {
    rustix::termios::isatty(rustix::stdio::stdin())
}

/// Whether standard input is a terminal and this process may use it: job control keeps a
/// background job away from its own terminal, and has no say about any other.
fn in_foreground() -> bool {
    is_input()
        && tcgetpgrp(rustix::stdio::stdin())
            .map_or(true, |group| group == rustix::process::getpgrp())
}

/// Saves the settings where a panic or a fatal signal finds them, and catches both.
fn prepare_for_the_worst() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut settings = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the pointer is valid for a write of a whole `termios`.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) } != 0 {
            return;
        }
        // SAFETY: tcgetattr has succeeded, so it has filled the structure in.
        let settings = unsafe { settings.assume_init() };
        SAVED.store(Box::leak(Box::new(settings)), Ordering::SeqCst);

        let default = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            restore();
            default(info);
        }));
        for signal in [
            libc::SIGABRT,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGSEGV,
        ] {
            restore_on(signal);
        }
    });
}

/// Goes back to the settings before raw mode. Async-signal-safe.
fn restore() {
    let saved = SAVED.load(Ordering::SeqCst);
    if !saved.is_null() && RAW.swap(false, Ordering::SeqCst) {
        // SAFETY: a pointer in `SAVED` is a leaked box that nobody writes to any more.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, saved) };
    }
}

extern "C" fn on_fatal_signal(signal: libc::c_int) {
    restore();
    // SAFETY: `raise` is async-signal-safe. The default action is in force again (SA_RESETHAND),
    // so that the process ends as it would have.
    unsafe { libc::raise(signal) };
}

/// Restores the terminal before `signal` ends the process as it always does.
fn restore_on(signal: libc::c_int) {
    // SAFETY: all zeroes is a valid `sigaction`: no flags, an empty mask, the default action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_fatal_signal as *const () as libc::sighandler_t;
    // On the alternate stack that the standard library gives its threads: a stack overflow, too,
    // ends here.
    action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER | libc::SA_ONSTACK;
    // SAFETY: the structure is initialised and the handler is async-signal-safe.
    if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } != 0 {
        tracing::debug!(
            "signal {signal} cannot be caught: {}",
            io::Error::last_os_error()
        );
    }
}
