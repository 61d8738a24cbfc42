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

/// The signals that end a process unless it asks for them, which this one never does.
const FATAL: [libc::c_int; 16] = [
    libc::SIGABRT,
    libc::SIGALRM,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGIO,
    libc::SIGPROF,
    libc::SIGPWR,
    libc::SIGSEGV,
    libc::SIGSTKFLT,
    libc::SIGSYS,
    libc::SIGTRAP,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGVTALRM,
    libc::SIGXCPU,
];

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

    /// Sets raw mode (again: after the process was stopped, the shell has set its own). Only in
    /// the foreground: elsewhere it would stop the process.
    pub fn apply(&self) -> io::Result<()> {
        let mut raw = self.saved.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
        RAW.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Goes back to the settings before raw mode, until [`RawMode::apply`].
    pub fn leave(&self) {
        // In the background the settings are the shell's, and not ours to touch.
        if !RAW.swap(false, Ordering::SeqCst) || !in_foreground() {
            return;
        }
        if let Err(error) = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.saved) {
            tracing::warn!("the terminal stays in raw mode (type `reset`): {error}");
        }
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Whether standard input is a terminal.
pub fn is_input() -> bool {
    rustix::termios::isatty(rustix::stdio::stdin())
}

/// Whether standard input is a terminal and this process may use it: job control stops a
/// background job that reads its own terminal or sets it, and has no say about any other.
pub fn in_foreground() -> bool {
    is_input()
        && match tcgetpgrp(rustix::stdio::stdin()) {
            Ok(group) => group == rustix::process::getpgrp(),
            Err(error) => error == rustix::io::Errno::NOTTY,
        }
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
        FATAL.into_iter().for_each(restore_on);
    });
}

/// Goes back to the settings before raw mode. Async-signal-safe.
fn restore() {
    let saved = SAVED.load(Ordering::SeqCst);
    // SAFETY: neither call takes a pointer, and both are async-signal-safe.
    let background = unsafe {
        let group = libc::tcgetpgrp(libc::STDIN_FILENO);
        group != -1 && group != libc::getpgrp()
    };
    if !saved.is_null() && RAW.swap(false, Ordering::SeqCst) && !background {
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
    if crate::signals::is_ignored(signal) {
        return;
    }
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
