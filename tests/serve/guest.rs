//! A front end with a guest in it: memory that is shared, virtqueues in it, and their driver.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const MEMORY: usize = 16 << 20;
pub(crate) const SIZE: u16 = 64;
/// Each virtqueue has this much memory.
pub(crate) const QUEUE: u64 = 1 << 20;
pub(crate) const AVAILABLE: u64 = 0x1000;
pub(crate) const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUSES: u64 = 0x4000;
/// Of each request, this much memory.
const DATA: u64 = 0x1_0000;
/// Each request has a slot, and three descriptors.
pub(crate) const SLOTS: u16 = 15;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

/// One virtqueue, from the driver's side.
struct Queue {
    kick: EventFd,
    call: EventFd,
    available: u16,
    seen: u16,
}

/// What survives a server: memory, and the driver's state.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) file: File,
    queues: Vec<Queue>,
    in_flight: Option<(VhostUserInflight, File)>,
}

/// A connection to a server.
pub(crate) struct Front {
    pub(crate) frontend: Frontend,
    pub(crate) features: u64,
}

impl Front {
    /// Connects and negotiates, with every protocol feature that is offered.
    pub(crate) fn connect(socket: &Path, queues: usize) -> Front {
        let mut front = Front::greet(socket, queues);
        front.accept();
        front
    }

    /// The same, but for the features of virtio, which a driver has to accept.
    pub(crate) fn greet(socket: &Path, queues: usize) -> Front {
        let mut frontend = Frontend::connect(socket, queues as u64).unwrap();
        let offered = frontend.get_features().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), queues as u64);
        frontend.set_owner().unwrap();
        // From now on every message is acknowledged.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        Front {
            frontend,
            features: offered,
        }
    }

    /// The driver accepts all that is offered.
    pub(crate) fn accept(&mut self) {
        self.frontend.set_features(self.features).unwrap();
    }

    /// The driver sets the field `writeback` of the configuration space to 0.
    pub(crate) fn write_through(&mut self) {
        let flags = VhostUserConfigFlags::empty();
        self.frontend.set_config(32, flags, &[0]).unwrap();
    }

    pub(crate) fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let space = vec![0; len as usize];
        let (_, config) = self
            .frontend
            .get_config(offset, len, flags, &space)
            .unwrap();
        config
    }

    /// Size of the disk in sectors.
    pub(crate) fn capacity(&mut self) -> u64 {
        u64::from_le_bytes(self.config(0, 8).try_into().unwrap())
    }
}

impl Guest {
    pub(crate) fn new(queues: usize) -> Guest {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, MEMORY as u64).unwrap();
        let file = File::from(file);
        let region = FileOffset::new(file.try_clone().unwrap(), 0);
        let region = (GuestAddress(0), MEMORY, Some(region));
        let queues = (0..queues).map(|_| Queue {
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            available: 0,
            seen: 0,
        });
        Guest {
            memory: GuestMemoryMmap::from_ranges_with_files([region]).unwrap(),
            file,
            queues: queues.collect(),
            in_flight: None,
        }
    }

    /// Connects, shares the memory and starts every virtqueue where it is.
    pub(crate) fn attach(&mut self, socket: &Path) -> Front {
        let mut front = Front::connect(socket, self.queues.len());
        self.share(&mut front);
        self.start(&front);
        front
    }

    /// As [`Guest::attach`], with memory for the requests in flight: the server's of before, or
    /// new.
    pub(crate) fn attach_recording(&mut self, socket: &Path) -> Front {
        let mut front = Front::connect(socket, self.queues.len());
        let wanted = VhostUserInflight::new(0, 0, self.queues.len() as u16, SIZE);
        if self.in_flight.is_none() {
            self.in_flight = Some(front.frontend.get_inflight_fd(&wanted).unwrap());
        }
        self.record_again(&mut front);
        self.share(&mut front);
        self.start(&front);
        front
    }

    /// Shares the memory for the requests in flight.
    pub(crate) fn record_again(&self, front: &mut Front) {
        let (place, file) = self.in_flight.as_ref().unwrap();
        let fd = file.as_raw_fd();
        front.frontend.set_inflight_fd(place, fd).unwrap();
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        let region = self.memory.iter().next().unwrap();
        VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()
    }

    pub(crate) fn share(&self, front: &mut Front) {
        front.frontend.add_mem_region(&self.region()).unwrap();
    }

    pub(crate) fn rings(&self, index: usize) -> VringConfigData {
        let base = self.region().userspace_addr + QUEUE * index as u64;
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: base,
            used_ring_addr: base + USED,
            avail_ring_addr: base + AVAILABLE,
            log_addr: None,
        }
    }

    pub(crate) fn start(&mut self, front: &Front) {
        for index in 0..self.queues.len() {
            let used: u16 = self.load(index, USED + 2);
            let (queue, frontend) = (&self.queues[index], &front.frontend);
            frontend.set_vring_num(index, SIZE).unwrap();
            frontend.set_vring_addr(index, &self.rings(index)).unwrap();
            // As QEMU does after the server has gone without an answer.
            frontend.set_vring_base(index, used).unwrap();
            frontend.set_vring_call(index, &queue.call).unwrap();
            frontend.set_vring_kick(index, &queue.kick).unwrap();
            let mut frontend = frontend.clone();
            frontend.set_vring_enable(index, true).unwrap();
        }
    }

    /// The descriptors of a virtqueue's kick and call.
    pub(crate) fn events(&self, index: usize) -> [std::os::fd::RawFd; 2] {
        let queue = &self.queues[index];
        [queue.kick.as_raw_fd(), queue.call.as_raw_fd()]
    }

    fn at(index: usize, at: u64) -> GuestAddress {
        GuestAddress(QUEUE * index as u64 + at)
    }

    pub(crate) fn load(&self, index: usize, at: u64) -> u16 {
        let at = Guest::at(index, at);
        self.memory.load(at, Ordering::Acquire).unwrap()
    }

    pub(crate) fn data(index: usize, slot: u16) -> GuestAddress {
        Guest::at(index, DATA * (1 + u64::from(slot)))
    }

    fn descriptor(&self, index: usize, number: u16, address: u64, len: u32, flags: u16) {
        let at = u64::from(number) * 16;
        let next = number + 1;
        self.memory
            .write_obj(address, Guest::at(index, at))
            .unwrap();
        self.memory
            .write_obj(len, Guest::at(index, at + 8))
            .unwrap();
        let rest = [flags, next];
        self.memory
            .write_obj(rest, Guest::at(index, at + 12))
            .unwrap();
    }

    /// Makes a request available in a slot, its data of `len` bytes being there already.
    pub(crate) fn offer(&mut self, index: usize, slot: u16, kind: u32, sector: u64, len: u32) {
        let header = Guest::at(index, HEADERS + 16 * u64::from(slot));
        let status = Guest::at(index, STATUSES + u64::from(slot));
        self.memory.write_obj([kind, 0], header).unwrap();
        let at = header.0 + 8;
        self.memory.write_obj(sector, GuestAddress(at)).unwrap();
        self.memory.write_obj(0xffu8, status).unwrap();
        let written = if matches!(kind, IN | GET_ID) { 2 } else { 0 };
        let first = slot * 3;
        let data = Guest::data(index, slot).0;
        if len == 0 {
            self.descriptor(index, first, header.0, 16, 1);
            self.descriptor(index, first + 1, status.0, 1, 2);
        } else {
            self.descriptor(index, first, header.0, 16, 1);
            self.descriptor(index, first + 1, data, len, 1 | written);
            self.descriptor(index, first + 2, status.0, 1, 2);
        }
        self.publish(index, first);
    }

    /// Puts a head into the available ring.
    pub(crate) fn publish(&mut self, index: usize, head: u16) {
        let queue = &mut self.queues[index];
        let place = AVAILABLE + 4 + 2 * u64::from(queue.available % SIZE);
        queue.available = queue.available.wrapping_add(1);
        let available = queue.available;
        self.memory
            .write_obj(head, Guest::at(index, place))
            .unwrap();
        let at = Guest::at(index, AVAILABLE + 2);
        self.memory.store(available, at, Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
    }

    pub(crate) fn kick(&self, index: usize) {
        self.queues[index].kick.write(1).unwrap();
    }

    /// A used buffer, if there is one: its slot.
    pub(crate) fn used(&mut self, index: usize) -> Option<u16> {
        let seen = self.queues[index].seen;
        if self.load(index, USED + 2) == seen {
            return None;
        }
        let at = USED + 4 + 8 * u64::from(seen % SIZE);
        let head: u32 = self.memory.read_obj(Guest::at(index, at)).unwrap();
        self.queues[index].seen = seen.wrapping_add(1);
        Some(head as u16 / 3)
    }

    /// Waits for a used buffer: its slot and status.
    pub(crate) fn wait(&mut self, index: usize) -> (u16, u8) {
        self.wait_for(index, Duration::from_secs(20))
            .expect("no answer of the disk")
    }

    /// The same, for so long.
    pub(crate) fn wait_for(&mut self, index: usize, patience: Duration) -> Option<(u16, u8)> {
        loop {
            if let Some(slot) = self.used(index) {
                let at = Guest::at(index, STATUSES + u64::from(slot));
                return Some((slot, self.memory.read_obj(at).unwrap()));
            }
            // VIRTIO_F_EVENT_IDX: the next one is to be told.
            let seen = self.queues[index].seen;
            let event = Guest::at(index, AVAILABLE + 4 + 2 * u64::from(SIZE));
            self.memory.store(seen, event, Ordering::Release).unwrap();
            fence(Ordering::SeqCst);
            if self.load(index, USED + 2) != seen {
                continue;
            }
            if !self.is_called(index, patience) {
                return None;
            }
            let _ = self.queues[index].call.read();
        }
    }

    /// Sleeps until the driver is interrupted, for so long; whether it was.
    pub(crate) fn is_called(&self, index: usize, patience: Duration) -> bool {
        let call = &self.queues[index].call;
        let patience = Timespec::try_from(patience).unwrap();
        // SAFETY: the eventfd lives as long as the queue does.
        let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(call.as_raw_fd()) };
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)).unwrap() != 0
    }

    /// Carries one request out in slot 0: its status, and its data afterwards.
    pub(crate) fn request(
        &mut self,
        index: usize,
        kind: u32,
        sector: u64,
        data: &[u8],
    ) -> (u8, Vec<u8>) {
        let at = Guest::data(index, 0);
        self.memory.write_slice(data, at).unwrap();
        self.offer(index, 0, kind, sector, data.len() as u32);
        self.kick(index);
        let (_, status) = self.wait(index);
        let mut data = vec![0; data.len()];
        self.memory.read_slice(&mut data, at).unwrap();
        (status, data)
    }

    pub(crate) fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let (status, data) = self.request(0, IN, sector, &vec![0; len]);
        assert_eq!(status, 0);
        data
    }

    pub(crate) fn write(&mut self, sector: u64, data: &[u8]) {
        assert_eq!(self.request(0, OUT, sector, data).0, 0);
    }

    pub(crate) fn flush(&mut self) {
        assert_eq!(self.request(0, FLUSH, 0, &[]).0, 0);
    }

    /// Has the requests in flight recorded in a file of its own.
    pub(crate) fn record_in(&mut self, file: File) {
        let len = file.metadata().unwrap().len();
        let place = VhostUserInflight::new(len, 0, self.queues.len() as u16, SIZE);
        self.in_flight = Some((place, file));
    }

    /// The file with the requests in flight.
    pub(crate) fn record(&self) -> &File {
        &self.in_flight.as_ref().unwrap().1
    }
}
