//! The memory of a guest, and the driver in it. It is written to through its file: what the guest
//! does to it, making it shorter too, is no fault of this process.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Bytes of memory, from the guest-physical address 0.
pub(super) const MEMORY: u64 = 1 << 20;
/// Where the front end says that it has it.
pub(super) const USER: u64 = 0x7f12_3450_0000;
pub(super) const QUEUES: u16 = 2;

/// Each virtqueue has this much memory.
const QUEUE: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUSES: u64 = 0x3800;
const TABLES: u64 = 0x3c00;
const DATA: u64 = 0x4000;
const DATA_LEN: u64 = 0x1800;
/// Requests that have a place of their own.
pub(super) const SLOTS: u64 = 8;

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

/// Flags of a descriptor (virtio 1.3 section 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A request to be made.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) slot: u64,
    pub(super) kind: u32,
    pub(super) sector: u64,
    pub(super) len: u32,
    pub(super) indirect: bool,
}

/// A descriptor.
#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

pub(super) struct Guest {
    pub(super) file: OwnedFd,
    /// Descriptors of each virtqueue.
    pub(super) size: u16,
    available: [u16; QUEUES as usize],
}

/// Areas of a virtqueue, guest-physical: descriptor table, used and available ring.
pub(super) fn areas(queue: u16) -> [u64; 3] {
    [0, USED, AVAILABLE].map(|area| at(queue, area))
}

pub(super) fn at(queue: u16, offset: u64) -> u64 {
    QUEUE * u64::from(queue % QUEUES) + offset
}

/// Where a request has its data, and its status.
pub(super) fn data(queue: u16, slot: u64) -> u64 {
    at(queue, DATA + DATA_LEN * (slot % SLOTS))
}

pub(super) fn status(queue: u16, slot: u64) -> u64 {
    at(queue, STATUSES + slot % SLOTS)
}

impl Guest {
    pub(super) fn new() -> Guest {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("guest", flags).unwrap();
        ftruncate(&file, MEMORY).unwrap();
        Guest {
            file,
            size: 64,
            available: [0; QUEUES as usize],
        }
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        // What lies outside is nobody's.
        if address < MEMORY - bytes.len() as u64 {
            let _ = rustix::io::pwrite(&self.file, bytes, address);
        }
    }

    /// What is there; zeroes where nothing is any more.
    pub(super) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let _ = rustix::io::pread(&self.file, &mut bytes, address);
        bytes
    }

    /// Makes the memory longer or shorter.
    pub(super) fn truncate(&self, len: u64) {
        let _ = ftruncate(&self.file, len);
    }

    pub(super) fn describe(&self, table: u64, index: u64, it: Descriptor) {
        let address = it.address.to_le_bytes();
        let rest = u64::from(it.len) | u64::from(it.flags) << 32 | u64::from(it.next) << 48;
        let bytes = [address, rest.to_le_bytes()];
        self.write(table + 16 * index, bytes.as_flattened());
    }

    /// Writes a request; its head. `tweak` may do anything to its descriptors.
    pub(super) fn request(
        &self,
        queue: u16,
        request: Request,
        tweak: impl FnOnce(&mut Vec<Descriptor>),
    ) -> u16 {
        let slot = request.slot % SLOTS;
        let header = at(queue, HEADERS + 16 * slot);
        let kind = u64::from(request.kind).to_le_bytes();
        let sector = request.sector.to_le_bytes();
        self.write(header, [kind, sector].as_flattened());
        self.write(status(queue, slot), &[0xff]);
        let (data, len) = (data(queue, slot), request.len);
        let written = match request.kind {
            IN | GET_ID => WRITE,
            _ => 0,
        };
        let piece = |address, len, flags| Descriptor {
            address,
            len,
            flags,
            next: 0,
        };
        let mut chain = vec![piece(header, 16, 0)];
        if len > 512 {
            chain.push(piece(data, 512, written));
            chain.push(piece(data + 512, len - 512, written));
        } else if len > 0 {
            chain.push(piece(data, len, written));
        }
        chain.push(piece(status(queue, slot), 1, WRITE));
        let first = match request.indirect {
            true => 0,
            false => 4 * slot as u16,
        };
        let count = chain.len();
        for (index, it) in chain.iter_mut().enumerate().take(count - 1) {
            it.flags |= NEXT;
            it.next = first + index as u16 + 1;
        }
        tweak(&mut chain);
        let head = 4 * slot as u16;
        let table = match request.indirect {
            true => at(queue, TABLES + 64 * slot),
            false => at(queue, 0),
        };
        for (index, it) in chain.iter().enumerate() {
            self.describe(table, u64::from(first) + index as u64, *it);
        }
        if request.indirect {
            let len = 16 * chain.len() as u32;
            let it = piece(table, len, INDIRECT);
            self.describe(at(queue, 0), u64::from(head), it);
        }
        head
    }

    /// Puts a head into the available ring.
    pub(super) fn publish(&mut self, queue: u16, head: u16) {
        let index = &mut self.available[usize::from(queue % QUEUES)];
        let entry = 4 + 2 * u64::from(*index % self.size.max(1));
        *index = index.wrapping_add(1);
        let index = *index;
        self.write(at(queue, AVAILABLE + entry), &head.to_le_bytes());
        self.write(at(queue, AVAILABLE + 2), &index.to_le_bytes());
    }

    /// Sets the index of the available ring, whatever is there.
    pub(super) fn jump(&mut self, queue: u16, index: u16) {
        self.available[usize::from(queue % QUEUES)] = index;
        self.write(at(queue, AVAILABLE + 2), &index.to_le_bytes());
    }
}
