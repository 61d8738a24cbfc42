//! Waiting without io_uring: for the pool's threads and for files that become readable.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::op::Request;
use super::table::Token;
use super::tasks::Ready;

/// The files waited for.
#[derive(Default)]
pub(super) struct Waits {
    polls: Vec<libc::pollfd>,
    tokens: Vec<Token>,
}

impl Waits {
    pub(super) fn push(&mut self, token: Token, request: &Request) {
        self.tokens.push(token);
        self.polls.push(pollfd(request.file.as_raw_fd()));
    }

    /// Ends a wait; it is reported at once.
    pub(super) fn cancel(&mut self, token: Token, done: &mut Vec<(Token, i32)>) {
        if let Some(at) = self.tokens.iter().position(|other| *other == token) {
            self.tokens.swap_remove(at);
            self.polls.swap_remove(at);
            done.push((token, -libc::ECANCELED));
        }
    }

    /// Looks, or with `wait` waits, for files that are readable and for a notification.
    pub(super) fn enter(&mut self, ready: &Ready, wait: bool, done: &mut Vec<(Token, i32)>) {
        if !wait && self.tokens.is_empty() {
            return;
        }
        self.polls.push(pollfd(ready.as_fd().as_raw_fd()));
        let timeout = if wait { -1 } else { 0 };
        // SAFETY: the pointer and the length are those of one vector.
        let count = unsafe { libc::poll(self.polls.as_mut_ptr(), self.polls.len() as _, timeout) };
        let notified = self.polls.pop().is_some_and(|own| own.revents != 0);
        if count < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                tracing::error!(%error, "poll failed");
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            return;
        }
        if notified {
            ready.clear();
        }
        for at in (0..self.tokens.len()).rev() {
            let revents = self.polls[at].revents;
            if revents != 0 {
                done.push((self.tokens.swap_remove(at), i32::from(revents)));
                self.polls.swap_remove(at);
            }
        }
    }
}

fn pollfd(fd: i32) -> libc::pollfd {
    libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    }
}
