//! A driver for the block device, without a hypervisor: virtqueues in memory shared as a guest's
//! is, eventfds for notifications and interrupts.
//!
//! It does what Linux's virtio_blk does: every request in an indirect table, notifications and
//! interrupts suppressed by VIRTIO_F_EVENT_IDX, all used buffers taken before it waits again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use launcher::devices::GuestMemory;
use launcher::devices::virtio::blk::Blk;
use launcher::devices::virtio::{Activation, ActiveQueue, Device, Interrupt};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::Result;
use crate::qemu::PATTERN;
use crate::workload::Workload;

/// Size of guest memory: the virtqueues, then the buffers.
const MEMORY: usize = 64 << 20;
/// Each virtqueue has this much memory for its rings, tables and headers.
const QUEUE: usize = 0x1_0000;
const AVAILABLE: usize = 0x2000;
const USED: usize = 0x3000;
const TABLES: usize = 0x4000;
const HEADERS: usize = 0xc000;
const STATUSES: usize = 0xf000;
/// Where the data of the requests begins.
pub(crate) const BUFFERS: usize = 1 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// No status that a device writes.
const UNANSWERED: u8 = 0xff;

/// Memory as a guest has it: one memfd, mapped shared.
pub(crate) fn guest_memory() -> Result<Arc<GuestMemory>> {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, MEMORY as u64)?;
    let file = FileOffset::new(std::fs::File::from(file), 0);
    let region = (GuestAddress(0), MEMORY, Some(file));
    let memory = GuestMemory::from_ranges_with_files([region])?;
    fill(&memory)?;
    Ok(Arc::new(memory))
}

/// Puts what is to be written where the requests find it.
pub(crate) fn fill(memory: &GuestMemory) -> Result<()> {
    Ok(memory.write_slice(&vec![PATTERN; MEMORY], GuestAddress(0))?)
}

/// The interrupts of the device.
struct Line {
    event: EventFd,
    sent: AtomicU64,
    broken: AtomicBool,
}

impl Line {
    fn signal(&self) {
        // Fails only if the counter is full: then the driver has been told already.
        let _ = self.event.write(1);
    }
}

impl Interrupt for Line {
    fn queue(&self, _: u16) {
        self.sent.fetch_add(1, Ordering::Relaxed);
        self.signal();
    }

    fn config_changed(&self) {}

    fn needs_reset(&self) {
        self.broken.store(true, Ordering::Release);
        self.signal();
    }
}

/// The driver's side of one virtqueue. Every slot is one request, and one descriptor.
struct Virtqueue<'a> {
    memory: VolatileSlice<'a>,
    size: u16,
    kick: EventFd,
    available: u16,
    seen: u16,
}

impl<'a> Virtqueue<'a> {
    /// Lays the virtqueue out in `memory`; the data of slot `n` lies at `data(n)`.
    fn new(
        memory: VolatileSlice<'a>,
        work: &Workload,
        size: u16,
        data: impl Fn(usize) -> u64,
        base: u64,
    ) -> Result<Self> {
        memory.write_slice(&[0; QUEUE], 0)?;
        for slot in 0..work.depth {
            let table = TABLES + 48 * slot;
            let header = base + (HEADERS + 16 * slot) as u64;
            let status = base + (STATUSES + slot) as u64;
            let (kind, direction) = if work.write { (1u32, 0) } else { (0, WRITE) };
            let len = work.len as u32;
            for (at, descriptor) in [
                Descriptor::new(header, 16, NEXT, 1),
                Descriptor::new(data(slot), len, NEXT | direction, 2),
                Descriptor::new(status, 1, WRITE, 0),
            ]
            .into_iter()
            .enumerate()
            {
                memory.write_obj(descriptor, table + 16 * at)?;
            }
            let indirect = Descriptor::new(base + table as u64, 48, INDIRECT, 0);
            memory.write_obj(indirect, 16 * slot)?;
            memory.write_obj(kind, HEADERS + 16 * slot)?;
        }
        Ok(Virtqueue {
            memory,
            size,
            kick: EventFd::new(0)?,
            available: 0,
            seen: 0,
        })
    }

    fn active(&self, index: u16, base: u64) -> Result<ActiveQueue> {
        let at = |offset: usize| Some((base + offset as u64) as u32);
        let mut queue = Queue::new(self.size)?;
        queue.set_size(self.size);
        queue.set_desc_table_address(at(0), Some(0));
        queue.set_avail_ring_address(at(AVAILABLE), Some(0));
        queue.set_used_ring_address(at(USED), Some(0));
        queue.set_ready(true);
        let kick = self.kick.try_clone()?;
        Ok(ActiveQueue {
            index,
            queue,
            kick,
            record: None,
        })
    }

    /// Makes the request of a slot available; [`Virtqueue::publish`] shows it to the device.
    fn offer(&mut self, slot: u16, offset: u64) -> Result<()> {
        let at = usize::from(slot);
        self.memory.write_obj(offset / 512, HEADERS + 16 * at + 8)?;
        self.memory.write_obj(UNANSWERED, STATUSES + at)?;
        let place = usize::from(self.available % self.size);
        self.memory.write_obj(slot, AVAILABLE + 4 + 2 * place)?;
        self.available = self.available.wrapping_add(1);
        Ok(())
    }

    /// Shows what was offered since `before`, and notifies the device if it asks for that.
    /// Returns whether it did.
    fn publish(&self, before: u16) -> Result<bool> {
        if self.available == before {
            return Ok(false);
        }
        self.memory
            .store(self.available, AVAILABLE + 2, Ordering::Release)?;
        fence(Ordering::SeqCst);
        let event_at = USED + 4 + 8 * usize::from(self.size);
        let event: u16 = self.memory.load(event_at, Ordering::Relaxed)?;
        let passed = self.available.wrapping_sub(event).wrapping_sub(1);
        let wanted = passed < self.available.wrapping_sub(before);
        if wanted {
            self.kick.write(1)?;
        }
        Ok(wanted)
    }

    /// Takes a used buffer, if there is one: its slot.
    fn used(&mut self, work: &Workload) -> Result<Option<u16>> {
        let index: u16 = self.memory.load(USED + 2, Ordering::Acquire)?;
        if index == self.seen {
            return Ok(None);
        }
        let place = usize::from(self.seen % self.size);
        let [slot, len]: [u32; 2] = self.memory.read_obj(USED + 4 + 8 * place)?;
        self.seen = self.seen.wrapping_add(1);
        let status: u8 = self.memory.read_obj(STATUSES + slot as usize)?;
        let whole = if work.write { 1 } else { work.len as u32 + 1 };
        if status != 0 || len != whole {
            return Err(format!("a request ended with status {status}, used length {len}").into());
        }
        Ok(Some(slot as u16))
    }

    /// Asks for an interrupt for the next used buffer. Returns whether one is there already.
    fn wait_next(&self) -> Result<bool> {
        let event_at = AVAILABLE + 4 + 2 * usize::from(self.size);
        self.memory.store(self.seen, event_at, Ordering::Relaxed)?;
        fence(Ordering::SeqCst);
        Ok(self.memory.load::<u16>(USED + 2, Ordering::Acquire)? != self.seen)
    }
}

/// A driver of one disk, with the device serving it.
pub(crate) struct Driver<'a> {
    blk: &'a mut Blk,
    work: &'a Workload,
    line: Arc<Line>,
    queues: Vec<Virtqueue<'a>>,
    notifications: u64,
}

impl<'a> Driver<'a> {
    /// Sets the disk up for a workload and has it serve.
    pub(crate) fn new(
        blk: &'a mut Blk,
        memory: &'a Arc<GuestMemory>,
        work: &'a Workload,
    ) -> Result<Self> {
        let line = Arc::new(Line {
            event: EventFd::new(0)?,
            sent: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        });
        let mut queues = Vec::new();
        let mut active = Vec::new();
        for index in 0..work.queues {
            let base = QUEUE * index;
            let slice = memory.get_slice(GuestAddress(base as u64), QUEUE)?;
            let data = |slot| (BUFFERS + work.len * (index * work.depth + slot)) as u64;
            let size = blk.queue_max_sizes()[index];
            let queue = Virtqueue::new(slice, work, size, data, base as u64)?;
            active.push(queue.active(index as u16, base as u64)?);
            queues.push(queue);
        }
        let interrupt: Arc<dyn Interrupt> = line.clone();
        blk.connect(Arc::clone(&interrupt));
        let features = blk.features();
        blk.activate(Activation {
            memory: Arc::clone(memory),
            features,
            queues: active,
            interrupt,
        })?;
        Ok(Driver {
            blk,
            work,
            line,
            queues,
            notifications: 0,
        })
    }

    /// Notifications sent and interrupts taken so far.
    pub(crate) fn signals(&self) -> (u64, u64) {
        (self.notifications, self.line.sent.load(Ordering::Relaxed))
    }

    /// Carries out a request for each of the offsets, the workload's depth of them in flight in
    /// each virtqueue.
    pub(crate) fn run(&mut self, mut offsets: impl Iterator<Item = u64>) -> Result<()> {
        let work = self.work;
        let mut in_flight = 0u64;
        for queue in &mut self.queues {
            let before = queue.available;
            for (slot, offset) in (0..work.depth as u16).zip(&mut offsets) {
                queue.offer(slot, offset)?;
                in_flight += 1;
            }
            self.notifications += u64::from(queue.publish(before)?);
        }
        while in_flight > 0 {
            let mut any = false;
            for queue in &mut self.queues {
                let before = queue.available;
                while let Some(slot) = queue.used(work)? {
                    any = true;
                    match offsets.next() {
                        Some(offset) => queue.offer(slot, offset)?,
                        None => in_flight -= 1,
                    }
                }
                self.notifications += u64::from(queue.publish(before)?);
            }
            if any || in_flight == 0 {
                continue;
            }
            for queue in &self.queues {
                any |= queue.wait_next()?;
            }
            if !any {
                self.line.event.read()?;
            }
            if self.line.broken.load(Ordering::Acquire) {
                return Err("the device asks for a reset".into());
            }
        }
        Ok(())
    }
}

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        self.blk.reset();
    }
}
