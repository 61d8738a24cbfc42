//! Writes that the driver was told are complete, and that only this process has: of a qcow2 image,
//! those for which it has made room since the last flush.
//!
//! To a driver that goes on with another device when this process is killed they are lost, as the
//! cache of a disk whose power fails; but no power has failed, and nobody tells the driver. So a
//! transport keeps a record, and the next device fails a flush. That is what a flush that fails
//! means: what was written since the one before may not be there.

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::Arc;

use formats::Disk;

/// A transport's record of whether there are such writes. It outlives this process.
pub trait Unflushed: Send + Sync {
    /// Whether an earlier device has taken such writes with it, and the driver was not told.
    fn is_lost(&self) -> bool;
    /// Whether it is this device that has such writes: it was reset, and has not flushed since.
    fn is_held(&self) -> bool;
    /// There are some, or will be before the driver is told of the next request. From now on it
    /// is this device that has them.
    fn hold(&self);
    /// There are none any more.
    fn release(&self);
}

/// What the record says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Nothing: there is no record.
    #[default]
    Unrecorded,
    /// Every completed write would survive this process.
    Safe,
    /// Some would not.
    Held,
    /// Some have not survived an earlier one.
    Lost,
}

/// The disk's side of it.
#[derive(Default)]
pub(super) struct Ledger {
    record: RefCell<Option<Arc<dyn Unflushed>>>,
    state: Cell<State>,
}

impl Ledger {
    /// Goes on with a record, or without.
    pub(super) fn open(&self, record: Option<Arc<dyn Unflushed>>) {
        self.state.set(match &record {
            None => State::Unrecorded,
            Some(record) if record.is_lost() => State::Lost,
            Some(record) if record.is_held() => State::Held,
            Some(_) => State::Safe,
        });
        *self.record.borrow_mut() = record;
    }

    fn change(&self, state: State, tell: impl FnOnce(&dyn Unflushed)) {
        self.state.set(state);
        if let Some(record) = &*self.record.borrow() {
            tell(&**record);
        }
    }

    /// A write has completed that is not flushed; its driver will be told next.
    pub(super) fn completed(&self, disk: &dyn Disk) {
        if self.state.get() == State::Safe && disk.volatile() {
            self.change(State::Held, |record| record.hold());
        }
    }

    /// A flush has succeeded.
    pub(super) fn flushed(&self, disk: &dyn Disk) {
        if self.state.get() == State::Held && !disk.volatile() {
            self.change(State::Safe, |record| record.release());
        }
    }

    /// Asked before the driver is told that something is durable: once, that is an error.
    pub(super) fn check(&self) -> io::Result<()> {
        if self.state.get() != State::Lost {
            return Ok(());
        }
        // Should this process be killed before the driver has the answer, it is told again.
        self.change(State::Held, |record| record.hold());
        Err(io::Error::other(
            "the server before was killed and has taken completed writes with it; the guest is told once",
        ))
    }
}
