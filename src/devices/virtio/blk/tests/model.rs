//! Random requests, up to 64 in flight, against a flat model of the disk.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use super::chains::Random;
use super::*;

/// Requests in each test; `LAUNCHER_MODEL_OPS` says otherwise.
const OPS: u64 = 4000;
/// Most requests in flight.
const DEPTH: usize = 64;
/// Most sectors of data in one request.
const MAX_SECTORS: u64 = 64;
/// Size of a request's place in guest memory.
const PLACE: u64 = 0x12000;
/// The places lie on both sides of the seam, one of them on it.
const PLACES: u64 = SEAM - PLACE * 32 - 0x777;

/// What the disk holds.
struct Model {
    bytes: Vec<u8>,
    /// Sectors whose contents are known: a discard leaves them undefined (section 5.2.6.1).
    known: Vec<bool>,
}

impl Model {
    fn sectors(&self) -> u64 {
        self.known.len() as u64
    }

    fn set(&mut self, sectors: Range<u64>, data: Option<&[u8]>) {
        let (from, to) = (sectors.start as usize, sectors.end as usize);
        self.known[from..to].fill(data.is_some());
        if let Some(data) = data {
            self.bytes[from * 512..to * 512].copy_from_slice(data);
        }
    }

    fn resize(&mut self, sectors: u64) {
        self.bytes.resize(sectors as usize * 512, 0);
        self.known.resize(sectors as usize, true);
    }

    /// Says in what sector `data`, read from `from` on, is wrong.
    fn differs(&self, from: u64, data: &[u8]) -> Option<u64> {
        let wrong = |(sector, bytes): &(u64, &[u8])| {
            let at = *sector as usize;
            self.known[at] && self.bytes[at * 512..][..512] != **bytes
        };
        (from..)
            .zip(data.chunks(512))
            .find(wrong)
            .map(|(sector, _)| sector)
    }
}

/// A request in flight.
struct Flight {
    place: u64,
    buffers: Vec<Buf>,
    sectors: Range<u64>,
    writes: bool,
    status: u8,
    /// What a read is to find, but for sectors that are not known.
    read: Option<(Vec<u8>, Vec<bool>)>,
}

struct Run {
    guest: Guest,
    model: Model,
    random: Random,
    in_flight: HashMap<(usize, u16), Flight>,
    places: Vec<u64>,
    block: u64,
    stamp: u64,
}

impl Run {
    fn new(setup: &Setup, seed: u64) -> Run {
        Run {
            guest: setup.boot(),
            model: Model {
                bytes: pattern(0, SIZE),
                known: vec![true; SIZE as usize / 512],
            },
            random: Random::new(seed),
            in_flight: HashMap::new(),
            places: (0..DEPTH as u64).map(|i| PLACES + i * PLACE).collect(),
            block: u64::from(setup.block_size) / 512,
            stamp: 0,
        }
    }

    /// A range of whole blocks inside the disk.
    fn sectors(&mut self) -> Range<u64> {
        let blocks = 1 + self.random.below(MAX_SECTORS / self.block);
        let all = self.model.sectors() / self.block;
        let blocks = blocks.min(all);
        let start = self.random.below(all - blocks + 1);
        start * self.block..(start + blocks) * self.block
    }

    /// Whether a request must wait for one in flight: the order of the two would be undefined.
    fn conflicts(&self, sectors: &Range<u64>, writes: bool) -> bool {
        self.in_flight.values().any(|other| {
            let overlap = other.sectors.start < sectors.end && sectors.start < other.sectors.end;
            overlap && (writes || other.writes)
        })
    }

    fn step(&mut self) {
        let kind = self.random.below(100);
        if kind == 0 {
            return self.resize();
        }
        let sectors = self.sectors();
        let writes = kind >= 50;
        while self.in_flight.len() == DEPTH || self.conflicts(&sectors, writes) {
            self.complete();
        }
        let len = (sectors.end - sectors.start) * 512;
        let count = (sectors.end - sectors.start) as u32;
        let range = |flags| segment(sectors.start, count, flags).to_vec();
        let mut status = OK;
        let (kind, sector, out, back) = match kind {
            1..40 => (VIRTIO_BLK_T_IN, sectors.start, Vec::new(), len as usize),
            40..44 => {
                if !has(self.guest.features, VIRTIO_BLK_F_FLUSH) {
                    status = UNSUPP;
                }
                (VIRTIO_BLK_T_FLUSH, 0, Vec::new(), 0)
            }
            44..45 => (VIRTIO_BLK_T_GET_ID, 0, Vec::new(), 20),
            45..48 => {
                status = IOERR;
                let past = self.model.sectors() - self.random.below(self.block);
                (VIRTIO_BLK_T_IN, past, Vec::new(), len as usize)
            }
            48..50 => {
                status = IOERR;
                (
                    VIRTIO_BLK_T_OUT,
                    sectors.start | 1 << 55,
                    vec![0xee; len as usize],
                    0,
                )
            }
            50..80 => {
                self.stamp += 1;
                (
                    VIRTIO_BLK_T_OUT,
                    sectors.start,
                    pattern(self.stamp << 30, len),
                    0,
                )
            }
            80..90 => (
                VIRTIO_BLK_T_WRITE_ZEROES,
                0,
                range(self.random.below(2) as u32),
                0,
            ),
            _ if !has(self.guest.features, VIRTIO_BLK_F_DISCARD) => {
                status = UNSUPP;
                (VIRTIO_BLK_T_DISCARD, 0, range(0), 0)
            }
            _ => (VIRTIO_BLK_T_DISCARD, 0, range(0), 0),
        };
        let read = (kind == VIRTIO_BLK_T_IN && status == OK).then(|| {
            let (from, to) = (sectors.start as usize, sectors.end as usize);
            (
                self.model.bytes[from * 512..to * 512].to_vec(),
                self.model.known[from..to].to_vec(),
            )
        });
        match kind {
            VIRTIO_BLK_T_OUT if status == OK => self.model.set(sectors.clone(), Some(&out)),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                self.model
                    .set(sectors.clone(), Some(&vec![0; len as usize]));
            }
            VIRTIO_BLK_T_DISCARD if status == OK => self.model.set(sectors.clone(), None),
            _ => {}
        }
        let place = self.places.pop().unwrap();
        let buffers = self.guest.place(place, &header(kind, sector), &out, back);
        self.submit(Flight {
            place,
            buffers,
            sectors,
            writes,
            status,
            read,
        });
    }

    /// Submits a request, its buffers cut into random pieces, on a random virtqueue.
    fn submit(&mut self, flight: Flight) {
        let mut pieces = Vec::new();
        for buffer in &flight.buffers {
            let mut rest = *buffer;
            while rest.len > 1 && pieces.len() < 12 && self.random.below(3) == 0 {
                let len = 1 + self.random.below(u64::from(rest.len) - 1) as u32;
                pieces.push(Buf { len, ..rest });
                rest.address += u64::from(len);
                rest.len -= len;
            }
            pieces.push(rest);
        }
        let index = self.random.below(self.guest.drivers.len() as u64) as usize;
        let driver = &mut self.guest.drivers[index];
        let indirect = driver.free() < pieces.len() || self.random.below(2) == 0;
        while self.guest.drivers[index].free() < if indirect { 1 } else { pieces.len() } {
            self.complete();
        }
        let driver = &mut self.guest.drivers[index];
        let head = if indirect {
            driver.indirect(flight.place + PLACE - 0x400, &pieces)
        } else {
            driver.chain(&pieces)
        };
        driver.offer(head);
        // Several requests at once, now and then.
        if self.random.below(3) > 0 || self.in_flight.len() + 1 == DEPTH {
            self.publish();
        }
        self.in_flight.insert((index, head), flight);
    }

    fn publish(&mut self) {
        for driver in &mut self.guest.drivers {
            driver.publish();
        }
    }

    /// Waits for one request and checks what it came to.
    fn complete(&mut self) {
        self.publish();
        let index = self.in_flight.keys().next().unwrap().0;
        let (head, len) = self.guest.drivers[index].wait_used();
        let flight = self.in_flight.remove(&(index, head)).unwrap();
        let answer = self.guest.answer(&flight.buffers, len);
        let what = format!("sectors {:?}, stamp {}", flight.sectors, self.stamp);
        assert_eq!(answer.status, flight.status, "{what}");
        if let Some((bytes, known)) = flight.read {
            assert_eq!(answer.len as usize, bytes.len() + 1);
            let mut sectors = answer.data.chunks(512).zip(bytes.chunks(512)).zip(known);
            let right = sectors.all(|((found, expected), known)| !known || found == expected);
            assert!(right, "{what}");
        }
        self.places.push(flight.place);
    }

    fn resize(&mut self) {
        while !self.in_flight.is_empty() {
            self.complete();
        }
        let sectors = (1 + self.random.below(2 * SIZE / 512 / self.block)) * self.block;
        self.guest.blk.handle().resize(sectors * 512).unwrap();
        self.model.resize(sectors);
    }

    fn finish(mut self) {
        while !self.in_flight.is_empty() {
            self.complete();
        }
        let image = self.guest.image();
        assert_eq!(image.len() as u64, self.model.sectors() * 512);
        assert_eq!(self.model.differs(0, &image), None);
        let handle = self.guest.blk.handle();
        assert_eq!(handle.counters().host_errors.value(), 0);
        self.guest.blk.close().unwrap();
    }
}

/// Runs the model on each of `setups`, which share the number of requests.
fn run(setups: impl IntoIterator<Item = Setup>) {
    let ops = std::env::var("LAUNCHER_MODEL_OPS").ok();
    let ops = ops.map_or(OPS, |ops| ops.parse().unwrap());
    let setups: Vec<_> = setups.into_iter().collect();
    let ops_each = ops / setups.len() as u64;
    let limit = 6 * PATIENCE + Duration::from_millis(2 * ops);
    within(limit, "a run of the model", move || {
        for (seed, setup) in (1..).zip(&setups) {
            let Setup {
                engine,
                o_direct,
                block_size,
                ..
            } = setup;
            println!(
                "{} {engine:?}, o_direct {o_direct}, block_size {block_size}: {ops_each} requests, seed {seed}",
                setup.format.name
            );
            let mut run = Run::new(setup, seed);
            for _ in 0..ops_each {
                run.step();
            }
            run.finish();
        }
    });
}

/// Runs the model with both engines and with small and large blocks.
fn run_each(setup: &Setup) {
    let cases = [
        (Engine::IoUring, 512),
        (Engine::IoUring, 4096),
        (Engine::Threads, 512),
        (Engine::Threads, 4096),
    ];
    run(cases.map(|(engine, block_size)| Setup {
        engine,
        block_size,
        queues: 3,
        ..setup.clone()
    }));
}

/// As `run_each` with O_DIRECT, if the file system that holds the tests has it.
fn run_each_direct(setup: &Setup) {
    use rustix::fs::{Mode, OFlags};

    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let exe = std::env::current_exe().unwrap();
    if let Err(errno) = rustix::fs::open(&exe, flags, Mode::empty()) {
        println!("not run: {} has no O_DIRECT: {errno}", exe.display());
        return;
    }
    run_each(&Setup {
        o_direct: true,
        ..setup.clone()
    });
}

#[test]
fn raw_behaves_as_the_model() {
    run_each(&Setup::raw());
}

#[test]
fn raw_with_o_direct_behaves_as_the_model() {
    run_each_direct(&Setup::raw());
}

#[test]
fn sparse_raw_behaves_as_the_model() {
    run_each(&Setup::sparse_raw());
}

#[test]
fn sparse_raw_with_o_direct_behaves_as_the_model() {
    run_each_direct(&Setup::sparse_raw());
}

#[test]
fn small_virtqueues_without_event_idx_behave_as_the_model() {
    let setup = Setup {
        queue_size: 16,
        queues: 2,
        ..Setup::sparse_raw()
    };
    run([setup.decline(VIRTIO_RING_F_EVENT_IDX)]);
}

#[test]
fn write_through_behaves_as_the_model() {
    run([Setup::sparse_raw()
        .decline(VIRTIO_BLK_F_CONFIG_WCE)
        .decline(VIRTIO_BLK_F_FLUSH)]);
}
