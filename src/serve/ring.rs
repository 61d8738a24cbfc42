//! A virtqueue as a front end sets it up, message by message.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::memory::Regions;
use super::wrong;
use crate::devices::GuestMemory;

/// Largest size of a virtqueue. QEMU's largest; what our own PCI transport offers is smaller.
pub(super) const MAX_SIZE: u16 = 1024;

/// What a front end has said of a virtqueue.
#[derive(Default)]
pub(super) struct Ring {
    /// Number of descriptors; 0 until it is set.
    size: u16,
    /// Addresses of the descriptor table, the available and the used ring, in the front end's
    /// own process.
    areas: Option<[u64; 3]>,
    /// Where the next available entry is.
    base: u16,
    pub(super) kick: Option<OwnedFd>,
    pub(super) enabled: bool,
    /// Memory was taken away while it was ready. If it lay there, it waits until it lies in memory
    /// again.
    pub(super) waits: bool,
    /// While it is served: how far the available entries taken before were ahead of the used ring.
    pub(super) served: Option<u16>,
}

impl Ring {
    pub(super) fn set_size(&mut self, size: u32) -> io::Result<()> {
        match u16::try_from(size) {
            Ok(size) if size.is_power_of_two() && size <= MAX_SIZE => self.size = size,
            _ => {
                return Err(wrong(format!(
                    "a virtqueue of {size} descriptors, expected a power of two up to {MAX_SIZE}"
                )));
            }
        }
        Ok(())
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor table, the available and the used ring, as the front end addresses them.
    pub(super) fn set_areas(&mut self, areas: [u64; 3]) {
        self.areas = Some(areas);
    }

    pub(super) fn set_base(&mut self, base: u32) -> io::Result<()> {
        self.base =
            u16::try_from(base).map_err(|_| wrong(format!("the base of a virtqueue is {base}")))?;
        Ok(())
    }

    pub(super) fn base(&self) -> u16 {
        self.base
    }

    /// Whether it is to be served: it has a kick and is enabled.
    pub(super) fn is_ready(&self) -> bool {
        self.kick.is_some() && self.enabled
    }

    /// The index of its used ring.
    pub(super) fn used(&self, regions: &Regions, memory: &GuestMemory) -> io::Result<u16> {
        let [_, _, used] = self.addresses(regions)?;
        let index = used.0.checked_add(2).map(GuestAddress);
        let index: Option<u16> = index.and_then(|at| memory.load(at, Ordering::Acquire).ok());
        index
            .map(u16::from_le)
            .ok_or_else(|| wrong("a used ring lies outside the memory shared"))
    }

    fn addresses(&self, regions: &Regions) -> io::Result<[GuestAddress; 3]> {
        let areas = self
            .areas
            .ok_or_else(|| wrong("a ring without addresses"))?;
        let address = |user| {
            regions
                .guest_address(user)
                .ok_or_else(|| wrong("a ring lies outside the memory shared"))
        };
        let [table, available, used] = areas;
        Ok([address(table)?, address(available)?, address(used)?])
    }

    /// The virtqueue to serve: its next entries are `used` in the used ring and `ahead` further on
    /// in the available ring. Fails if it does not lie in the memory that is shared.
    pub(super) fn queue(
        &self,
        regions: &Regions,
        memory: &GuestMemory,
        used: u16,
        ahead: u16,
    ) -> io::Result<Queue> {
        let broken = |error: virtio_queue::Error| wrong(format!("a broken virtqueue: {error}"));
        if self.size == 0 {
            return Err(wrong("a virtqueue without a size"));
        }
        let [table, available, used_ring] = self.addresses(regions)?;
        let mut queue = Queue::new(MAX_SIZE).map_err(broken)?;
        queue.try_set_size(self.size).map_err(broken)?;
        queue.try_set_desc_table_address(table).map_err(broken)?;
        queue
            .try_set_avail_ring_address(available)
            .map_err(broken)?;
        queue.try_set_used_ring_address(used_ring).map_err(broken)?;
        queue.set_next_used(used);
        queue.set_next_avail(used.wrapping_add(ahead));
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(wrong("a ring lies outside the memory shared"));
        }
        Ok(queue)
    }
}
