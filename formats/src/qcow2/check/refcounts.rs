//! Refcounts of a whole image in memory: pages that are there only where something is counted,
//! and only as wide as their largest value.

use std::cell::Cell;

use super::super::refcount;

/// Clusters of a page.
pub(in super::super) const PAGE: u64 = 1 << 15;
/// Most images count no further than to 3.
const FIRST_ORDER: u32 = 1;
/// The memory of all pages together: enough for 256 Mi clusters that are used up to 3 times.
const MAX_BYTES: usize = 64 << 20;

/// There is more to count than memory is given to.
#[derive(Debug)]
pub(in super::super) struct TooMany;

#[derive(Clone)]
struct Page {
    order: u32,
    bytes: Vec<u8>,
}

impl Page {
    fn new(order: u32) -> Page {
        Page {
            order,
            bytes: vec![0; Page::len(order)],
        }
    }

    fn len(order: u32) -> usize {
        (PAGE as usize) << order >> 3
    }
}

/// Neighbours are mostly asked for one after another: the page of the last one is found at once.
#[derive(Clone, Default)]
pub(in super::super) struct Refcounts {
    /// Sorted by their numbers.
    pages: Vec<(u64, Page)>,
    /// Length of all pages.
    len: usize,
    /// Where the last page that was asked for is.
    last: Cell<usize>,
}

impl Refcounts {
    /// Where a page is, or would be.
    fn find(&self, number: u64) -> Result<usize, usize> {
        let last = self.last.get();
        if self.pages.get(last).is_some_and(|page| page.0 == number) {
            return Ok(last);
        }
        let found = self.pages.binary_search_by_key(&number, |page| page.0);
        if let Ok(at) = found {
            self.last.set(at);
        }
        found
    }

    /// The refcount of a cluster.
    pub(in super::super) fn load(&self, cluster: u64) -> u64 {
        match self.find(cluster / PAGE).map(|at| &self.pages[at].1) {
            Ok(page) => refcount::load(&page.bytes, page.order, (cluster % PAGE) as usize),
            Err(_) => 0,
        }
    }

    pub(in super::super) fn store(&mut self, cluster: u64, value: u64) -> Result<(), TooMany> {
        let (number, index) = (cluster / PAGE, (cluster % PAGE) as usize);
        let at = match self.find(number) {
            Ok(at) => at,
            Err(_) if value == 0 => return Ok(()),
            Err(at) => {
                self.take(Page::len(FIRST_ORDER))?;
                self.pages.insert(at, (number, Page::new(FIRST_ORDER)));
                at
            }
        };
        let order = self.pages[at].1.order;
        if value > refcount::max(order) {
            let mut wider = order + 1;
            while value > refcount::max(wider) {
                wider += 1;
            }
            self.take(Page::len(wider) - Page::len(order))?;
            let mut page = Page::new(wider);
            let old = &self.pages[at].1;
            for index in 0..PAGE as usize {
                let value = refcount::load(&old.bytes, order, index);
                refcount::store(&mut page.bytes, wider, index, value);
            }
            self.pages[at].1 = page;
        }
        let page = &mut self.pages[at].1;
        refcount::store(&mut page.bytes, page.order, index, value);
        Ok(())
    }

    fn take(&mut self, len: usize) -> Result<(), TooMany> {
        if self.len + len > MAX_BYTES {
            return Err(TooMany);
        }
        self.len += len;
        Ok(())
    }

    /// The numbers of the pages that there are, in order.
    pub(in super::super) fn pages(&self) -> impl Iterator<Item = u64> {
        self.pages.iter().map(|page| page.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_any_width_are_kept_wherever_they_are() {
        let mut counts = Refcounts::default();
        let values = [0, 1, 2, 3, 4, 255, 256, 65536, u64::MAX, 7];
        for (index, value) in values.into_iter().enumerate() {
            counts
                .store(PAGE * 1_000_000 + index as u64, value)
                .unwrap();
            counts.store(u64::MAX / 512 - index as u64, value).unwrap();
        }
        for (index, value) in values.into_iter().enumerate() {
            assert_eq!(counts.load(PAGE * 1_000_000 + index as u64), value);
            assert_eq!(counts.load(u64::MAX / 512 - index as u64), value);
        }
        assert_eq!(counts.load(5), 0);
        assert_eq!(counts.pages().next(), Some(1_000_000));
    }

    #[test]
    fn memory_ends_before_the_host_s_does() {
        let mut counts = Refcounts::default();
        let pages = (MAX_BYTES / Page::len(FIRST_ORDER)) as u64;
        for page in 0..pages {
            counts.store(page * PAGE, 1).unwrap();
        }
        assert!(counts.store(pages * PAGE, 1).is_err());
        assert!(counts.store(0, 4).is_err());
        counts.store(pages * PAGE, 0).unwrap();
    }
}
