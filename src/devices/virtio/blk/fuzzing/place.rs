//! Where a fuzzed driver has its things in guest memory, and a copy of all of it.

use std::ops::Range;
use std::sync::{Arc, LazyLock};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress};

use crate::devices::GuestMemory;

/// Where two regions of guest memory meet that do not lie side by side in our address space.
pub(super) const SEAM: u64 = 0x1_8000;
/// Where guest memory has a hole.
pub(super) const HOLE: u64 = 0x3_0000;
const HOLE_END: u64 = 0x4_0000;
/// First byte after guest memory.
pub(super) const END: u64 = 0x4_8000;
const REGIONS: [Range<u64>; 3] = [0..SEAM, SEAM..HOLE, HOLE_END..END];

/// Virtqueues of the device.
pub(super) const QUEUES: u16 = 2;
const QUEUE_LEN: u64 = 0x2000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x1400;
/// The virtqueues lie below this.
pub(super) const RINGS_END: u64 = QUEUE_LEN * QUEUES as u64;

/// Where each request of a batch has its buffers: one slot on the seam, one at the end.
pub(super) const SLOTS: [u64; 4] = [RINGS_END, SEAM - 0x1000, 0x2_0000, END - SLOT_LEN];
pub(super) const SLOT_LEN: u64 = 0x5000;

/// A descriptor as it is in memory (section 2.7.5).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

/// The descriptor table of a virtqueue.
pub(super) fn table(queue: u16) -> u64 {
    QUEUE_LEN * u64::from(queue)
}

/// The available ring of a virtqueue.
pub(super) fn available(queue: u16) -> u64 {
    table(queue) + AVAILABLE
}

/// The used ring of a virtqueue.
pub(super) fn used(queue: u16) -> u64 {
    table(queue) + USED
}

/// What only the device writes.
pub(super) fn used_ring(queue: u16) -> Range<u64> {
    used(queue)..table(queue) + QUEUE_LEN
}

/// Guest memory: three regions of one memfd, in another order than the guest sees them.
pub(super) fn guest_memory() -> Arc<GuestMemory> {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, END).unwrap();
    let file = Arc::new(std::fs::File::from(file));
    let region = |range: &Range<u64>, offset| {
        let file = FileOffset::from_arc(Arc::clone(&file), offset);
        let len = (range.end - range.start) as usize;
        (GuestAddress(range.start), len, Some(file))
    };
    let regions = [
        region(&REGIONS[0], 0x2_0000),
        region(&REGIONS[1], 0),
        region(&REGIONS[2], 0x3_8000),
    ];
    Arc::new(GuestMemory::from_ranges_with_files(regions).unwrap())
}

/// What guest memory ought to hold; the hole is there too, and unused.
pub(super) struct Shadow(Vec<u8>);

static FRESH: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes: Vec<u8> = (0..END).map(|at| (at % 251) as u8 | 0x80).collect();
    bytes[..RINGS_END as usize].fill(0);
    bytes
});

impl Shadow {
    /// Guest memory before the first request: rings of zeroes, and no two bytes in a row alike.
    pub(super) fn new() -> Shadow {
        Shadow(FRESH.clone())
    }

    /// Whether all of these bytes are guest memory.
    pub(super) fn has(&self, range: &Range<u64>) -> bool {
        let hole = HOLE..HOLE_END;
        range.end <= END && !overlap(range, &hole)
    }

    pub(super) fn bytes(&self, range: Range<u64>) -> &[u8] {
        &self.0[range.start as usize..range.end as usize]
    }

    pub(super) fn set(&mut self, address: u64, bytes: &[u8]) {
        self.0[address as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn u16(&self, address: u64) -> u16 {
        u16::from_le_bytes([self.0[address as usize], self.0[address as usize + 1]])
    }

    pub(super) fn u32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.bytes(address..address + 4).try_into().unwrap())
    }

    /// The descriptor at `address`, if that is guest memory.
    pub(super) fn descriptor(&self, address: u64) -> Option<Descriptor> {
        let end = address.checked_add(16)?;
        let bytes = self
            .has(&(address..end))
            .then(|| self.bytes(address..end))?;
        let (address, rest) = bytes.split_at(8);
        Some(Descriptor {
            address: u64::from_le_bytes(address.try_into().unwrap()),
            len: u32::from_le_bytes(rest[..4].try_into().unwrap()),
            flags: u16::from_le_bytes([rest[4], rest[5]]),
            next: u16::from_le_bytes([rest[6], rest[7]]),
        })
    }

    pub(super) fn set_descriptor(&mut self, address: u64, descriptor: &Descriptor) {
        self.set(address, &descriptor.address.to_le_bytes());
        self.set(address + 8, &descriptor.len.to_le_bytes());
        self.set(address + 12, &descriptor.flags.to_le_bytes());
        self.set(address + 14, &descriptor.next.to_le_bytes());
    }

    /// Writes all of it to guest memory.
    pub(super) fn store(&self, memory: &GuestMemory) {
        for region in REGIONS {
            let bytes = self.bytes(region.clone());
            memory
                .write_slice(bytes, GuestAddress(region.start))
                .unwrap();
        }
    }

    /// Reads all of guest memory.
    pub(super) fn load(memory: &GuestMemory) -> Shadow {
        let mut shadow = Shadow(vec![0; END as usize]);
        for region in REGIONS {
            let bytes = &mut shadow.0[region.start as usize..region.end as usize];
            memory
                .read_slice(bytes, GuestAddress(region.start))
                .unwrap();
        }
        shadow
    }

    /// Where guest memory is another than it ought to be.
    pub(super) fn differs(&self, found: &Shadow) -> Option<u64> {
        let differs =
            |region: &Range<u64>| self.bytes(region.clone()) != found.bytes(region.clone());
        let mut region = REGIONS.into_iter().find(differs)?;
        region.find(|at| self.0[*at as usize] != found.0[*at as usize])
    }
}

/// Whether two ranges have a byte in common.
pub(super) fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end && !one.is_empty() && !other.is_empty()
}
