//! What this process inherits and expects of signals.

use std::ptr;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_is_told_from_one_with_its_default_action() {
        assert!(!is_ignored(libc::SIGWINCH));
        // The standard library starts programs so.
        assert!(is_ignored(libc::SIGPIPE));
    }
}
