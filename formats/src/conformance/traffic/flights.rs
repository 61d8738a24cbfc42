//! What the operations in flight share: the model, and what was done when.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::task::Waker;

use super::super::content::{SECTOR, Value};
use super::super::model::{self, Candidate, Model};
use super::{Act, What};
use crate::Recorder;

/// An operation in flight.
pub(super) struct Flight {
    pub(super) id: u64,
    pub(super) sectors: Range<u64>,
    pub(super) changes: bool,
    /// Of a read: changes that were in flight while it was.
    pub(super) disturbed: Vec<(Range<u64>, Value)>,
}

/// What the operations in flight share.
pub(super) struct Shared {
    pub(super) model: RefCell<Model>,
    pub(super) flying: RefCell<Vec<Flight>>,
    pub(super) acts: RefCell<Vec<Act>>,
    pub(super) failure: RefCell<Option<String>>,
    pub(super) waiting: Cell<Option<Waker>>,
    pub(super) recorder: Recorder,
}

impl Shared {
    pub(super) fn fail(&self, message: String) {
        self.failure.borrow_mut().get_or_insert(message);
    }

    pub(super) fn land(&self, id: u64) -> Option<Flight> {
        let mut flying = self.flying.borrow_mut();
        let at = flying.iter().position(|flight| flight.id == id);
        let flight = at.map(|at| flying.swap_remove(at));
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
        flight
    }

    /// A change of these sectors is about to be asked for.
    pub(super) fn begin_change(&self, sectors: &Range<u64>, value: Value) {
        for flight in self.flying.borrow_mut().iter_mut() {
            if !flight.changes && overlap(&flight.sectors, sectors) {
                flight.disturbed.push((sectors.clone(), value));
            }
        }
        self.model.borrow_mut().begin(sectors.clone(), value);
    }

    pub(super) fn act(&self, what: What) -> (usize, u64) {
        let began = self.recorder.now();
        let mut acts = self.acts.borrow_mut();
        acts.push(Act {
            what,
            began,
            ended: u64::MAX,
        });
        (acts.len() - 1, began)
    }

    pub(super) fn acted(&self, act: usize) -> u64 {
        let now = self.recorder.now();
        self.acts.borrow_mut()[act].ended = now;
        now
    }

    /// The last acts that a sector has seen.
    fn acts_on(&self, sector: u64) -> Vec<Act> {
        let touches = |act: &&Act| match &act.what {
            What::Change { sectors, .. } => sectors.contains(&sector),
            What::Flush | What::Resize { .. } => true,
        };
        let acts = self.acts.borrow();
        let mut last: Vec<_> = acts.iter().rev().filter(touches).take(8).cloned().collect();
        last.reverse();
        last
    }

    /// Compares what was read with what may have been there.
    pub(super) fn compare(&self, flight: &Flight, before: Option<&[model::Cell]>, found: &[u8]) {
        let mut model = self.model.borrow_mut();
        let mut want = [0; SECTOR as usize];
        for (i, bytes) in found.chunks(SECTOR as usize).enumerate() {
            let sector = flight.sectors.start + i as u64;
            let now = model.allowed(sector);
            let earlier = before.map_or(&[][..], |before| &before[i]);
            let meanwhile = flight.disturbed.iter().filter(|it| it.0.contains(&sector));
            let values = now
                .iter()
                .chain(earlier)
                .map(|candidate: &Candidate| candidate.value)
                .chain(meanwhile.map(|it| it.1));
            let mut torn = [false; SECTOR as usize];
            let mut value = None;
            for candidate in values {
                candidate.fill(sector, &mut want);
                if want == *bytes {
                    value = Some(candidate);
                    break;
                }
                if !flight.disturbed.is_empty() {
                    let equal = want.iter().zip(bytes).map(|(want, found)| want == found);
                    torn.iter_mut().zip(equal).for_each(|(to, it)| *to |= it);
                }
            }
            match value {
                Some(value) if flight.disturbed.is_empty() => model.settle(sector, value),
                Some(_) => {}
                // A page may be read while it is written to.
                None if torn.iter().all(|it| *it) => {}
                None => {
                    return self.fail(format!(
                        "read of {} sectors at {}: sector {sector} holds {}, expected {now:?} \
                         after {:?}",
                        found.len() as u64 / SECTOR,
                        flight.sectors.start,
                        Value::describe(bytes),
                        self.acts_on(sector),
                    ));
                }
            }
        }
    }
}

pub(super) fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
