//! Entropy device (virtio 1.3 section 5.4): the host's random numbers, so that a guest never
//! waits for its own.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};
use std::thread::{self, JoinHandle};

use formats::Segments;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::chain::Scratch;
use super::queue::Virtqueue;
use super::{Activation, Device, Interrupt};
use crate::devices::GuestMemory;
use crate::devices::throttle::Throttle;

/// Size of the virtqueue: Linux keeps one buffer in it.
const QUEUE_SIZE: u16 = 64;

/// Most bytes that one chain is filled with: a device may use less than the whole buffer
/// (section 5.4.6.2), and no guest shall keep the thread for long.
const MAX_FILL: usize = 64 << 10;

/// The entropy device. Its thread lives from activation to reset.
#[derive(Debug, Default)]
pub struct Rng {
    serving: Option<Serving>,
    /// Limits what a guest can have us log, over its resets too.
    guest_errors: Arc<Throttle>,
}

/// A thread that serves the virtqueue, and the eventfd that ends it.
#[derive(Debug)]
struct Serving {
    stop: OwnedFd,
    thread: JoinHandle<()>,
}

impl Rng {
    /// An entropy device.
    pub fn new() -> Self {
        Rng::default()
    }
}

impl Device for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        if self.serving.is_some() {
            return Err(io::Error::other("the device is active already"));
        }
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let (answer, started) = mpsc::sync_channel(1);
        let guest_errors = Arc::clone(&self.guest_errors);
        let thread = thread::Builder::new()
            .name("rng".into())
            .spawn(move || run(activation, &stopped, &answer, &guest_errors))?;
        self.serving = Some(Serving { stop, thread });
        let panicked = |_| Err(io::Error::other("the thread has panicked"));
        let started = started.recv().unwrap_or_else(panicked);
        if started.is_err() {
            self.reset();
        }
        started
    }

    fn reset(&mut self) {
        let Some(Serving { stop, thread }) = self.serving.take() else {
            return;
        };
        // Cannot fail: nobody else writes to it.
        let _ = rustix::io::write(&stop, &1u64.to_ne_bytes());
        if thread.join().is_err() {
            tracing::error!("the thread of the entropy device has panicked");
        }
    }

    fn connect(&mut self, _interrupt: Arc<dyn Interrupt>) {}
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.reset();
    }
}

/// The thread: serves until `stop` is signalled, or the ring is broken.
fn run(
    activation: Activation,
    stop: &OwnedFd,
    answer: &SyncSender<io::Result<()>>,
    guest_errors: &Throttle,
) {
    let Activation {
        memory,
        features,
        queues,
        interrupt,
    } = activation;
    let memory = Rc::new(GuestMemory::clone(&memory));
    let active = queues.into_iter().find(|queue| queue.index == 0);
    let virtqueue = active.map(|active| Virtqueue::new(active, &memory, features, &interrupt));
    let (mut queue, kick) = match virtqueue {
        Some(Ok(virtqueue)) => virtqueue,
        Some(Err(error)) => {
            let _ = answer.send(Err(error));
            return;
        }
        None => {
            let _ = answer.send(Err(io::Error::other("virtqueue 0 is not enabled")));
            return;
        }
    };
    let _ = answer.send(Ok(()));
    if let Err(error) = serve(&mut queue, &kick, stop, guest_errors) {
        if let Some(held_back) = guest_errors.pass() {
            tracing::warn!(held_back, "entropy device needs reset: {error}");
        }
        interrupt.needs_reset();
    }
}

fn serve(
    queue: &mut Virtqueue,
    kick: &OwnedFd,
    stop: &OwnedFd,
    guest_errors: &Throttle,
) -> io::Result<()> {
    let mut scratch = Scratch::default();
    let mut heads = Vec::with_capacity(usize::from(QUEUE_SIZE));
    loop {
        let more = queue.take(usize::MAX, |head| heads.push(head))?;
        for head in heads.drain(..) {
            let len = match queue.chain(head, &mut scratch) {
                Ok(chain) if !chain.writable.is_empty() => fill(chain.writable)?,
                Ok(_) => refuse(guest_errors, "a chain with nothing to write to"),
                Err(broken) => refuse(guest_errors, broken.reason),
            };
            queue.give_back(head, len)?;
        }
        queue.signal()?;
        let mut ready = [
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(kick, PollFlags::IN),
        ];
        let at_once = Timespec::default();
        match poll(&mut ready, more.then_some(&at_once)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [stopped, kicked] = ready.map(|fd| !fd.revents().is_empty());
        if stopped {
            return Ok(());
        }
        if kicked {
            match rustix::io::read(kick, &mut [0; 8]) {
                Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Fills a buffer with random bytes, up to [`MAX_FILL`]; returns how many.
fn fill(mut buffer: Segments) -> io::Result<u32> {
    let mut bytes = [0; 4096];
    let mut filled = 0;
    while filled < MAX_FILL && !buffer.is_empty() {
        let wanted = buffer.len().min(bytes.len());
        let len = match getrandom(&mut bytes[..wanted], GetRandomFlags::empty()) {
            Ok(len) => buffer.copy_from(&bytes[..len]),
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        buffer.advance(len);
        filled += len;
    }
    Ok(filled as u32)
}

/// Logs a chain that cannot be filled; returns its used length.
fn refuse(guest_errors: &Throttle, reason: &str) -> u32 {
    if let Some(held_back) = guest_errors.pass() {
        tracing::warn!(held_back, "guest error at the entropy device: {reason}");
    }
    0
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::virtio::testing::*;

    struct Guest {
        rng: Rng,
        memory: Arc<GuestMemory>,
        line: Arc<Line>,
        driver: Driver,
    }

    impl Guest {
        fn boot() -> Guest {
            let memory = guest_memory();
            let line = Arc::default();
            let rng = Rng::new();
            let driver = Driver::new(&memory, &line, 0, QUEUE_SIZE, QUEUE_SIZE, rng.features());
            let mut guest = Guest {
                rng,
                memory,
                line,
                driver,
            };
            guest.activate().unwrap();
            guest
        }

        fn activate(&mut self) -> io::Result<()> {
            self.rng.activate(Activation {
                memory: Arc::clone(&self.memory),
                features: self.rng.features(),
                queues: vec![self.driver.active()],
                interrupt: Arc::clone(&self.line) as _,
            })
        }

        /// Offers buffers; returns the used length.
        fn fill(&mut self, buffers: &[Buf]) -> u32 {
            let head = self.driver.chain(buffers);
            self.driver.submit(head);
            let (used, len) = self.driver.wait_used();
            assert_eq!(used, head);
            len
        }

        fn load(&self, address: u64, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.memory
                .read_slice(&mut bytes, GuestAddress(address))
                .unwrap();
            bytes
        }
    }

    #[test]
    fn section_5_4_the_device_has_id_4_one_virtqueue_and_no_configuration_space() {
        let rng = Rng::new();
        assert_eq!(rng.device_type(), 4);
        assert_eq!(rng.queue_max_sizes().len(), 1);
        let mut config = [0xff; 8];
        rng.read_config(0, &mut config);
        assert_eq!(config, [0; 8]);
    }

    #[test]
    fn section_5_4_6_buffers_are_filled_with_random_bytes() {
        let mut guest = Guest::boot();
        assert_eq!(guest.fill(&[writable(BUFFERS, 4096)]), 4096);
        let first = guest.load(BUFFERS, 4096);
        let distinct: std::collections::HashSet<_> = first.iter().collect();
        assert!(distinct.len() > 200, "of 256 values in 4096 bytes");
        assert_eq!(
            guest.fill(&[writable(SEAM - 100, 50), writable(SEAM - 50, 100)]),
            150
        );
        assert_ne!(guest.load(SEAM - 100, 150), vec![0; 150]);
        assert_eq!(guest.load(SEAM + 50, 64), vec![0; 64], "and no byte more");
        assert_eq!(guest.fill(&[writable(BUFFERS, 4096)]), 4096);
        assert_ne!(guest.load(BUFFERS, 4096), first);
    }

    #[test]
    fn section_5_4_6_2_a_huge_buffer_gets_one_or_more_bytes() {
        let mut guest = Guest::boot();
        let len = guest.fill(&[writable(BUFFERS, 6 << 20)]);
        assert_eq!(len as usize, MAX_FILL);
        assert_ne!(guest.load(BUFFERS + len as u64 - 64, 64), vec![0; 64]);
        assert_eq!(guest.load(BUFFERS + len as u64, 64), vec![0; 64]);
    }

    #[test]
    fn chains_that_cannot_be_filled_are_returned_with_length_0() {
        let mut guest = Guest::boot();
        assert_eq!(guest.fill(&[readable(BUFFERS, 64)]), 0);
        assert_eq!(guest.fill(&[writable(HOLE, 64)]), 0);
        assert_eq!(guest.fill(&[writable(BUFFERS, 0)]), 0);
        assert_eq!(guest.fill(&[writable(BUFFERS, u32::MAX)]), 0);
        let head = guest.driver.take_free();
        guest.driver.describe(head, BUFFERS, 64, 3, head);
        guest.driver.submit(head);
        assert_eq!(guest.driver.wait_used(), (head, 0));
        assert_eq!(guest.load(BUFFERS, 64), vec![0; 64]);
        assert_eq!(guest.fill(&[writable(BUFFERS, 64)]), 64);
    }

    #[test]
    fn a_broken_ring_needs_a_reset() {
        let mut guest = Guest::boot();
        guest.driver.publish_index(QUEUE_SIZE + 1);
        guest.driver.kick();
        guest
            .line
            .wait("DEVICE_NEEDS_RESET", |state| state.needs_reset);
        guest.rng.reset();
        guest.driver = Driver::new(
            &guest.memory,
            &guest.line,
            0,
            QUEUE_SIZE,
            QUEUE_SIZE,
            guest.rng.features(),
        );
        guest.activate().unwrap();
        assert_eq!(guest.fill(&[writable(BUFFERS, 64)]), 64);
    }

    #[test]
    fn activation_without_rings_is_an_error() {
        let mut guest = Guest::boot();
        guest.activate().unwrap_err();
        guest.rng.reset();
        let none = Activation {
            memory: Arc::clone(&guest.memory),
            features: 0,
            queues: Vec::new(),
            interrupt: Arc::clone(&guest.line) as _,
        };
        guest.rng.activate(none).unwrap_err();
        guest.rng.reset();
    }

    #[test]
    fn after_a_reset_guest_memory_is_not_touched() {
        in_time("a hundred resets", || {
            let mut guest = Guest::boot();
            for _ in 0..100 {
                for at in 0..8 {
                    let head = guest.driver.chain(&[writable(BUFFERS + 4096 * at, 4096)]);
                    guest.driver.submit(head);
                }
                guest.rng.reset();
                guest.rng.reset();
                let after = guest.load(BUFFERS, 8 * 4096);
                guest.driver.kick();
                thread::sleep(std::time::Duration::from_millis(1));
                assert_eq!(guest.load(BUFFERS, 8 * 4096), after);
                let (memory, line) = (&guest.memory, &guest.line);
                let features = guest.rng.features();
                guest.driver = Driver::new(memory, line, 0, QUEUE_SIZE, QUEUE_SIZE, features);
                guest.activate().unwrap();
            }
            assert_eq!(guest.fill(&[writable(BUFFERS, 64)]), 64);
        });
    }
}
