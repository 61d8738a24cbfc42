//! A driver of our own for a block device: virtqueues in memory that is shared, no hypervisor.
//! Every wait is bounded.

use std::fs::File;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use launcher::devices::GuestMemory;
use launcher::devices::virtio::{Activation, ActiveQueue, Device, Interrupt};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const MIB: u64 = 1 << 20;
const SIZE: u16 = 128;
/// Of each virtqueue: the rings, then a header, a status and data for each request.
const QUEUE: u64 = 4 * MIB;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x4000;
const STATUSES: u64 = 0x6000;
const DATA: u64 = 0x1_0000;
/// Requests that fit at once, and bytes of each.
pub(crate) const SLOTS: u16 = SIZE / 4;
pub(crate) const LEN: u64 = 0x1_0000;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;

/// VIRTIO_F_VERSION_1.
pub(crate) const VERSION_1: u64 = 1 << 32;

/// What interrupts have come; with eventfds that are signalled directly, or without.
#[derive(Default)]
pub(crate) struct Line {
    state: Mutex<State>,
    changed: Condvar,
    direct: Mutex<Option<EventFd>>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    pub(crate) queues: u64,
    pub(crate) config_changes: u64,
    pub(crate) needs_reset: bool,
}

impl Line {
    /// From now on, interrupts of virtqueues signal this, or are told to us.
    pub(crate) fn set_direct(&self, event: Option<EventFd>) {
        *self.direct.lock().unwrap() = event;
    }

    pub(crate) fn state(&self) -> State {
        self.state.lock().unwrap().clone()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    #[track_caller]
    pub(crate) fn wait(&self, what: &str, mut done: impl FnMut(&State) -> bool) {
        let state = self.state.lock().unwrap();
        let (state, waited) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| !done(state))
            .unwrap();
        assert!(!waited.timed_out(), "waited too long for {what}: {state:?}");
    }
}

impl Interrupt for Line {
    fn queue(&self, _: u16) {
        self.change(|state| state.queues += 1);
    }

    fn eventfd(&self, _: u16) -> Option<EventFd> {
        let direct = self.direct.lock().unwrap();
        direct.as_ref().map(|event| event.try_clone().unwrap())
    }

    fn config_changed(&self) {
        self.change(|state| state.config_changes += 1);
    }

    fn needs_reset(&self) {
        self.change(|state| state.needs_reset = true);
    }
}

/// Memory with the virtqueues of a driver.
pub(crate) struct Guest {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) line: Arc<Line>,
    queues: Vec<Side>,
}

/// The driver's side of a virtqueue. Request `slot` has the descriptors from `4 * slot` on.
struct Side {
    kick: EventFd,
    base: u64,
    available: u16,
    seen: u16,
    busy: Vec<bool>,
}

impl Guest {
    pub(crate) fn new(queues: u16) -> Guest {
        let len = u64::from(queues) * QUEUE;
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        let file = Arc::new(File::from(file));
        // Two regions, the higher addresses first in the file.
        let half = len / 2;
        let region = |start, offset| {
            let file = FileOffset::from_arc(Arc::clone(&file), offset);
            (GuestAddress(start), half as usize, Some(file))
        };
        let regions = [region(0, half), region(half, 0)];
        Guest {
            memory: Arc::new(GuestMemory::from_ranges_with_files(regions).unwrap()),
            line: Arc::default(),
            queues: (0..queues).map(Side::new).collect(),
        }
    }

    /// Sets the device up as a driver does that accepts these features.
    pub(crate) fn drive(&mut self, device: &mut dyn Device, features: u64) {
        assert_eq!(features & !device.features(), 0);
        let interrupt: Arc<dyn Interrupt> = self.line.clone();
        device.connect(Arc::clone(&interrupt));
        device.negotiated(features);
        let mut queues = Vec::new();
        for (index, side) in (0..).zip(&mut self.queues) {
            *side = Side::new(index);
            let zeroes = vec![0; DATA as usize];
            let at = GuestAddress(side.base);
            self.memory.write_slice(&zeroes, at).unwrap();
            queues.push(side.active(index));
        }
        let memory = Arc::clone(&self.memory);
        let activation = Activation {
            memory,
            features,
            queues,
            interrupt,
        };
        device.activate(activation).unwrap();
    }

    /// Makes a request available, and returns its slot.
    pub(crate) fn submit(&mut self, queue: usize, kind: u32, sector: u64, data: &[u8]) -> u16 {
        assert!(data.len() as u64 <= LEN);
        let (memory, side) = (&self.memory, &mut self.queues[queue]);
        let slot = side.busy.iter().position(|busy| !busy).unwrap();
        side.busy[slot] = true;
        let slot = slot as u16;
        let nth = u64::from(slot);
        let (header, status) = (side.base + HEADERS + 16 * nth, side.base + STATUSES + nth);
        let buffer = side.base + DATA + LEN * nth;
        let write = |bytes: &[u8], at| memory.write_slice(bytes, GuestAddress(at)).unwrap();
        write(&kind.to_le_bytes(), header);
        write(&sector.to_le_bytes(), header + 8);
        write(&[0xff], status);
        write(data, buffer);
        let mut parts = vec![(header, 16, 0u16)];
        if !data.is_empty() {
            let writable = if kind == OUT { 0 } else { 2 };
            parts.push((buffer, data.len() as u32, writable));
        }
        parts.push((status, 1, 2));
        let first = 4 * slot;
        for (at, (address, len, flags)) in (first..).zip(&parts) {
            let last = usize::from(at - first) + 1 == parts.len();
            let (next, more) = if last { (0, 0) } else { (at + 1, 1) };
            let descriptor = side.base + 16 * u64::from(at);
            write(&address.to_le_bytes(), descriptor);
            write(&len.to_le_bytes(), descriptor + 8);
            write(&(flags | more).to_le_bytes(), descriptor + 12);
            write(&next.to_le_bytes(), descriptor + 14);
        }
        let entry = side.base + AVAILABLE + 4 + 2 * u64::from(side.available % SIZE);
        write(&first.to_le_bytes(), entry);
        side.available = side.available.wrapping_add(1);
        fence(Ordering::SeqCst);
        let index = GuestAddress(side.base + AVAILABLE + 2);
        memory
            .store(side.available.to_le(), index, Ordering::SeqCst)
            .unwrap();
        side.kick.write(1).unwrap();
        slot
    }

    /// The next request that is done: its slot, status, and data of so many bytes.
    pub(crate) fn done(&mut self, queue: usize, len: usize) -> Option<(u16, u8, Vec<u8>)> {
        let (memory, side) = (&self.memory, &mut self.queues[queue]);
        // With event indices: the next one interrupts.
        let event = GuestAddress(side.base + AVAILABLE + 4 + 2 * u64::from(SIZE));
        memory.store(side.seen, event, Ordering::SeqCst).unwrap();
        fence(Ordering::SeqCst);
        let index = GuestAddress(side.base + USED + 2);
        let used: u16 = memory.load(index, Ordering::SeqCst).unwrap();
        if u16::from_le(used) == side.seen {
            return None;
        }
        let entry = side.base + USED + 4 + 8 * u64::from(side.seen % SIZE);
        let head: u32 = memory.read_obj(GuestAddress(entry)).unwrap();
        side.seen = side.seen.wrapping_add(1);
        let slot = head as u16 / 4;
        assert!(std::mem::take(&mut side.busy[usize::from(slot)]), "twice");
        let nth = u64::from(slot);
        let status = GuestAddress(side.base + STATUSES + nth);
        let status: u8 = memory.read_obj(status).unwrap();
        let mut data = vec![0; len];
        let buffer = GuestAddress(side.base + DATA + LEN * nth);
        memory.read_slice(&mut data, buffer).unwrap();
        Some((slot, status, data))
    }

    /// Waits for the interrupt of a request, and returns the same.
    #[track_caller]
    pub(crate) fn wait(&mut self, queue: usize, len: usize) -> (u16, u8, Vec<u8>) {
        let start = Instant::now();
        loop {
            let before = self.line.state().queues;
            if let Some(done) = self.done(queue, len) {
                return done;
            }
            assert!(start.elapsed() < PATIENCE, "interrupts, but nothing used");
            self.line
                .wait("an interrupt", |state| state.queues != before);
        }
    }

    /// Does a request alone on a virtqueue; its data.
    #[track_caller]
    pub(crate) fn run(&mut self, queue: usize, kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
        let slot = self.submit(queue, kind, sector, data);
        let (done, status, data) = self.wait(queue, data.len());
        assert_eq!((done, status), (slot, 0));
        data
    }

    /// How many requests wait.
    pub(crate) fn in_flight(&self, queue: usize) -> usize {
        self.queues[queue].busy.iter().filter(|busy| **busy).count()
    }
}

impl Side {
    fn new(index: u16) -> Side {
        Side {
            kick: EventFd::new(0).unwrap(),
            base: u64::from(index) * QUEUE,
            available: 0,
            seen: 0,
            busy: vec![false; SLOTS.into()],
        }
    }

    fn active(&self, index: u16) -> ActiveQueue {
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(self.base as u32), Some(0));
        queue.set_avail_ring_address(Some((self.base + AVAILABLE) as u32), Some(0));
        queue.set_used_ring_address(Some((self.base + USED) as u32), Some(0));
        queue.set_ready(true);
        ActiveQueue {
            index,
            queue,
            kick: self.kick.try_clone().unwrap(),
            record: None,
        }
    }
}
