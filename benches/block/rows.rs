//! What a format is measured with, in the terms of `qemu-img bench`.

use std::time::Duration;

use crate::MIB;
use crate::workload::Workload;

/// A cluster of an image that is made without options.
const CLUSTER: u64 = 64 << 10;

/// What the image holds when a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    /// Data everywhere; all runs use the same image.
    Data,
    /// Nothing: a new image for every run.
    Nothing,
    /// Nothing, over a backing file full of data: a new image for every run.
    Backing,
}

/// One row: request `n` goes to `first + n * step`, modulo `area`.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) holds: Holds,
    pub(crate) write: bool,
    /// Past the page cache.
    pub(crate) direct: bool,
    /// Bytes in a request.
    pub(crate) len: usize,
    /// Requests in flight.
    pub(crate) depth: usize,
    pub(crate) first: u64,
    pub(crate) step: u64,
    /// Bytes of the image that are used, a power of two.
    pub(crate) area: u64,
    /// After so many requests no more are made until all are done, and the image is flushed.
    pub(crate) flush: Option<u64>,
}

/// An odd number of units in a golden section of `area`: every unit comes once before any comes
/// again, and those that come one after the other lie far apart.
fn scattered(area: u64, unit: u64) -> u64 {
    let units = (area / unit) as f64 * 0.381_966;
    (units as u64 | 1) * unit
}

impl Row {
    /// All of them, each using about `area` bytes, a power of two.
    pub(crate) fn all(area: u64) -> Vec<Row> {
        let page = Row {
            holds: Holds::Data,
            write: false,
            direct: false,
            len: 4096,
            depth: 1,
            first: 0,
            step: scattered(area, 4096),
            area,
            flush: None,
        };
        let write = Row {
            write: true,
            ..page.clone()
        };
        // Every request in a cluster of its own, and in its midst.
        let clusters = Row {
            first: CLUSTER / 16 * 5,
            step: scattered(area, CLUSTER),
            ..write.clone()
        };
        let large = Row {
            len: MIB,
            step: MIB as u64,
            ..page.clone()
        };
        let each = [
            page.clone(),
            write.clone(),
            Row {
                holds: Holds::Nothing,
                ..clusters.clone()
            },
            Row {
                holds: Holds::Nothing,
                step: 4096,
                ..write
            },
            Row {
                holds: Holds::Backing,
                ..clusters
            },
            large.clone(),
            Row {
                write: true,
                ..large
            },
        ];
        let mut rows = Vec::new();
        for direct in [false, true] {
            for row in &each {
                for depth in [1, 32] {
                    let row = Row {
                        direct,
                        depth,
                        ..row.clone()
                    };
                    let flushed = Row {
                        flush: Some(64),
                        ..row.clone()
                    };
                    rows.push(row);
                    if flushed.is_scattered_allocation() && depth == 32 {
                        rows.push(flushed);
                    }
                }
            }
        }
        rows
    }

    fn is_scattered_allocation(&self) -> bool {
        self.holds == Holds::Nothing && self.step > self.len as u64
    }

    /// Its name, for filters too.
    pub(crate) fn name(&self, format: &str) -> String {
        format!(
            "{format} {} {}{}{} {} qd{}{}",
            if self.direct { "direct" } else { "buffered" },
            match self.holds {
                Holds::Data => "",
                Holds::Nothing => "alloc ",
                Holds::Backing => "cow ",
            },
            if self.is_large() || self.step == self.len as u64 {
                "seq"
            } else {
                "rand"
            },
            if self.write { "write" } else { "read" },
            if self.is_large() { "1m" } else { "4k" },
            self.depth,
            self.flush
                .map_or(String::new(), |interval| format!(" flush{interval}")),
        )
    }

    /// What the device must reach with the format, as a share of what it reaches with raw.
    pub(crate) fn raw_bar(&self) -> Option<f64> {
        (self.holds == Holds::Data).then_some(0.90)
    }

    /// What the format must reach, as a multiple of QEMU.
    pub(crate) fn qemu_bar(&self) -> f64 {
        match (self.holds, self.depth, self.flush) {
            (Holds::Nothing, 32, None) => 2.0,
            _ => 1.0,
        }
    }

    /// The shape of its requests, for the driver of the device.
    pub(crate) fn workload(&self) -> Workload {
        Workload {
            write: self.write,
            random: !self.is_large(),
            len: self.len,
            depth: self.depth,
            queues: 1,
        }
    }

    /// The offsets of `count` requests.
    pub(crate) fn offsets(&self, count: u64) -> impl Iterator<Item = u64> + use<> {
        let (mut next, step, area) = (self.first, self.step, self.area);
        (0..count).map(move |_| {
            let offset = next;
            next = (next + step) % area;
            offset
        })
    }

    /// The number of requests that is nearest to `count` and possible: a cluster is allocated
    /// once, and a flush comes after each full interval.
    pub(crate) fn possible(&self, count: u64) -> u64 {
        let unit = match self.step % CLUSTER {
            0 => CLUSTER,
            _ => self.len as u64,
        };
        let most = match self.holds {
            Holds::Data => i32::MAX as u64,
            Holds::Nothing | Holds::Backing => self.area / unit,
        };
        count.min(most).next_multiple_of(self.flush.unwrap_or(1))
    }

    /// Whether the heap is watched over many such requests: what is allocated for each shows.
    pub(crate) fn watches_heap(&self) -> bool {
        self.holds == Holds::Data && self.len == 4096 && self.depth == 32 && !self.direct
    }

    fn is_large(&self) -> bool {
        self.len == MIB
    }

    pub(crate) fn unit(&self) -> &'static str {
        if self.is_large() { "MB/s" } else { "IOPS" }
    }

    pub(crate) fn speed(&self, requests: u64, time: Duration) -> f64 {
        self.workload().speed(requests, time)
    }
}
