//! Where the image's own structures lie: the guest's data must never be written there.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges of host clusters that hold metadata.
#[derive(Default)]
pub(super) struct Places {
    /// First cluster and the one after the last.
    ranges: BTreeMap<u64, u64>,
}

impl Places {
    /// Whether some of the clusters hold metadata.
    pub(super) fn overlap(&self, clusters: &Range<u64>) -> bool {
        let before = self.ranges.range(..clusters.end).next_back();
        before.is_some_and(|(_, end)| *end > clusters.start)
    }

    /// Adds clusters; false if some of them hold metadata already.
    pub(super) fn add(&mut self, clusters: Range<u64>) -> bool {
        if clusters.is_empty() {
            return true;
        }
        if self.overlap(&clusters) {
            return false;
        }
        let mut range = clusters;
        if let Some((start, end)) = self.ranges.range(..range.start).next_back()
            && *end == range.start
        {
            range.start = *start;
        }
        if let Some(end) = self.ranges.remove(&range.end) {
            range.end = end;
        }
        self.ranges.insert(range.start, range.end);
        true
    }

    /// Takes clusters away.
    pub(super) fn remove(&mut self, clusters: &Range<u64>) {
        while let Some((start, end)) = self
            .ranges
            .range(..clusters.end)
            .next_back()
            .map(|(start, end)| (*start, *end))
            .filter(|(_, end)| *end > clusters.start)
        {
            self.ranges.remove(&start);
            if start < clusters.start {
                self.ranges.insert(start, clusters.start);
            }
            if end > clusters.end {
                self.ranges.insert(clusters.end, end);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one_range_and_a_part_can_go() {
        let mut places = Places::default();
        assert!(places.add(0..1) && places.add(2..4) && places.add(1..2));
        assert_eq!(places.ranges, BTreeMap::from([(0, 4)]));
        assert!(!places.add(3..5));
        assert!(places.overlap(&(3..9)) && !places.overlap(&(4..9)));
        places.remove(&(1..2));
        assert_eq!(places.ranges, BTreeMap::from([(0, 1), (2, 4)]));
        places.remove(&(0..9));
        assert!(places.ranges.is_empty());
    }
}
