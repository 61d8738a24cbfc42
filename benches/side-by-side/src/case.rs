//! What is measured: one row of the table each.

use std::fmt;

/// Length of a block: what small requests transfer, and the unit of what images hold.
pub const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;
/// Cluster of a qcow2 image that is made without options.
pub const CLUSTER: u64 = 64 << 10;

/// Format of an image, by the name that both sides have for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file's bytes are the disk's.
    Raw,
    /// QEMU's.
    Qcow2,
}

impl Format {
    /// As `-f` and `--format` want it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// One row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Of the image.
    pub format: Format,
    /// Past the page cache, which is warm otherwise.
    pub direct: bool,
    /// Writes, not reads.
    pub write: bool,
    /// Each request allocates a cluster of a new image, for which there are as many requests as
    /// the image has clusters; otherwise the image is full of data, and time is the limit.
    pub allocating: bool,
    /// Bytes of a request: a block or more.
    pub len: usize,
    /// Requests follow one another in the image; otherwise they are at random places.
    pub in_order: bool,
    /// Requests in flight.
    pub depth: usize,
    /// The driver has a processor of its own, as a guest's may be: waking the other side takes an
    /// interrupt of another processor. Otherwise the host may run both on one.
    pub apart: bool,
}

/// What a row must reach, as a multiple of the better QEMU's requests a second.
pub type Bar = Option<f64>;

impl Case {
    /// All of them, in the table's order.
    pub fn all() -> Vec<Case> {
        let mut cases = Vec::new();
        for direct in [false, true] {
            for format in [Format::Raw, Format::Qcow2] {
                let read = Case {
                    format,
                    direct,
                    write: false,
                    allocating: false,
                    len: BLOCK,
                    in_order: false,
                    depth: 1,
                    apart: false,
                };
                if !direct {
                    cases.push(Case {
                        apart: true,
                        ..read
                    });
                }
                for depth in [1, 32] {
                    cases.push(Case { depth, ..read });
                }
                for depth in [1, 32] {
                    cases.push(Case {
                        depth,
                        write: true,
                        ..read
                    });
                }
                if format == Format::Qcow2 {
                    for depth in [1, 32] {
                        cases.push(Case {
                            depth,
                            write: true,
                            allocating: true,
                            ..read
                        });
                    }
                }
                for (len, depth) in [(BLOCK, 32), (MIB, 8)] {
                    for write in [false, true] {
                        cases.push(Case {
                            write,
                            len,
                            depth,
                            in_order: true,
                            ..read
                        });
                    }
                }
            }
        }
        cases
    }

    /// Whether speed is told by bytes rather than by requests.
    pub fn is_long(&self) -> bool {
        self.len > BLOCK
    }

    /// What it must reach. Those of small requests are for the page cache: past it the disk is
    /// what there is to wait for.
    pub fn bar(&self) -> Bar {
        if self.is_long() {
            return Some(1.0);
        }
        if self.in_order {
            return None;
        }
        let small = match (self.format, self.write, self.depth) {
            (Format::Raw, false, 1) => 2.0,
            (Format::Raw, false, _) => 1.3,
            (Format::Raw, true, 32) => 2.5,
            (Format::Qcow2, false, _) => 4.0,
            (Format::Qcow2, true, 32) if self.allocating => 2.0,
            _ => return None,
        };
        (!self.direct).then_some(small)
    }
}

/// Its name, by which it can be chosen, such as `raw-read-4k-d32-warm`.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let work = match (
            self.write,
            self.allocating,
            self.in_order && !self.is_long(),
        ) {
            (false, _, false) => "read",
            (false, _, true) => "seqread",
            (true, false, false) => "write",
            (true, false, true) => "seqwrite",
            (true, true, _) => "alloc",
        };
        let len = if self.is_long() { "1m" } else { "4k" };
        let cache = if self.direct { "direct" } else { "warm" };
        let apart = if self.apart { "-apart" } else { "" };
        let (format, depth) = (self.format.name(), self.depth);
        f.pad(&format!("{format}-{work}-{len}-d{depth}-{cache}{apart}"))
    }
}

/// Offsets of the requests of a case, over the first `area` bytes of an image; the same for the
/// same seed.
#[derive(Clone, Debug)]
pub struct Offsets {
    case: Case,
    area: u64,
    made: u64,
    state: u64,
}

impl Offsets {
    /// Those of the requests of one measurement.
    pub fn new(case: Case, area: u64, seed: u64) -> Offsets {
        Offsets {
            case,
            area,
            made: 0,
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        }
    }
}

impl Iterator for Offsets {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        let made = self.made;
        self.made += 1;
        if self.case.allocating {
            // Every cluster once, those that come one after the other far apart: an odd number of
            // clusters, in a power of two of them. The block lies in the cluster's midst.
            let clusters = self.area / CLUSTER;
            let step = (clusters as f64 * 0.381_966) as u64 | 1;
            let cluster = made.wrapping_mul(step) % clusters;
            return (made < clusters).then_some(cluster * CLUSTER + CLUSTER / 16 * 5);
        }
        let len = self.case.len as u64;
        let places = self.area / len;
        if self.case.in_order {
            return Some(made % places * len);
        }
        // Marsaglia's xorshift.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        Some(self.state % places * len)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let names: HashSet<_> = Case::all().iter().map(Case::to_string).collect();
        assert_eq!(names.len(), Case::all().len());
        assert!(names.contains("raw-read-4k-d32-warm"));
        assert!(names.contains("qcow2-alloc-4k-d32-direct"));
    }

    #[test]
    fn allocating_requests_touch_every_cluster_once() {
        let case = Case::all()
            .into_iter()
            .find(|case| case.allocating)
            .unwrap();
        let offsets: Vec<_> = Offsets::new(case, 256 * CLUSTER, 1).collect();
        let clusters: HashSet<_> = offsets.iter().map(|offset| offset / CLUSTER).collect();
        assert_eq!((offsets.len(), clusters.len()), (256, 256));
    }

    #[test]
    fn requests_lie_within_the_area() {
        for case in Case::all() {
            let area = 64 << 20;
            for offset in Offsets::new(case, area, 7).take(5000) {
                assert_eq!(offset % BLOCK as u64, 0);
                assert!(offset + case.len as u64 <= area);
            }
        }
    }
}
