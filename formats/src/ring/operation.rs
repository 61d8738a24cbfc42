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
    pub(super) ring: Ring,
    token: Option<Token>,
    #[cfg(any(test, feature = "faults"))]
    pub(super) watch: super::recorder::Watch,
}

impl Operation {
    pub(super) fn new(ring: Ring, token: Token) -> Self {
        Operation {
            ring,
            token: Some(token),
            #[cfg(any(test, feature = "faults"))]
            watch: Default::default(),
        }
    }

    /// Begins the operation, or looks whether it is complete.
    pub(super) fn advance(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(token) = self.token else {
            return Poll::Ready(Err(io::Error::other("polled after its completion")));
        };
        let result = self.ring.0.poll(token, cx.waker());
        if result.is_ready() {
            self.token = None;
        }
        result
    }

    /// Looks at what is asked for, as long as it is not complete.
    #[cfg(any(test, feature = "faults"))]
    pub(super) fn with_request<T>(&self, look: impl FnOnce(&super::op::Request) -> T) -> Option<T> {
        let mut table = self.ring.0.table.borrow_mut();
        table.request(self.token?).map(|request| look(request))
    }
}

impl Future for Operation {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        #[cfg(any(test, feature = "faults"))]
        return super::recorder::poll(&mut self, cx);
        #[cfg(not(any(test, feature = "faults")))]
        self.advance(cx)
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
