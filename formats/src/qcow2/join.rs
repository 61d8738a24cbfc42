//! Several operations at once.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use smallvec::SmallVec;

use crate::Pending;

/// Operations that are under way together. It is done when all are, with the first error.
#[derive(Default)]
pub(super) struct Join<'a> {
    operations: SmallVec<[Pending<'a>; 4]>,
    error: Option<io::Error>,
}

impl<'a> Join<'a> {
    /// Adds an operation, which begins when this is polled next.
    pub(super) fn add(&mut self, operation: Pending<'a>) {
        self.operations.push(operation);
    }
}

impl Future for Join<'_> {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut at = 0;
        while let Some(operation) = this.operations.get_mut(at) {
            match operation.as_mut().poll(cx) {
                Poll::Pending => at += 1,
                Poll::Ready(result) => {
                    drop(this.operations.swap_remove(at));
                    if let Err(error) = result {
                        this.error.get_or_insert(error);
                    }
                }
            }
        }
        match this.operations.is_empty() {
            true => Poll::Ready(this.error.take().map_or(Ok(()), Err)),
            false => Poll::Pending,
        }
    }
}
