//! Read/write locks on ranges of clusters: what keeps operations apart that the crate does not.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::RangeInclusive;
use std::task::{Poll, Waker};

/// Which of the operations under way exclude each other, in the order in which they came.
///
/// One that has to wait lets none past that came later and that it would have to wait for too:
/// every one gets its turn.
#[derive(Default)]
pub(crate) struct Exclusion {
    claims: RefCell<Vec<Claim>>,
    next: Cell<u64>,
}

struct Claim {
    id: u64,
    clusters: RangeInclusive<u64>,
    exclusive: bool,
    /// Waits.
    waker: Option<Waker>,
}

impl Claim {
    fn conflicts(&self, other: &Claim) -> bool {
        let apart = self.clusters.end() < other.clusters.start()
            || other.clusters.end() < self.clusters.start();
        !apart && (self.exclusive || other.exclusive)
    }
}

/// A range that is held until this is dropped.
#[must_use = "the range is free as soon as this is dropped"]
pub(crate) struct Held<'a> {
    exclusion: &'a Exclusion,
    id: u64,
}

impl Exclusion {
    /// Waits until no one holds any of the clusters exclusively.
    pub(crate) async fn share(&self, clusters: RangeInclusive<u64>) -> Held<'_> {
        self.claim(clusters, false).await
    }

    /// Waits until no one else holds any of the clusters.
    pub(crate) async fn exclude(&self, clusters: RangeInclusive<u64>) -> Held<'_> {
        self.claim(clusters, true).await
    }

    async fn claim(&self, clusters: RangeInclusive<u64>, exclusive: bool) -> Held<'_> {
        let id = self.next.get();
        self.next.set(id + 1);
        self.claims.borrow_mut().push(Claim {
            id,
            clusters,
            exclusive,
            waker: None,
        });
        // From here on the claim goes with it, even if this future is dropped early.
        let held = Held {
            exclusion: self,
            id,
        };
        poll_fn(|cx| {
            let mut claims = self.claims.borrow_mut();
            let Some(at) = claims.iter().position(|claim| claim.id == id) else {
                return Poll::Ready(());
            };
            let (earlier, rest) = claims.split_at_mut(at);
            let Some(own) = rest.first_mut() else {
                return Poll::Ready(());
            };
            if earlier.iter().any(|claim| claim.conflicts(own)) {
                own.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            own.waker = None;
            Poll::Ready(())
        })
        .await;
        held
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut claims = self.exclusion.claims.borrow_mut();
        let Some(at) = claims.iter().position(|claim| claim.id == self.id) else {
            return;
        };
        let gone = claims.remove(at);
        let waiting = claims[at..].iter_mut().filter(|it| it.conflicts(&gone));
        let wakers: Vec<Waker> = waiting.filter_map(|it| it.waker.take()).collect();
        drop(claims);
        wakers.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::Context;

    use super::*;

    /// Whether a future is done when it is polled once.
    fn done<T>(future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }

    #[test]
    fn sharers_do_not_wait_for_each_other() {
        let exclusion = Exclusion::default();
        let first = done(pin!(exclusion.share(0..=9)));
        let second = done(pin!(exclusion.share(5..=5)));
        assert!(first.is_some() && second.is_some());
    }

    #[test]
    fn an_exclusive_holder_has_its_clusters_for_itself_and_no_others() {
        let exclusion = Exclusion::default();
        let held = done(pin!(exclusion.exclude(4..=6))).unwrap();
        for overlapping in [0..=4, 5..=5, 6..=9, 0..=9] {
            assert!(done(pin!(exclusion.share(overlapping.clone()))).is_none());
            assert!(done(pin!(exclusion.exclude(overlapping))).is_none());
        }
        assert!(done(pin!(exclusion.exclude(0..=3))).is_some());
        assert!(done(pin!(exclusion.exclude(7..=9))).is_some());
        drop(held);
        assert!(done(pin!(exclusion.exclude(0..=9))).is_some());
    }

    #[test]
    fn an_exclusive_claim_waits_for_those_who_share() {
        let exclusion = Exclusion::default();
        let held = done(pin!(exclusion.share(1..=1))).unwrap();
        let mut waiting = pin!(exclusion.exclude(0..=2));
        assert!(done(waiting.as_mut()).is_none());
        drop(held);
        assert!(done(waiting).is_some());
    }

    #[test]
    fn nobody_is_overtaken_by_those_it_excludes() {
        let exclusion = Exclusion::default();
        let held = done(pin!(exclusion.share(1..=1))).unwrap();
        let mut writer = pin!(exclusion.exclude(1..=2));
        assert!(done(writer.as_mut()).is_none());
        let mut reader = pin!(exclusion.share(2..=2));
        assert!(done(reader.as_mut()).is_none());
        drop(held);
        let writing = done(writer).unwrap();
        assert!(done(reader.as_mut()).is_none());
        drop(writing);
        assert!(done(reader).is_some());
    }

    #[test]
    fn one_who_no_longer_waits_is_in_nobody_s_way() {
        let exclusion = Exclusion::default();
        let held = done(pin!(exclusion.share(1..=1))).unwrap();
        {
            let mut given_up = pin!(exclusion.exclude(1..=1));
            assert!(done(given_up.as_mut()).is_none());
        }
        assert!(done(pin!(exclusion.share(1..=1))).is_some());
        drop(held);
        assert!(exclusion.claims.borrow().is_empty());
    }
}
