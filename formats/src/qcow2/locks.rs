//! Exclusive use of ranges of numbers, among the tasks of one thread.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};

/// Locks of ranges: of clusters, of tables. Overlapping ones are given out in the order in which
/// they were asked for.
#[derive(Default)]
pub(super) struct Locks {
    /// Those that are held and those that wait, oldest first.
    tickets: RefCell<VecDeque<Ticket>>,
    next: Cell<u64>,
}

struct Ticket {
    id: u64,
    range: Range<u64>,
    waker: Option<Waker>,
}

/// A lock that is held, or asked for, until it is dropped.
pub(super) struct Held<'a> {
    locks: &'a Locks,
    id: u64,
}

impl Locks {
    /// Waits until nothing that overlaps `range` is held.
    pub(super) async fn lock(&self, range: Range<u64>) -> Held<'_> {
        let id = self.next.get();
        self.next.set(id + 1);
        self.tickets.borrow_mut().push_back(Ticket {
            id,
            range,
            waker: None,
        });
        let held = Held { locks: self, id };
        poll_fn(|cx| {
            let mut tickets = self.tickets.borrow_mut();
            let at = tickets.partition_point(|ticket| ticket.id < id);
            let Some(range) = tickets.get(at).map(|ticket| ticket.range.clone()) else {
                return Poll::Ready(());
            };
            if !tickets
                .range(..at)
                .any(|other| overlap(&other.range, &range))
            {
                return Poll::Ready(());
            }
            tickets[at].waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        held
    }

    /// Whether something is held.
    pub(super) fn is_held(&self) -> bool {
        !self.tickets.borrow().is_empty()
    }

    /// For what there is only one of.
    pub(super) async fn only(&self) -> Held<'_> {
        self.lock(0..1).await
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut tickets = self.locks.tickets.borrow_mut();
        let at = tickets.partition_point(|ticket| ticket.id < self.id);
        let Some(gone) = tickets.remove(at) else {
            return;
        };
        for later in tickets.range_mut(at..) {
            if overlap(&later.range, &gone.range)
                && let Some(waker) = later.waker.take()
            {
                waker.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::testing::run;
    use crate::{Engine, Ring};

    #[test]
    fn overlapping_ranges_are_locked_in_turn_and_others_at_once() {
        let ring = Ring::new(Engine::Threads).unwrap();
        let locks = Rc::new(Locks::default());
        let order = Rc::new(RefCell::new(Vec::new()));
        run(&ring, async {
            let held = locks.lock(4..8).await;
            for (name, range) in [("a", 7..9), ("b", 8..9), ("c", 0..4), ("d", 0..5)] {
                let (locks, order) = (Rc::clone(&locks), Rc::clone(&order));
                ring.spawn(async move {
                    let _held = locks.lock(range).await;
                    order.borrow_mut().push(name);
                });
            }
            ring.yield_now().await;
            // `b` waits for `a`, which came first.
            assert_eq!(*order.borrow(), ["c"]);
            drop(held);
            while order.borrow().len() < 4 {
                ring.yield_now().await;
            }
            assert!(locks.tickets.borrow().is_empty());
        });
        let order = order.borrow();
        let place = |name| order.iter().position(|other| *other == name);
        assert!(place("a") < place("b"));
    }

    #[test]
    fn one_that_no_longer_waits_is_in_nobody_s_way() {
        let ring = Ring::new(Engine::Threads).unwrap();
        let locks = Locks::default();
        run(&ring, async {
            let held = locks.only().await;
            let mut waiting = Box::pin(locks.only());
            let mut cx = std::task::Context::from_waker(Waker::noop());
            assert!(waiting.as_mut().poll(&mut cx).is_pending());
            drop(waiting);
            drop(held);
            let _held = locks.only().await;
        });
    }
}
