//! Descriptor chains (virtio 1.3 section 2.7.5): each descriptor is copied once from guest
//! memory, checked, and turned into host memory that stays mapped.
//!
//! The walk is our own: `virtio_queue::DescriptorChain` ends silently at a loop, a bad index or
//! a descriptor outside guest memory, and a request cut short there must not reach a disk.

use std::rc::Rc;

use formats::Segments;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::devices::GuestMemory;

/// Size of a descriptor (section 2.7.5).
const DESCRIPTOR_SIZE: u64 = size_of::<Descriptor>() as u64;

/// Most bytes in one chain (section 2.7.5.2).
const MAX_BYTES: u64 = 1 << 32;

/// Most pieces of one chain, for each buffer that it may have. A buffer is in several where
/// regions of guest memory meet. Buffers that do not overlap have one more for each such place, so
/// two for each buffer are more than memory of a few hundred regions makes of any request; without
/// a limit, memory of many small regions makes of a small request a large list.
const PIECES_PER_BUFFER: usize = 4;

/// The buffers of one descriptor chain.
#[derive(Debug)]
pub(crate) struct Chain {
    /// What the device reads.
    pub(crate) readable: Segments,
    /// What the device writes.
    pub(crate) writable: Segments,
}

/// A chain that breaks the rules of section 2.7.
#[derive(Debug)]
pub(crate) struct BrokenChain {
    /// The rule that it breaks.
    pub(crate) reason: &'static str,
    /// Its very last byte, if the chain has an end and that byte is device-writable: the place
    /// where a request ends with its status.
    pub(crate) last: Option<Segments>,
}

/// A piece of a buffer that is contiguous in our own address space.
type Piece = (*mut u8, usize);

/// Memory for the pieces of a chain while it is walked, reused for every chain.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Vec<Piece>);

/// The descriptors of one virtqueue.
pub(crate) struct DescriptorTable {
    /// The guest's memory, which every chain keeps mapped.
    pub(crate) memory: Rc<GuestMemory>,
    /// Guest-physical address.
    pub(crate) address: GuestAddress,
    /// Number of descriptors: the queue size.
    pub(crate) size: u16,
    /// Most buffers in one chain: the largest queue size that the device offers. A driver that
    /// chose a smaller one may still chain that many in an indirect table, so that a limit in
    /// the configuration space such as `seg_max` holds for every queue size.
    pub(crate) longest: u16,
    /// Whether VIRTIO_F_INDIRECT_DESC was negotiated.
    pub(crate) indirect: bool,
}

impl DescriptorTable {
    /// Walks the chain that begins at descriptor `head`.
    pub(crate) fn walk(&self, head: u16, scratch: &mut Scratch) -> Result<Chain, BrokenChain> {
        scratch.0.clear();
        let mut walk = Walk {
            memory: &self.memory,
            pieces: &mut scratch.0,
            most: PIECES_PER_BUFFER * usize::from(self.longest),
            readable: None,
            bytes: 0,
            fault: None,
            last: None,
        };
        let end = self.descriptors(head, |descriptor| walk.add(descriptor));
        if let Some(reason) = end.err() {
            return Err(BrokenChain { reason, last: None });
        }
        let (fault, last) = (walk.fault, walk.last);
        let readable = walk.readable.unwrap_or(scratch.0.len());
        if let Some(reason) = fault {
            let last = last.and_then(|address| self.byte(address));
            return Err(BrokenChain { reason, last });
        }
        let (readable, writable) = scratch.0.split_at(readable);
        Ok(Chain {
            readable: self.segments(readable),
            writable: self.segments(writable),
        })
    }

    /// Calls `add` for each descriptor of the chain that describes a buffer. Fails if the chain
    /// has no end, or none that can be found.
    fn descriptors(&self, head: u16, mut add: impl FnMut(&Descriptor)) -> Result<(), &'static str> {
        let (mut table, mut size) = (self.address, u32::from(self.size));
        let mut whole = self.table(table, size);
        let mut in_indirect = false;
        let mut index = u32::from(head);
        let mut buffers = 0;
        loop {
            if index >= size {
                return Err("a descriptor index is out of range");
            }
            let offset = u64::from(index) * DESCRIPTOR_SIZE;
            let descriptor: Option<Descriptor> = match &whole {
                Some(whole) => whole.read_obj(offset as usize).ok(),
                None => table
                    .checked_add(offset)
                    .and_then(|address| self.memory.read_obj(address).ok()),
            };
            let descriptor =
                descriptor.ok_or("an indirect descriptor table lies outside guest memory")?;
            if descriptor.refers_to_indirect_table() {
                if !self.indirect {
                    return Err("an indirect descriptor, which was not negotiated");
                }
                if in_indirect {
                    return Err("an indirect descriptor within an indirect table");
                }
                if descriptor.has_next() {
                    return Err("an indirect descriptor has a next one");
                }
                let len = u64::from(descriptor.len());
                if len == 0 || !len.is_multiple_of(DESCRIPTOR_SIZE) {
                    return Err("the length of an indirect table is not a multiple of 16");
                }
                (table, size) = (descriptor.addr(), descriptor.len() / DESCRIPTOR_SIZE as u32);
                whole = self.table(table, size);
                (in_indirect, index) = (true, 0);
                continue;
            }
            if buffers == self.longest {
                return Err("the chain is a loop, or longer than the virtqueue");
            }
            buffers += 1;
            add(&descriptor);
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.next());
        }
    }

    /// A table of `size` descriptors that lies in one region, looked up once for all of them.
    fn table(&self, address: GuestAddress, size: u32) -> Option<VolatileSlice<'_>> {
        let len = usize::try_from(u64::from(size) * DESCRIPTOR_SIZE).ok()?;
        GuestMemoryBackend::get_slice(&*self.memory, address, len).ok()
    }

    fn segments(&self, pieces: &[Piece]) -> Segments {
        // SAFETY: `Walk::add` took the pieces from the memory that the clone keeps mapped. It is
        // shared with the guest, and so mapped writable and only ever accessed through raw
        // pointers.
        unsafe { Segments::new(pieces.iter().copied(), Rc::clone(&self.memory) as _) }
    }

    fn byte(&self, address: GuestAddress) -> Option<Segments> {
        let host = self.memory.get_host_address(address).ok()?;
        Some(self.segments(&[(host, 1)]))
    }
}

/// A chain while it is walked.
struct Walk<'a> {
    memory: &'a GuestMemory,
    pieces: &'a mut Vec<Piece>,
    /// As many as there may be.
    most: usize,
    /// Number of the pieces that are device-readable, once a device-writable one has come.
    readable: Option<usize>,
    bytes: u64,
    /// The first fault that leaves the chain an end. The walk goes on to find it.
    fault: Option<&'static str>,
    /// The last byte, if it is device-writable.
    last: Option<GuestAddress>,
}

impl Walk<'_> {
    fn add(&mut self, descriptor: &Descriptor) {
        let (address, len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            return;
        }
        let last_byte = address.checked_add(u64::from(len) - 1);
        self.last = last_byte.filter(|_| descriptor.is_write_only());
        self.bytes += u64::from(len);
        let fault = if self.bytes > MAX_BYTES {
            Some("the chain is longer than 2^32 bytes")
        } else if last_byte.is_none() {
            Some("a buffer lies outside guest memory")
        } else if descriptor.is_write_only() {
            self.readable.get_or_insert(self.pieces.len());
            None
        } else if self.readable.is_some() {
            Some("a device-readable buffer comes after a device-writable one")
        } else {
            None
        };
        self.fault = self.fault.or(fault);
        if self.fault.is_some() {
            return;
        }
        for slice in GuestMemoryBackend::get_slices(self.memory, address, len as usize) {
            let Ok(slice) = slice else {
                self.fault = Some("a buffer lies outside guest memory");
                return;
            };
            if self.pieces.len() == self.most {
                self.fault = Some("the chain lies in too many regions of guest memory");
                return;
            }
            let piece = (slice.ptr_guard_mut().as_ptr(), slice.len());
            self.pieces.push(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::FileOffset;

    use super::*;
    use crate::devices::virtio::testing::*;

    fn table(address: u64, longest: u16) -> DescriptorTable {
        DescriptorTable {
            memory: Rc::new(GuestMemory::clone(&guest_memory())),
            address: GuestAddress(address),
            size: longest,
            longest,
            indirect: true,
        }
    }

    #[test]
    fn a_chain_has_2_32_bytes_at_most() {
        let table = table(0, 1024);
        let whole = [writable(0, 16 << 20); 256];
        write_table(&table.memory, 0, &whole);
        let chain = table.walk(0, &mut Scratch::default()).unwrap();
        assert_eq!(chain.writable.len(), 1 << 32);
        write_table(
            &table.memory,
            0,
            &[&whole[..], &[writable(END - 1, 1)]].concat(),
        );
        let broken = table.walk(0, &mut Scratch::default()).unwrap_err();
        assert_eq!(broken.reason, "the chain is longer than 2^32 bytes");
        assert_eq!(broken.last.unwrap().len(), 1);
    }

    /// Begin of the memory in regions of a page, of which no two meet in our address space.
    const SPLIT: u64 = 1 << 30;

    /// A table at 0 for the longest chains of `longest` buffers, and `pages` regions at [`SPLIT`].
    fn split_table(longest: u16, pages: u64) -> DescriptorTable {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, pages << 13).unwrap();
        let file = Arc::new(std::fs::File::from(file));
        let page = |number: u64| {
            let file = FileOffset::from_arc(Arc::clone(&file), number << 13);
            let address = GuestAddress(SPLIT + (number << 12));
            (address, 4096, Some(file))
        };
        let whole = (GuestAddress(0), 1 << 20, None);
        let regions = std::iter::once(whole).chain((0..pages).map(page));
        let memory = GuestMemory::from_ranges_with_files(regions).unwrap();
        DescriptorTable {
            memory: Rc::new(memory),
            ..table(0, longest)
        }
    }

    #[test]
    fn buffers_that_do_not_overlap_may_lie_in_all_regions_of_guest_memory() {
        // As many as a front end has, in the smallest virtqueue that we offer.
        let (longest, pages) = (256, 256);
        let table = split_table(longest, pages);
        let len = pages * 4096 / u64::from(longest - 2);
        let buffers = (0..u64::from(longest) - 2).map(|at| readable(SPLIT + at * len, len as u32));
        let buffers = [readable(0, 16)].into_iter().chain(buffers);
        let buffers: Vec<_> = buffers.chain([writable(0, 1)]).collect();
        write_table(&table.memory, 0, &buffers);
        let chain = table.walk(0, &mut Scratch::default()).unwrap();
        assert!(chain.readable.iovecs().len() > 500);
    }

    #[test]
    fn the_pieces_of_a_chain_are_bounded() {
        let table = split_table(64, 200);
        let whole = [writable(SPLIT, 200 * 4096); 63];
        write_table(&table.memory, 0, &[&whole[..], &[writable(0, 1)]].concat());
        let mut scratch = Scratch::default();
        let broken = table.walk(0, &mut scratch).unwrap_err();
        assert_eq!(
            broken.reason,
            "the chain lies in too many regions of guest memory"
        );
        // And yet it is answered.
        assert_eq!(broken.last.unwrap().len(), 1);
        assert_eq!(scratch.0.len(), 4 * 64);
    }

    #[test]
    fn the_buffers_stay_mapped_as_long_as_the_chain() {
        let table = table(0, 16);
        write_table(&table.memory, 0, &[readable(SEAM - 3, 6)]);
        table
            .memory
            .write_slice(b"seamed", GuestAddress(SEAM - 3))
            .unwrap();
        let memory = Rc::downgrade(&table.memory);
        let chain = table.walk(0, &mut Scratch::default()).unwrap();
        assert_eq!(chain.readable.iovecs().len(), 2);
        drop(table);
        let mut bytes = [0; 6];
        chain.readable.copy_to(&mut bytes);
        assert_eq!(&bytes, b"seamed");
        drop(chain);
        assert!(memory.upgrade().is_none());
    }

    #[test]
    fn a_loop_is_longer_than_the_virtqueue() {
        let table = table(0, 16);
        let descriptor = Descriptor::new(BUFFERS, 1, 1, 0);
        table.memory.write_obj(descriptor, GuestAddress(0)).unwrap();
        let broken = table.walk(0, &mut Scratch::default()).unwrap_err();
        assert_eq!(
            broken.reason,
            "the chain is a loop, or longer than the virtqueue"
        );
        assert!(broken.last.is_none());
    }

    #[test]
    fn a_head_past_the_table_is_out_of_range() {
        let broken = table(0, 16).walk(16, &mut Scratch::default()).unwrap_err();
        assert_eq!(broken.reason, "a descriptor index is out of range");
    }
}
