//! What a run does to an image.

use super::super::traffic::Load;
use super::Scene;

impl Scene {
    /// What a run of this point does.
    pub(in super::super) fn load(&mut self) -> Load {
        let point = &self.point;
        let random = &mut self.random;
        let cluster = point.cluster_size;
        let size = self.content.size;
        let (areas, largest) = match point.huge {
            true => {
                let len = (2 * cluster).max(2 << 20);
                let at = |offset: u64| offset / cluster * cluster;
                let middle = at(4 << 30) + cluster * random.below(64);
                let far = at(17 << 40) + cluster * random.below(1 << 14);
                let last = at(size.max(len) - len);
                let windows = [0, middle, far, last].map(|start| start..start + len);
                (windows.into(), size + 4 * cluster)
            }
            false => {
                let largest = (2 * size).min(64 << 20).max(size);
                let mut areas = Vec::new();
                // Sometimes a few clusters only, which are freed and used again all the time.
                if !random.chance(25) {
                    areas.push(0..largest);
                }
                for _ in 0..3 {
                    // Narrow, so that operations meet in a cluster.
                    let width = (random.of(&[1, 2, 6]) * cluster).max(8 << 10);
                    let start = random.below(size) / cluster * cluster;
                    areas.push(start..(start + width).min(largest));
                }
                (areas, largest)
            }
        };
        Load {
            operations: random.of(&[60, 120, 200]),
            in_flight: point.in_flight,
            overlap: point.overlap,
            block: point.block_size.into(),
            cluster,
            most: (2 * cluster).max(1 << 20),
            areas,
            writes: random.of(&[40, 70, 95]),
            flushes: random.of(&[5, 30, 100, 200]),
            reopens: 10,
            resizes: if point.resizes() { 15 } else { 0 },
            shrinks: point.shrinks,
            largest,
        }
    }
}
