//! The futures that a ring's operations are.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::Ring;
use super::table::Token;

/// An operation; its result is a number of bytes or, for a wait, `POLL` bits. It begins when it
/// is first polled. Dropped early, it goes on, and the ring keeps its memory.
#[must_use = "an operation begins when it is awaited"]
pub struct Operation {
    ring: Ring,
    token: Option<Token>,
}

impl Operation {
    pub(super) fn new(ring: Ring, token: Token) -> Self {
        Operation {
            ring,
            token: Some(token),
        }
    }
}

impl Future for Operation {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(token) = self.token else {
            return Poll::Ready(Err(io::Error::other("polled after its completion")));
        };
        let result = self.ring.0.poll(token, cx.waker());
        if result.is_ready() {
            self.token = None;
        }
        result
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if let Some(token) = self.token {
            self.ring.0.abandon(token);
        }
    }
}

/// An operation that is whole or an error.
#[must_use = "an operation begins when it is awaited"]
pub struct Whole(pub(super) Operation);

impl Future for Whole {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map_ok(drop)
    }
}
