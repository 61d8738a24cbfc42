//! What there is between closing a disk and opening it again.

use std::io::ErrorKind;

use crate::{Disk, Limits, Pending, Segments};

/// A disk that is closed.
pub(super) struct Closed;

impl Disk for Closed {
    fn size(&self) -> u64 {
        0
    }

    fn limits(&self) -> Limits {
        Limits {
            alignment: 1,
            memory_alignment: 1,
            optimal_io: 512,
            discard_granularity: 0,
            write_zeroes: false,
            resize: false,
        }
    }

    fn read(&self, _: u64, _: Segments) -> Pending<'_> {
        closed()
    }

    fn write(&self, _: u64, _: Segments) -> Pending<'_> {
        closed()
    }

    fn flush(&self) -> Pending<'_> {
        closed()
    }

    fn discard(&self, _: u64, _: u64) -> Pending<'_> {
        closed()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Pending<'_> {
        closed()
    }

    fn resize(&self, _: u64) -> Pending<'_> {
        closed()
    }

    fn close(self: Box<Self>) -> Pending<'static> {
        closed()
    }
}

fn closed() -> Pending<'static> {
    Box::pin(std::future::ready(Err(ErrorKind::NotConnected.into())))
}
