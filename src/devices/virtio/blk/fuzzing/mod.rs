//! What a fuzzer does to a disk: chain → request → image, through virtqueues in guest memory.
//!
//! The device is the real one from the descriptor chain to the host file, but on the caller's
//! thread and without notifications, so that the same bytes always do the same. After each batch
//! of requests all of guest memory and all of the image are compared with what the
//! specification says: a byte that is written where none may be is found wherever it is.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, built for a fuzzer too"
)]

mod driver;
mod oracle;
mod place;

use std::cell::OnceCell;
use std::ops::{AddAssign, Range};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use arbitrary::Unstructured;
use formats::{Engine, Image, Ring};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use self::driver::Driver;
use self::oracle::{Action, Law, Verdict};
use self::place::*;
use super::features::{QUEUE_SIZE, has};
use super::worker::Worker;
use super::{BlkOptions, Counters, Shared};
use crate::devices::GuestMemory;
use crate::devices::throttle::Throttle;
use crate::devices::virtio::{Activation, ActiveQueue, Interrupt};

/// Sectors of the disk, before it is resized.
const SECTORS: u64 = 128;
const ID: &str = "fuzzed";

/// Requests, and those of them that the image had to do something for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub requests: u64,
    pub reached: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.requests += other.requests;
        self.reached += other.reached;
    }
}

/// The disk before the first request.
static FRESH: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let byte = |at| (at / 512 + at % 255) as u8;
    (0..SECTORS * 512).map(byte).collect()
});

/// What is made once a thread.
struct Bench {
    uring: Ring,
    threads: Ring,
    memory: Arc<GuestMemory>,
    image: OwnedFd,
}

thread_local! {
    static BENCH: Bench = Bench {
        uring: Ring::new(Engine::Auto).unwrap(),
        threads: Ring::new(Engine::Threads).unwrap(),
        memory: guest_memory(),
        image: memfd_create("disk", MemfdFlags::CLOEXEC).unwrap(),
    };
}

/// Drives a disk as `data` says. Panics if the disk does what it must not.
pub fn run(data: &[u8]) -> Tally {
    BENCH.with(|bench| {
        let mut input = Unstructured::new(data);
        let threads = input.ratio(1, 16).unwrap_or_default();
        let ring = if threads {
            &bench.threads
        } else {
            &bench.uring
        };
        let current = OnceCell::new();
        ring.block_on(bench.drive(ring, &current, &mut input), || {
            if let Some(worker) = current.get() {
                Worker::idle(worker);
            }
        })
    })
}

/// What interrupts have come.
#[derive(Default)]
struct Line {
    queues: [AtomicU64; QUEUES as usize],
    needs_reset: AtomicBool,
}

impl Interrupt for Line {
    fn queue(&self, index: u16) {
        self.queues[usize::from(index)].fetch_add(1, Ordering::SeqCst);
    }

    fn config_changed(&self) {}

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }
}

impl Bench {
    async fn drive(
        &self,
        ring: &Ring,
        current: &OnceCell<Rc<Worker>>,
        input: &mut Unstructured<'_>,
    ) -> Tally {
        let disk = FRESH.clone();
        ftruncate(&self.image, disk.len() as u64).unwrap();
        assert_eq!(rustix::io::pwrite(&self.image, &disk, 0), Ok(disk.len()));
        let tally = Tally::default();
        let Ok(options) = self.options(input) else {
            return tally;
        };
        let shared = Arc::new(Shared {
            size: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            counters: Counters::default(),
            closing: Arc::default(),
            interrupt: Default::default(),
            unflushed: Default::default(),
            guest_errors: Throttle::default(),
        });
        let mut worker = Worker::open(&options, ring, &shared).await.unwrap();
        // A batch is taken as a whole, with no thread that would come back for the rest.
        worker.at_once = usize::MAX;
        let worker = current.get_or_init(|| Rc::new(worker));
        let declined = input.arbitrary::<u64>().unwrap_or_default();
        let declined = declined & !(1 << VIRTIO_F_VERSION_1);
        let mut session = Session {
            bench: self,
            worker,
            shared: &shared,
            law: Law {
                features: worker.profile.features() & !declined,
                ro: options.image.ro,
                block: u64::from(options.image.block_size) / 512,
                capacity: SECTORS,
            },
            driver: Driver::new([QUEUE_SIZE; 2]),
            line: Arc::default(),
            memory: Shadow::new(),
            disk,
            tally,
            done: 0,
        };
        // The end of the bytes ends the session.
        let _ = session.play(input).await;
        let tally = session.tally;
        worker.reset().await;
        worker.close().await.unwrap();
        tally
    }

    fn options(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<BlkOptions> {
        let sparse = !input.ratio(1, 4)?;
        Ok(BlkOptions {
            image: Image {
                ro: input.ratio(1, 8)?,
                sparse,
                block_size: *input.choose(&[512, 512, 1024, 4096])?,
                lock: false,
                ..Image::new(format!("/proc/self/fd/{}", self.image.as_raw_fd()))
            },
            format: formats::find(formats::raw_for(sparse)).unwrap(),
            ephemeral: false,
            id: Some(ID.into()),
            queues: QUEUES,
            engine: Engine::Auto,
            poll: None,
            cpus: Vec::new(),
        })
    }
}

/// A disk and its driver, and what both ought to hold.
struct Session<'a> {
    bench: &'a Bench,
    worker: &'a Rc<Worker>,
    shared: &'a Shared,
    law: Law,
    driver: Driver,
    line: Arc<Line>,
    memory: Shadow,
    disk: Vec<u8>,
    tally: Tally,
    /// Requests that succeeded and are counted by the disk.
    done: u64,
}

impl Session<'_> {
    async fn play(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        self.activate(input)?;
        while !input.is_empty() {
            match input.arbitrary::<u8>()? {
                0..240 => self.batch(input).await?,
                240..248 if !self.law.ro => {
                    let blocks = input.int_in_range(0..=2 * SECTORS / self.law.block)?;
                    let capacity = blocks * self.law.block;
                    self.worker.resize(capacity * 512).await.unwrap();
                    self.law.capacity = capacity;
                    self.disk.resize(capacity as usize * 512, 0);
                    assert_eq!(self.shared.size.load(Ordering::SeqCst), capacity * 512);
                }
                240..250 => {
                    let writeback = input.arbitrary()?;
                    if has(self.law.features, VIRTIO_BLK_F_CONFIG_WCE) {
                        self.shared.writeback.store(writeback, Ordering::SeqCst);
                    }
                }
                250..253 => self.reset(input).await?,
                _ => {
                    self.harm(input)?;
                    assert!(self.line.needs_reset.load(Ordering::SeqCst));
                    self.reset(input).await?;
                }
            }
        }
        Ok(())
    }

    fn activate(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let sizes = [8, 16, 64, QUEUE_SIZE];
        self.driver = Driver::new([*input.choose(&sizes)?, *input.choose(&sizes)?]);
        self.line = Arc::default();
        self.memory = Shadow::new();
        self.memory.store(&self.bench.memory);
        let writeback = has(self.law.features, VIRTIO_BLK_F_FLUSH);
        self.shared.writeback.store(writeback, Ordering::SeqCst);
        let queues = (0..QUEUES).map(|index| {
            let mut queue = Queue::new(QUEUE_SIZE).unwrap();
            queue.set_size(self.driver.sizes[usize::from(index)]);
            queue.set_desc_table_address(Some(table(index) as u32), Some(0));
            queue.set_avail_ring_address(Some(available(index) as u32), Some(0));
            queue.set_used_ring_address(Some(used(index) as u32), Some(0));
            queue.set_ready(true);
            let kick = EventFd::new(0).unwrap();
            ActiveQueue {
                index,
                queue,
                kick,
                record: None,
            }
        });
        let activation = Activation {
            memory: Arc::clone(&self.bench.memory),
            features: self.law.features,
            queues: queues.collect(),
            interrupt: Arc::clone(&self.line) as _,
        };
        self.worker.activate(activation).unwrap();
        Ok(())
    }

    async fn reset(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        self.worker.reset().await;
        assert_eq!(self.worker.in_flight.get(), 0);
        self.activate(input)
    }

    /// Breaks a ring beyond repair.
    fn harm(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let queue = input.int_in_range(0..=QUEUES - 1)?;
        let at = usize::from(queue);
        let (size, index) = (self.driver.sizes[at], self.driver.available[at]);
        let index = match input.arbitrary()? {
            true => index.wrapping_add(input.int_in_range(size + 1..=u16::MAX)?),
            false => {
                let head = input.int_in_range(size..=u16::MAX)?;
                let entry = available(queue) + 4 + 2 * u64::from(index % size);
                self.memory.set(entry, &head.to_le_bytes());
                index.wrapping_add(1)
            }
        };
        self.driver.publish(&mut self.memory, queue, index);
        self.memory.store(&self.bench.memory);
        self.worker.take(usize::from(queue));
        Ok(())
    }

    /// Has a batch of requests served, and checks what came of it.
    async fn batch(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        // What the device has told its driver on the side.
        self.memory = Shadow::load(&self.bench.memory);
        let heads = self.driver.batch(input, &self.law, &mut self.memory)?;
        let event_idx = has(self.law.features, VIRTIO_RING_F_EVENT_IDX);
        let before = [0, 1].map(|queue| self.memory.u16(used(queue) + 2));
        for queue in 0..QUEUES {
            let event = available(queue) + 4 + 2 * u64::from(self.driver.sizes[usize::from(queue)]);
            self.memory
                .set(event, &before[usize::from(queue)].to_le_bytes());
            let interrupts = &self.line.queues[usize::from(queue)];
            interrupts.store(0, Ordering::SeqCst);
        }
        let verdicts: Vec<_> = heads
            .iter()
            .map(|(queue, head)| {
                let size = self.driver.sizes[usize::from(*queue)];
                self.law.judge(&self.memory, *queue, size, *head)
            })
            .collect();
        self.memory.store(&self.bench.memory);
        for queue in 0..usize::from(QUEUES) {
            self.worker.take(queue);
        }
        self.worker
            .until(|worker| worker.in_flight.get() == 0)
            .await;
        self.worker.idle();

        self.tally.requests += heads.len() as u64;
        let reached = verdicts.iter().filter(|verdict| verdict.reaches_disk());
        self.tally.reached += reached.count() as u64;
        let found = Shadow::load(&self.bench.memory);
        let image = self.image();
        assert_eq!(image.len(), self.disk.len());
        if entangled(&verdicts) {
            // One request wrote over another, or the rings: what they meant is anybody's guess.
            self.disk = image;
            self.done = self.counted();
            return self.reset(input).await;
        }
        assert!(!self.line.needs_reset.load(Ordering::SeqCst));
        for queue in 0..QUEUES {
            self.check_used(queue, before[usize::from(queue)], &found, &heads, &verdicts);
            let interrupts = self.line.queues[usize::from(queue)].load(Ordering::SeqCst);
            let used = found.u16(used(queue) + 2) != before[usize::from(queue)];
            // It asked for one at the first buffer, or for all.
            assert_eq!(interrupts > 0, used, "event_idx {event_idx}");
        }
        self.check_memory(&found, &verdicts);
        self.check_disk(image, &verdicts);
        let done = verdicts.iter().filter(|verdict| {
            let ok = verdict
                .status
                .is_some_and(|(_, it)| it == VIRTIO_BLK_S_OK as u8);
            ok && !matches!(verdict.action, Action::GetId)
        });
        self.done += done.count() as u64;
        assert_eq!(self.counted(), self.done, "requests that succeeded");
        Ok(())
    }

    /// Requests that the disk says it has carried out.
    fn counted(&self) -> u64 {
        let counters = &self.shared.counters;
        assert_eq!(counters.host_errors.value(), 0);
        counters.reads.value()
            + counters.writes.value()
            + counters.flushes.value()
            + counters.discards.value()
            + counters.write_zeroes.value()
    }

    fn image(&self) -> Vec<u8> {
        let len = rustix::fs::fstat(&self.bench.image).unwrap().st_size as usize;
        let mut image = vec![0; len];
        assert_eq!(
            rustix::io::pread(&self.bench.image, &mut image[..], 0),
            Ok(len)
        );
        image
    }

    /// Each head came back once, with the right length.
    fn check_used(
        &self,
        queue: u16,
        before: u16,
        found: &Shadow,
        heads: &[(u16, u16)],
        verdicts: &[Verdict],
    ) {
        let size = self.driver.sizes[usize::from(queue)];
        let expected = heads
            .iter()
            .zip(verdicts)
            .filter(|((at, _), _)| *at == queue);
        let mut expected: Vec<_> = expected
            .map(|((_, head), verdict)| (u32::from(*head), verdict.len))
            .collect();
        let count = found.u16(used(queue) + 2).wrapping_sub(before);
        let entries = (0..count).map(|at| {
            let slot = u64::from(before.wrapping_add(at) % size);
            let entry = used(queue) + 4 + 8 * slot;
            (found.u32(entry), found.u32(entry + 4))
        });
        let mut entries: Vec<_> = entries.collect();
        entries.sort_unstable();
        expected.sort_unstable();
        assert_eq!(entries, expected, "used ring of virtqueue {queue}");
    }

    /// Guest memory is what it was, but for what the requests are to write.
    fn check_memory(&mut self, found: &Shadow, verdicts: &[Verdict]) {
        for queue in 0..QUEUES {
            let ring = used_ring(queue);
            self.memory.set(ring.start, found.bytes(ring));
        }
        for (at, verdict) in verdicts.iter().enumerate() {
            let data = match &verdict.action {
                Action::GetId => {
                    let mut id = [0; 20];
                    id[..ID.len()].copy_from_slice(ID.as_bytes());
                    Some(id.to_vec())
                }
                Action::Read(sectors) => {
                    let others = verdicts
                        .iter()
                        .enumerate()
                        .filter(|(other, _)| *other != at);
                    let mut changes = others.flat_map(|(_, other)| other.changes());
                    let certain = !changes.any(|changed| overlap(&changed, sectors));
                    let bytes = sectors.start as usize * 512..sectors.end as usize * 512;
                    (certain && !verdict.is_tangled()).then(|| self.disk[bytes].to_vec())
                }
                _ => Some(Vec::new()),
            };
            match data {
                Some(data) => self.fill(&verdict.data, &data),
                // In whatever order it was: any of it.
                None => {
                    for range in &verdict.data {
                        self.memory.set(range.start, found.bytes(range.clone()));
                    }
                }
            }
            if let (true, Some(first)) = (verdict.blank, verdict.data.first()) {
                self.memory.set(first.start, &[0]);
            }
            if let Some((at, status)) = verdict.status {
                self.memory.set(at, &[status]);
            }
        }
        if let Some(at) = self.memory.differs(found) {
            panic!("guest memory at {at:#x} is wrong after {verdicts:#x?}");
        }
    }

    /// Writes `data` to guest memory, as far as there is room.
    fn fill(&mut self, pieces: &[Range<u64>], mut data: &[u8]) {
        for piece in pieces {
            let (now, rest) = data.split_at(data.len().min((piece.end - piece.start) as usize));
            self.memory.set(piece.start, now);
            data = rest;
        }
    }

    /// The image is what it was, but for what the requests are to change.
    fn check_disk(&mut self, image: Vec<u8>, verdicts: &[Verdict]) {
        let mut writers = vec![0; self.disk.len() / 512];
        let mut discarded = vec![false; writers.len()];
        for verdict in verdicts {
            for sectors in verdict.changes() {
                let sectors = sectors.start as usize..sectors.end as usize;
                let bytes = sectors.start * 512..sectors.end * 512;
                writers[sectors.clone()].iter_mut().for_each(|it| *it += 1);
                match &verdict.action {
                    Action::Write(_, data) => self.disk[bytes].copy_from_slice(data),
                    Action::Zero(_) => self.disk[bytes].fill(0),
                    _ => discarded[sectors].fill(true),
                }
            }
        }
        let pairs = self.disk.chunks_mut(512).zip(image.chunks(512));
        for (sector, (model, found)) in pairs.enumerate() {
            let any = writers[sector] > 1 || discarded[sector] && found.iter().all(|it| *it == 0);
            if any {
                model.copy_from_slice(found);
            }
            assert!(
                model == found,
                "sector {sector} is wrong after {verdicts:#x?}"
            );
        }
    }
}

/// Whether a request writes what another one reads or writes, or the rings.
fn entangled(verdicts: &[Verdict]) -> bool {
    let rings = 0..RINGS_END;
    verdicts.iter().enumerate().any(|(at, verdict)| {
        let others = verdicts
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != at);
        let others =
            others.flat_map(|(_, other)| other.writes().into_iter().chain(other.reads.clone()));
        let mut taboo = others.chain([rings.clone()]);
        let writes = verdict.writes();
        taboo.any(|taboo| writes.iter().any(|range| overlap(range, &taboo)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The harness without a fuzzer: inputs from a generator.
    #[test]
    fn thousands_of_random_inputs_do_what_the_specification_says() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut tally = Tally::default();
        for _ in 0..3000 {
            let len = random() as usize % 300;
            let data: Vec<u8> = (0..len).map(|_| (random() >> 32) as u8).collect();
            tally += run(&data);
        }
        let Tally { requests, reached } = tally;
        println!("{reached} of {requests} requests reached the backend");
        assert!(requests > 10_000, "{tally:?}");
        assert!(2 * reached >= requests, "{tally:?}");
    }
}
