//! A driver of our own for tests: virtqueues in memfd memory, chains of any shape, no hypervisor.
//!
//! It keeps to the protocol where a test does not say otherwise: it notifies only when the
//! device asks for it, and waits for interrupts rather than looking at the used ring all the
//! time, so that a lost notification or interrupt fails a test. Every wait is bounded.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, FileOffset, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, Interrupt};
use crate::devices::GuestMemory;

/// No wait takes longer than this.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

const MIB: u64 = 1 << 20;

/// Where guest memory has a hole: 16 MiB long.
pub(crate) const HOLE: u64 = 16 * MIB;
/// Where two regions of guest memory meet that do not lie side by side in our address space.
pub(crate) const SEAM: u64 = 8 * MIB;
/// First byte after guest memory.
pub(crate) const END: u64 = 40 * MIB;
/// Where tests place their buffers; the virtqueues lie below.
pub(crate) const BUFFERS: u64 = MIB;

/// Guest memory: 0 to 8 MiB, 8 to 16 MiB, a hole, 32 to 40 MiB; in one memfd, upside down.
pub(crate) fn guest_memory() -> Arc<GuestMemory> {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 24 * MIB).unwrap();
    let file = Arc::new(std::fs::File::from(file));
    let region = |start, offset| {
        let file = FileOffset::from_arc(Arc::clone(&file), offset);
        (GuestAddress(start), 8 * MIB as usize, Some(file))
    };
    let regions = [
        region(0, 16 * MIB),
        region(SEAM, 0),
        region(2 * HOLE, 8 * MIB),
    ];
    Arc::new(GuestMemory::from_ranges_with_files(regions).unwrap())
}

/// What interrupts have come.
#[derive(Debug, Default)]
pub(crate) struct Line {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) queues: HashMap<u16, u64>,
    pub(crate) config_changes: u64,
    pub(crate) needs_reset: bool,
}

impl Line {
    pub(crate) fn state(&self) -> State {
        self.state.lock().unwrap().clone()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    /// Waits until `done`; fails the test if that takes too long.
    pub(crate) fn wait(&self, what: &str, mut done: impl FnMut(&State) -> bool) {
        let start = Instant::now();
        let mut state = self.state.lock().unwrap();
        while !done(&state) {
            let left = PATIENCE.saturating_sub(start.elapsed());
            assert!(!left.is_zero(), "waited too long for {what}: {state:?}");
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

impl Interrupt for Line {
    fn queue(&self, index: u16) {
        self.change(|state| *state.queues.entry(index).or_default() += 1);
    }

    fn config_changed(&self) {
        self.change(|state| state.config_changes += 1);
    }

    fn needs_reset(&self) {
        self.change(|state| state.needs_reset = true);
    }
}

/// Fails the test if `work` takes too long. It goes on then; the process ends anyway.
pub(crate) fn in_time<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    within(6 * PATIENCE, what, work)
}

/// As [`in_time`], with a limit of its own.
pub(crate) fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (done, result) = mpsc::sync_channel(1);
    let thread = thread::spawn(move || {
        let _ = done.send(work());
    });
    match result.recv_timeout(limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => panic!("waited too long for {what}"),
        Err(RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().unwrap_err())
        }
    }
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buf {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// A device-readable buffer.
pub(crate) fn readable(address: u64, len: u32) -> Buf {
    Buf {
        address,
        len,
        writable: false,
    }
}

/// A device-writable buffer.
pub(crate) fn writable(address: u64, len: u32) -> Buf {
    Buf {
        address,
        len,
        writable: true,
    }
}

/// The driver's side of one virtqueue.
pub(crate) struct Driver {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) index: u16,
    pub(crate) size: u16,
    max_size: u16,
    base: u64,
    event_idx: bool,
    kick: EventFd,
    line: Arc<Line>,
    /// Available index, not masked.
    available: u16,
    /// Used index up to which used buffers were looked at.
    seen: u16,
    /// Descriptors of each chain that is in flight.
    chains: HashMap<u16, Vec<u16>>,
    free: Vec<u16>,
    /// Notifications sent.
    pub(crate) kicks: u64,
}

const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xa000;

impl Driver {
    /// A virtqueue with `size` descriptors for a device that offers up to `max_size`.
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        line: &Arc<Line>,
        index: u16,
        size: u16,
        max_size: u16,
        features: u64,
    ) -> Self {
        let base = 0x10000 * u64::from(index);
        let zeroes = vec![0; 0x10000];
        memory.write_slice(&zeroes, GuestAddress(base)).unwrap();
        Driver {
            memory: Arc::clone(memory),
            index,
            size,
            max_size,
            base,
            event_idx: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            kick: EventFd::new(0).unwrap(),
            line: Arc::clone(line),
            available: 0,
            seen: 0,
            chains: HashMap::new(),
            free: (0..size).rev().collect(),
            kicks: 0,
        }
    }

    /// What the transport hands to the device.
    pub(crate) fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.max_size).unwrap();
        queue.set_size(self.size);
        queue.set_desc_table_address(Some(self.base as u32), Some(0));
        queue.set_avail_ring_address(Some((self.base + AVAILABLE) as u32), Some(0));
        queue.set_used_ring_address(Some((self.base + USED) as u32), Some(0));
        queue.set_ready(true);
        ActiveQueue {
            index: self.index,
            queue,
            kick: self.kick.try_clone().unwrap(),
            record: None,
        }
    }

    pub(crate) fn read<T: ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub(crate) fn write<T: ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    /// Sets descriptor `index` as it is given.
    pub(crate) fn describe(&self, index: u16, address: u64, len: u32, flags: u32, next: u16) {
        let descriptor = Descriptor::new(address, len, flags as u16, next);
        self.write(self.base + 16 * u64::from(index), descriptor);
    }

    /// Number of free descriptors.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Builds a chain in the descriptor table; returns its head.
    pub(crate) fn chain(&mut self, buffers: &[Buf]) -> u16 {
        let indices = self.free.split_off(self.free.len() - buffers.len());
        for (at, buffer) in buffers.iter().enumerate() {
            let next = indices.get(at + 1);
            let mut flags = next.map_or(0, |_| VRING_DESC_F_NEXT);
            if buffer.writable {
                flags |= VRING_DESC_F_WRITE;
            }
            let next = next.copied().unwrap_or(0);
            self.describe(indices[at], buffer.address, buffer.len, flags, next);
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        head
    }

    /// Builds a chain of one descriptor that refers to a table of `buffers` at `table`.
    pub(crate) fn indirect(&mut self, table: u64, buffers: &[Buf]) -> u16 {
        write_table(&self.memory, table, buffers);
        let head = self.chain(&[readable(table, 16 * buffers.len() as u32)]);
        let len = 16 * buffers.len() as u32;
        self.describe(head, table, len, VRING_DESC_F_INDIRECT, 0);
        head
    }

    /// Takes a descriptor out of the free ones, for a chain built by hand.
    pub(crate) fn take_free(&mut self) -> u16 {
        let index = self.free.pop().unwrap();
        self.chains.insert(index, vec![index]);
        index
    }

    /// Makes a chain available, without telling the device.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size);
        self.write(self.base + AVAILABLE + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
    }

    /// Lets the device see what was offered, and notifies it if it asks for that.
    pub(crate) fn publish(&mut self) {
        let index = GuestAddress(self.base + AVAILABLE + 2);
        let old: u16 = self.memory.read_obj(index).unwrap();
        self.publish_index(self.available);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event: u16 = self.read(self.base + USED + 4 + 8 * u64::from(self.size));
            let passed = self.available.wrapping_sub(event).wrapping_sub(1);
            passed < self.available.wrapping_sub(old)
        } else {
            self.read::<u16>(self.base + USED) & 1 == 0
        };
        if wanted {
            self.kick();
        }
    }

    /// Sets the available index, without telling the device.
    pub(crate) fn publish_index(&self, available: u16) {
        let index = GuestAddress(self.base + AVAILABLE + 2);
        self.memory
            .store(available, index, Ordering::SeqCst)
            .unwrap();
    }

    /// Notifies the device, asked or not.
    pub(crate) fn kick(&mut self) {
        self.kicks += 1;
        self.kick.write(1).unwrap();
    }

    /// Makes a chain available and tells the device.
    pub(crate) fn submit(&mut self, head: u16) {
        self.offer(head);
        self.publish();
    }

    /// Address of the used ring.
    pub(crate) fn used_ring(&self) -> u64 {
        self.base + USED
    }

    /// Index that the device has reached in the used ring.
    pub(crate) fn used_index(&self) -> u16 {
        let index = GuestAddress(self.base + USED + 2);
        self.memory.load(index, Ordering::SeqCst).unwrap()
    }

    /// Waits until the device has used `count` chains since the last that was looked at, without
    /// an interrupt.
    pub(crate) fn poll_used(&self, count: u16) {
        let start = Instant::now();
        while self.used_index().wrapping_sub(self.seen) < count {
            assert!(
                start.elapsed() < PATIENCE,
                "waited too long for used chains"
            );
            thread::yield_now();
        }
    }

    /// Fields `flags` of the used ring and `avail_event`.
    pub(crate) fn suppression(&self) -> (u16, u16) {
        let event = self.base + USED + 4 + 8 * u64::from(self.size);
        (self.read(self.base + USED), self.read(event))
    }

    /// Waits until `flags` of the used ring and `avail_event` are these.
    pub(crate) fn wait_suppression(&self, expected: (u16, u16)) {
        let start = Instant::now();
        while self.suppression() != expected {
            let now = self.suppression();
            assert!(start.elapsed() < PATIENCE, "{now:?}, expected {expected:?}");
            thread::yield_now();
        }
    }

    /// Sets `flags` of the available ring.
    pub(crate) fn set_available_flags(&self, flags: u16) {
        self.write(self.base + AVAILABLE, flags);
    }

    /// Sets `used_event`: the device interrupts when it uses the buffer with that index.
    pub(crate) fn set_used_event(&self, index: u16) {
        let event = self.base + AVAILABLE + 4 + 2 * u64::from(self.size);
        self.write(event, index);
        fence(Ordering::SeqCst);
    }

    /// The next used ring entry, if there is one: head and used length.
    pub(crate) fn used_entry(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.seen {
            return None;
        }
        let slot = u64::from(self.seen % self.size);
        let [head, len]: [u32; 2] = self.read(self.base + USED + 4 + 8 * slot);
        self.seen = self.seen.wrapping_add(1);
        Some((u16::try_from(head).unwrap(), len))
    }

    /// The next used chain, if there is one: its head and used length.
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        let (head, len) = self.used_entry()?;
        let indices = self.chains.remove(&head);
        let indices = indices.unwrap_or_else(|| panic!("head {head} is not in flight"));
        self.free.extend(indices);
        Some((head, len))
    }

    /// Waits for the interrupt and returns the next used chain.
    pub(crate) fn wait_used(&mut self) -> (u16, u32) {
        let start = Instant::now();
        loop {
            let interrupts = self.line.state();
            if self.event_idx {
                self.set_used_event(self.seen);
            }
            if let Some(used) = self.used() {
                return used;
            }
            let mut unchanged = true;
            self.line.wait("an interrupt", |state| {
                unchanged = *state == interrupts;
                !unchanged
            });
            assert!(start.elapsed() < PATIENCE, "interrupts, but no used chain");
        }
    }
}

/// Writes an indirect descriptor table.
pub(crate) fn write_table(memory: &GuestMemory, table: u64, buffers: &[Buf]) {
    for (at, buffer) in buffers.iter().enumerate() {
        let mut flags = 0;
        if at + 1 < buffers.len() {
            flags |= VRING_DESC_F_NEXT;
        }
        if buffer.writable {
            flags |= VRING_DESC_F_WRITE;
        }
        let next = at as u16 + 1;
        let descriptor = Descriptor::new(buffer.address, buffer.len, flags as u16, next);
        let address = GuestAddress(table + 16 * at as u64);
        memory.write_obj(descriptor, address).unwrap();
    }
}
