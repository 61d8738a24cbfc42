//! A driver that does what a fuzzer's bytes say: mostly what the specification asks of it.

use arbitrary::{Result, Unstructured};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::oracle::Law;
use super::place::*;
use crate::devices::virtio::blk::features::has;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Most blocks and most sectors in one request.
const MAX_SECTORS: u64 = 16;
/// Where things are in a slot.
const TABLE: u64 = 0x100;
const DATA: u64 = 0x800;
const STATUS: u64 = 0x4ff0;
/// Most descriptors of one chain.
const MAX_PIECES: usize = 12;

/// The driver's side of the virtqueues.
pub(super) struct Driver {
    /// Size of each.
    pub(super) sizes: [u16; QUEUES as usize],
    /// Available indices.
    pub(super) available: [u16; QUEUES as usize],
    /// Descriptors of this batch.
    taken: [u16; QUEUES as usize],
}

/// A request while it is made.
struct Draft {
    header: Vec<u8>,
    out: Vec<u8>,
    back: u32,
}

impl Driver {
    pub(super) fn new(sizes: [u16; QUEUES as usize]) -> Driver {
        Driver {
            sizes,
            available: [0; QUEUES as usize],
            taken: [0; QUEUES as usize],
        }
    }

    /// Makes a batch of requests available; returns the virtqueue and head of each.
    pub(super) fn batch(
        &mut self,
        u: &mut Unstructured<'_>,
        law: &Law,
        memory: &mut Shadow,
    ) -> Result<Vec<(u16, u16)>> {
        self.taken = [0; QUEUES as usize];
        let mut heads = Vec::new();
        for slot in SLOTS.into_iter().take(u.int_in_range(1..=SLOTS.len())?) {
            let queue = u.int_in_range(0..=QUEUES - 1)?;
            // A quarter of the requests break a rule or two.
            let hostile = u.arbitrary::<u8>()? >= 192;
            let mut draft = draft(u, law)?;
            if hostile {
                twist(u, law, &mut draft)?;
            }
            let Some(head) = self.place(u, law, memory, queue, slot, &draft, hostile)? else {
                break;
            };
            self.offer(memory, queue, head);
            heads.push((queue, head));
            if hostile && u.ratio(1, 16)? {
                self.offer(memory, queue, head);
                heads.push((queue, head));
            }
        }
        for queue in 0..QUEUES {
            self.publish(memory, queue, self.available[usize::from(queue)]);
        }
        Ok(heads)
    }

    fn offer(&mut self, memory: &mut Shadow, queue: u16, head: u16) {
        let at = usize::from(queue);
        let entry = u64::from(self.available[at] % self.sizes[at]);
        memory.set(available(queue) + 4 + 2 * entry, &head.to_le_bytes());
        self.available[at] = self.available[at].wrapping_add(1);
    }

    /// Sets the available index.
    pub(super) fn publish(&self, memory: &mut Shadow, queue: u16, index: u16) {
        memory.set(available(queue) + 2, &index.to_le_bytes());
    }

    /// Puts a request into guest memory; `None` if there are too few descriptors.
    #[allow(clippy::too_many_arguments, reason = "what there is to a chain")]
    fn place(
        &mut self,
        u: &mut Unstructured<'_>,
        law: &Law,
        memory: &mut Shadow,
        queue: u16,
        slot: u64,
        draft: &Draft,
        hostile: bool,
    ) -> Result<Option<u16>> {
        let data = slot + DATA + u.int_in_range(0..=15u64)?;
        let header = slot + u.int_in_range(0..=7u64)?;
        memory.set(header, &draft.header);
        memory.set(data, &draft.out);
        let back = data + draft.out.len() as u64;
        let buffer = |address, len: usize, flags| Descriptor {
            address,
            len: len as u32,
            flags,
            next: 0,
        };
        let parts = [
            buffer(header, draft.header.len(), 0),
            buffer(data, draft.out.len(), 0),
            buffer(back, draft.back as usize, WRITE),
            buffer(slot + STATUS, 1, WRITE),
        ];
        let mut chain = Vec::new();
        for part in parts.into_iter().filter(|part| part.len > 0) {
            let mut rest = part;
            while rest.len > 1 && chain.len() < MAX_PIECES - 4 && u.ratio(1, 4)? {
                let len = u.int_in_range(1..=rest.len - 1)?;
                chain.push(Descriptor { len, ..rest });
                rest.address += u64::from(len);
                rest.len -= len;
            }
            chain.push(rest);
        }
        // How many descriptors stand in the virtqueue's own table.
        let mut direct = chain.len();
        if has(law.features, VIRTIO_RING_F_INDIRECT_DESC) && u.arbitrary()? {
            direct = u.int_in_range(0..=2.min(chain.len() - 1))?;
        }
        let taken = &mut self.taken[usize::from(queue)];
        let (size, first) = (self.sizes[usize::from(queue)], *taken);
        let mut own = chain[..direct].to_vec();
        let mut other = chain[direct..].to_vec();
        if !other.is_empty() {
            let len = 16 * other.len();
            own.push(buffer(slot + TABLE, len, INDIRECT));
        }
        *taken += own.len() as u16;
        if *taken > size {
            return Ok(None);
        }
        for (index, descriptors) in [(first, &mut own), (0, &mut other)] {
            let last = descriptors.len().saturating_sub(1);
            for (descriptor, next) in descriptors[..last].iter_mut().zip(index + 1..) {
                descriptor.flags |= NEXT;
                descriptor.next = next;
            }
        }
        if hostile {
            for _ in 0..u.int_in_range(0..=2)? {
                let at = u.choose_index(own.len() + other.len())?;
                let descriptor = own.iter_mut().chain(&mut other).nth(at);
                spoil(
                    u,
                    slot,
                    size,
                    descriptor.unwrap_or(&mut Descriptor::default()),
                )?;
            }
        }
        for (at, descriptor) in (u64::from(first)..).zip(&own) {
            memory.set_descriptor(table(queue) + 16 * at, descriptor);
        }
        for (at, descriptor) in (0..).zip(&other) {
            memory.set_descriptor(slot + TABLE + 16 * at, descriptor);
        }
        Ok(Some(first))
    }
}

/// A request that the disk can carry out.
fn draft(u: &mut Unstructured<'_>, law: &Law) -> Result<Draft> {
    let mut kinds = vec![VIRTIO_BLK_T_IN];
    if !law.ro {
        kinds.extend([VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT]);
    }
    let optional = [
        (VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_FLUSH),
        (VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_T_DISCARD),
        (VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_WRITE_ZEROES),
    ];
    for (feature, kind) in optional {
        if has(law.features, feature) {
            kinds.push(kind);
        }
    }
    let mut kind = *u.choose(&kinds)?;
    let blocks = law.capacity / law.block;
    if blocks == 0 || u.ratio(1, 32)? {
        kind = VIRTIO_BLK_T_GET_ID;
    }
    let count = u.int_in_range(1..=(MAX_SECTORS / law.block).min(blocks.max(1)))?;
    let last = blocks.saturating_sub(count);
    let start = match u.ratio(1, 8)? {
        true => last,
        false => u.int_in_range(0..=last)?,
    };
    let (sector, sectors) = (start * law.block, count * law.block);
    let len = sectors as usize * 512;
    let mut draft = Draft {
        header: Vec::new(),
        out: Vec::new(),
        back: 0,
    };
    match kind {
        VIRTIO_BLK_T_IN => draft.back = len as u32,
        VIRTIO_BLK_T_OUT => {
            let stamp: u32 = u.arbitrary()?;
            draft.out = (0..len as u32)
                .map(|at| (at.wrapping_add(stamp).wrapping_mul(0x9e37_79b1) >> 24) as u8)
                .collect();
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let flags = match kind {
                VIRTIO_BLK_T_DISCARD => 0,
                _ => u.int_in_range(0..=1u32)?,
            };
            // The range in one segment, or one segment a block.
            let parts = if u.arbitrary()? { count } else { 1 };
            for part in 0..parts {
                let sectors = sectors / parts;
                let sector = sector + part * sectors;
                draft.out.extend(sector.to_le_bytes());
                draft.out.extend((sectors as u32).to_le_bytes());
                draft.out.extend(flags.to_le_bytes());
            }
        }
        VIRTIO_BLK_T_GET_ID => draft.back = 20,
        _ => {}
    }
    let data = matches!(kind, VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT);
    draft.header.extend(kind.to_le_bytes());
    draft.header.extend([0; 4]);
    draft
        .header
        .extend(if data { sector } else { 0 }.to_le_bytes());
    Ok(draft)
}

/// Changes what a request says.
fn twist(u: &mut Unstructured<'_>, law: &Law, draft: &mut Draft) -> Result<()> {
    match u.int_in_range(0..=8)? {
        0 => {
            let any: u32 = u.arbitrary()?;
            let kind = *u.choose(&[0, 1, 4, 8, 11, 13, 2, 5, 10, 14, 1 << 31, any])?;
            draft.header[..4].copy_from_slice(&kind.to_le_bytes());
        }
        1 | 2 => {
            let sector = sector(u, law)?;
            let any = match draft.out.first_chunk_mut::<8>() {
                Some(segment) if u.arbitrary()? => Some(segment),
                _ => draft.header.last_chunk_mut(),
            };
            if let Some(any) = any {
                *any = sector.to_le_bytes();
            }
        }
        3 => {
            let count: u32 = u.arbitrary()?;
            let count = *u.choose(&[0, 1, 7, u32::MAX, 1 << 31, count])?;
            if let Some(field) = draft.out.get_mut(8..12) {
                field.copy_from_slice(&count.to_le_bytes());
            }
        }
        4 => {
            let flag = 1u32 << u.int_in_range(0..=31)?;
            if let Some(field) = draft.out.get_mut(12..16) {
                field.copy_from_slice(&flag.to_le_bytes());
            }
        }
        5 => draft.back = *u.choose(&[0, 1, 6, 20, 511, 513, 0x2200])?,
        6 => {
            let len = *u.choose(&[0, 1, 15, 16, 17, 511, 513, 528, 1040])?;
            draft.out.resize(len, 0);
        }
        7 => draft.header.truncate(u.int_in_range(0..=15)?),
        // As it is: maybe its descriptors are not.
        _ => {}
    }
    Ok(())
}

/// A sector that is out of range, or nearly.
fn sector(u: &mut Unstructured<'_>, law: &Law) -> Result<u64> {
    let near = u.int_in_range(0..=3u64)?;
    let any: u64 = u.arbitrary()?;
    Ok(*u.choose(&[
        law.capacity + near,
        law.capacity.saturating_sub(near),
        near,
        1 << 55 | near,
        1 << 63 | near,
        u64::MAX - near,
        any,
    ])?)
}

/// Breaks a descriptor.
fn spoil(u: &mut Unstructured<'_>, slot: u64, size: u16, it: &mut Descriptor) -> Result<()> {
    match u.int_in_range(0..=4)? {
        0 => {
            let near = u64::from(u.int_in_range(0..=0x220u16)?);
            let anywhere = u.int_in_range(0..=END)?;
            it.address = *u.choose(&[
                HOLE,
                HOLE - near,
                END - near,
                u64::MAX - near,
                SEAM - near,
                slot + near,
                anywhere,
                1 << 40,
            ])?;
        }
        1 => {
            let any: u32 = u.arbitrary()?;
            let len = it.len;
            it.len = *u.choose(&[
                0,
                1,
                len.wrapping_add(1),
                len.wrapping_sub(1),
                len.wrapping_add(512),
                u32::MAX,
                1 << 31,
                any,
            ])?;
        }
        2 => it.flags ^= u.int_in_range(1..=7)?,
        3 => {
            // A table, maybe within a table.
            it.address = slot + TABLE + 16 * u.int_in_range(0..=4u64)?;
            it.len = 16 * u.int_in_range(1..=8u32)?;
            it.flags = INDIRECT;
        }
        _ => {
            let any = u.int_in_range(0..=size)?;
            it.flags |= NEXT;
            it.next = *u.choose(&[0, 1, 2, any, size, 0x7fff, 0xffff])?;
        }
    }
    Ok(())
}
