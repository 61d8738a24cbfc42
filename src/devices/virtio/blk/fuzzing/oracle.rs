//! What the specification says of a chain in guest memory: a second, slow reading of it, written
//! without a look at how the device does it.

use std::ops::Range;

use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::place::{Descriptor, Shadow, overlap, table};
use crate::devices::virtio::blk::features::{MAX_RANGES, QUEUE_SIZE, has};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What a request is judged by.
#[derive(Clone, Copy)]
pub(super) struct Law {
    pub(super) features: u64,
    pub(super) ro: bool,
    /// Sectors in a logical block.
    pub(super) block: u64,
    /// Sectors of the disk.
    pub(super) capacity: u64,
}

/// What the device does with a chain.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Used length.
    pub(super) len: u32,
    /// Where the status goes, and what it is.
    pub(super) status: Option<(u64, u8)>,
    /// The device-writable bytes before the status, in order.
    pub(super) data: Vec<Range<u64>>,
    /// The first byte of the data is zeroed, as the used length says that it is written.
    pub(super) blank: bool,
    pub(super) action: Action,
    /// What the device reads to find all this out.
    pub(super) reads: Vec<Range<u64>>,
}

/// What becomes of the disk.
#[derive(Debug, Default)]
pub(super) enum Action {
    /// Nothing: it is refused, or there is nothing to do.
    #[default]
    None,
    Read(Range<u64>),
    Write(Range<u64>, Vec<u8>),
    Flush,
    GetId,
    Zero(Vec<Range<u64>>),
    Discard(Vec<Range<u64>>),
}

impl Verdict {
    /// What the device may write to guest memory.
    pub(super) fn writes(&self) -> Vec<Range<u64>> {
        let status = self.status.map(|(at, _)| at..at + 1);
        self.data.iter().cloned().chain(status).collect()
    }

    /// Whether the buffers that it writes overlap each other.
    pub(super) fn is_tangled(&self) -> bool {
        let writes = self.writes();
        let pairs = (1..writes.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
        let mut tangled = pairs.filter(|(i, j)| overlap(&writes[*i], &writes[*j]));
        tangled.next().is_some()
    }

    /// Sectors that it changes.
    pub(super) fn changes(&self) -> Vec<Range<u64>> {
        match &self.action {
            Action::Write(sectors, _) => Vec::from([sectors.clone()]),
            Action::Zero(ranges) | Action::Discard(ranges) => ranges.clone(),
            _ => Vec::new(),
        }
    }

    /// Whether the disk has to do something for it.
    pub(super) fn reaches_disk(&self) -> bool {
        match &self.action {
            Action::Read(sectors) => !sectors.is_empty(),
            Action::Flush => true,
            _ => self.changes().iter().any(|sectors| !sectors.is_empty()),
        }
    }
}

impl Law {
    /// Judges the chain that begins at descriptor `head`.
    pub(super) fn judge(&self, memory: &Shadow, queue: u16, size: u16, head: u16) -> Verdict {
        let mut verdict = Verdict::default();
        let Some(chain) = self.walk(memory, queue, size, head, &mut verdict.reads) else {
            return verdict;
        };
        let range = |descriptor: &Descriptor| {
            let end = descriptor.address.checked_add(descriptor.len.into())?;
            Some(descriptor.address..end).filter(|range| memory.has(range))
        };
        let chain: Vec<_> = chain.into_iter().filter(|d| d.len > 0).collect();
        let writable = |descriptor: &Descriptor| descriptor.flags & WRITE != 0;
        let total: u64 = chain.iter().map(|d| u64::from(d.len)).sum();
        let ordered = chain.is_sorted_by_key(writable);
        if total > 1 << 32 || !ordered || chain.iter().any(|d| range(d).is_none()) {
            let last = chain.last().filter(|d| writable(d));
            let last = last.and_then(|d| d.address.checked_add(u64::from(d.len) - 1));
            if let Some(at) = last.filter(|at| memory.has(&(*at..at + 1))) {
                verdict.status = Some((at, VIRTIO_BLK_S_IOERR as u8));
                verdict.len = 1;
            }
            return verdict;
        }
        let (back, out): (Vec<_>, Vec<_>) = chain.iter().partition(|d| writable(d));
        let out: Vec<_> = out.into_iter().filter_map(range).collect();
        verdict.reads.extend(out.iter().cloned());
        verdict.data = back.into_iter().filter_map(range).collect();
        let Some(last) = verdict.data.last_mut() else {
            return verdict;
        };
        last.end -= 1;
        let at = last.end;
        verdict.data.retain(|range| !range.is_empty());
        let space: u64 = verdict
            .data
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        let (status, written) = match self.request(memory, &out, space) {
            Ok(action) => {
                let written = match &action {
                    Action::Read(_) => space,
                    Action::GetId => space.min(20),
                    _ => 0,
                };
                verdict.action = action;
                (VIRTIO_BLK_S_OK, written)
            }
            Err(status) => (status, 0),
        };
        verdict.status = Some((at, status as u8));
        verdict.blank = written == 0 && space > 0;
        verdict.len = match written == space {
            true => written as u32 + 1,
            false => written.max(1) as u32,
        };
        verdict
    }

    /// Sections 2.7.5 and 2.7.5.3: the descriptors of a chain, `None` if it has no end.
    fn walk(
        &self,
        memory: &Shadow,
        queue: u16,
        size: u16,
        head: u16,
        reads: &mut Vec<Range<u64>>,
    ) -> Option<Vec<Descriptor>> {
        let mut chain = Vec::new();
        let (mut base, mut count, mut index) = (table(queue), u32::from(size), u32::from(head));
        let mut nested = false;
        while index < count {
            let address = base.checked_add(16 * u64::from(index))?;
            let descriptor = memory.descriptor(address)?;
            reads.push(address..address + 16);
            let Descriptor { flags, len, .. } = descriptor;
            if flags & INDIRECT != 0 {
                let allowed = has(self.features, VIRTIO_RING_F_INDIRECT_DESC);
                let sound = flags & NEXT == 0 && len > 0 && len % 16 == 0;
                if nested || !allowed || !sound {
                    return None;
                }
                (base, count, index, nested) = (descriptor.address, len / 16, 0, true);
                continue;
            }
            chain.push(descriptor);
            if chain.len() > usize::from(QUEUE_SIZE) {
                return None;
            }
            if flags & NEXT == 0 {
                return Some(chain);
            }
            index = descriptor.next.into();
        }
        None
    }

    /// Section 5.2.6: what a request asks for, or the status that refuses it.
    fn request(&self, memory: &Shadow, out: &[Range<u64>], space: u64) -> Result<Action, u32> {
        const IOERR: u32 = VIRTIO_BLK_S_IOERR;
        const UNSUPP: u32 = VIRTIO_BLK_S_UNSUPP;
        let bytes = out.iter().flat_map(|range| memory.bytes(range.clone()));
        let data_len = out.iter().map(|range| range.end - range.start).sum::<u64>();
        let header: Vec<u8> = bytes.clone().take(16).copied().collect();
        let header: [u8; 16] = header.try_into().map_err(|_| IOERR)?;
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = u64::from_le_bytes(*header.last_chunk().unwrap());
        let data_len = data_len - 16;
        let data = bytes.skip(16).copied();
        let offered = |feature| match has(self.features, feature) {
            true => Ok(()),
            false => Err(UNSUPP),
        };
        let sectors = |sector: u64, count: u64| {
            let end = sector
                .checked_add(count)
                .filter(|end| *end <= self.capacity);
            let end = end.ok_or(IOERR)?;
            let whole = sector.is_multiple_of(self.block) && end.is_multiple_of(self.block);
            whole.then_some(sector..end).ok_or(IOERR)
        };
        let whole = |len: u64| match len % 512 {
            0 => sectors(sector, len / 512),
            _ => Err(IOERR),
        };
        let segments = |flags: u32, feature| {
            if !self.ro {
                offered(feature)?;
            }
            if data_len == 0 || data_len % 16 != 0 || data_len > 16 * u64::from(MAX_RANGES) {
                return Err(IOERR);
            }
            let data: Vec<u8> = data.clone().collect();
            let (segments, _) = data.as_chunks::<16>();
            let u32_at = |segment: &[u8; 16], at: usize| {
                u32::from_le_bytes(segment[at..at + 4].try_into().unwrap())
            };
            if segments.iter().any(|it| u32_at(it, 12) & !flags != 0) {
                return Err(UNSUPP);
            }
            if self.ro {
                return Err(IOERR);
            }
            let range = |segment: &[u8; 16]| {
                let sector = u64::from_le_bytes(*segment.first_chunk().unwrap());
                sectors(sector, u32_at(segment, 8).into())
            };
            segments.iter().map(range).collect::<Result<Vec<_>, u32>>()
        };
        match kind {
            VIRTIO_BLK_T_IN if data_len > 0 => Err(IOERR),
            VIRTIO_BLK_T_IN => Ok(Action::Read(whole(space)?)),
            VIRTIO_BLK_T_OUT if self.ro || space > 0 => Err(IOERR),
            VIRTIO_BLK_T_OUT => {
                let sectors = whole(data_len)?;
                Ok(Action::Write(sectors, data.collect()))
            }
            VIRTIO_BLK_T_FLUSH => offered(VIRTIO_BLK_F_FLUSH).map(|()| Action::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Action::GetId),
            VIRTIO_BLK_T_DISCARD => Ok(Action::Discard(segments(0, VIRTIO_BLK_F_DISCARD)?)),
            VIRTIO_BLK_T_WRITE_ZEROES => Ok(Action::Zero(segments(1, VIRTIO_BLK_F_WRITE_ZEROES)?)),
            _ => Err(UNSUPP),
        }
    }
}
