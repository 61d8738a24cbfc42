//! Requests (virtio 1.3 section 5.2.6): from the bytes of a chain to a typed [`Request`] that
//! has passed every check.

use std::fmt;

use formats::Segments;
use smallvec::SmallVec;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::features::{MAX_RANGES, Profile, SECTOR_SIZE, has};

/// Length of the header: type, reserved, sector.
const HEADER_LEN: usize = 16;
/// Length of `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: usize = 16;

/// The final byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// Success.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Device or driver error.
    IoErr = VIRTIO_BLK_S_IOERR as u8,
    /// A request unsupported by the device.
    Unsupp = VIRTIO_BLK_S_UNSUPP as u8,
}

/// A request that may be carried out as it is. Offsets and lengths are bytes, inside the disk
/// and whole logical blocks.
#[derive(Debug)]
pub(super) enum Request {
    /// VIRTIO_BLK_T_IN: a read.
    In { offset: u64, to: Segments },
    /// VIRTIO_BLK_T_OUT: a write.
    Out { offset: u64, from: Segments },
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_GET_ID.
    GetId { to: Segments },
    /// VIRTIO_BLK_T_DISCARD.
    Discard(Ranges),
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes(Ranges),
}

/// The segments of a discard or write-zeroes request.
pub(super) type Ranges = SmallVec<[Range; 2]>;

/// One segment of a discard or write-zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Host space may be freed.
    pub(super) unmap: bool,
}

/// A request that gets no further than its checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) status: Status,
    pub(super) reason: &'static str,
    pub(super) header: Header,
}

/// The header of a request, copied once: the driver may change it meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    kind: u32,
    sector: u64,
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "type {} sector {}", self.kind, self.sector)
    }
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules<'a> {
    pub(super) profile: &'a Profile,
    /// Negotiated features.
    pub(super) features: u64,
    /// Size of the disk in sectors.
    pub(super) capacity: u64,
}

type Refusal = (Status, &'static str);

impl Request {
    /// Reads a request from the device-readable part of its chain and the device-writable part
    /// without the status byte.
    pub(super) fn parse(
        mut readable: Segments,
        writable: Segments,
        rules: &Rules<'_>,
    ) -> Result<Request, Refused> {
        let mut bytes = [0; HEADER_LEN];
        let copied = readable.copy_to(&mut bytes);
        readable.advance(HEADER_LEN);
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = bytes;
        let header = Header {
            kind: u32::from_le_bytes([t0, t1, t2, t3]),
            sector: u64::from_le_bytes(sector),
        };
        let request = if copied < HEADER_LEN {
            Err((Status::IoErr, "the header is shorter than 16 bytes"))
        } else {
            rules.check(header, readable, writable)
        };
        request.map_err(|(status, reason)| Refused {
            status,
            reason,
            header,
        })
    }
}

impl Rules<'_> {
    fn check(
        &self,
        header: Header,
        readable: Segments,
        writable: Segments,
    ) -> Result<Request, Refusal> {
        match header.kind {
            VIRTIO_BLK_T_IN => {
                if !readable.is_empty() {
                    return Err((Status::IoErr, "a read with device-readable data"));
                }
                let offset = self.data(header.sector, writable.len())?;
                let to = writable;
                Ok(Request::In { offset, to })
            }
            VIRTIO_BLK_T_OUT => {
                if self.profile.ro {
                    return Err((Status::IoErr, "a write to a read-only disk"));
                }
                if !writable.is_empty() {
                    return Err((Status::IoErr, "a write with device-writable data"));
                }
                let offset = self.data(header.sector, readable.len())?;
                let from = readable;
                Ok(Request::Out { offset, from })
            }
            VIRTIO_BLK_T_FLUSH if has(self.features, VIRTIO_BLK_F_FLUSH) => Ok(Request::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Request::GetId { to: writable }),
            VIRTIO_BLK_T_DISCARD => {
                let ranges = self.ranges(&readable, VIRTIO_BLK_F_DISCARD, 0)?;
                Ok(Request::Discard(ranges))
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let ranges = self.ranges(&readable, VIRTIO_BLK_F_WRITE_ZEROES, flags)?;
                Ok(Request::WriteZeroes(ranges))
            }
            _ => Err((Status::Unsupp, "a request that was not negotiated")),
        }
    }

    /// Checks the range of a read or write; returns its offset in bytes.
    fn data(&self, sector: u64, len: usize) -> Result<u64, Refusal> {
        let len = len as u64;
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err((Status::IoErr, "the data is no whole number of sectors"));
        }
        self.range(sector, len / SECTOR_SIZE)
    }

    /// Checks a range in sectors; returns its offset in bytes.
    fn range(&self, sector: u64, sectors: u64) -> Result<u64, Refusal> {
        if sector
            .checked_add(sectors)
            .is_none_or(|end| end > self.capacity)
        {
            return Err((Status::IoErr, "a range past the end of the disk"));
        }
        let block = u64::from(self.profile.block_size) / SECTOR_SIZE;
        if !sector.is_multiple_of(block) || !sectors.is_multiple_of(block) {
            return Err((Status::IoErr, "a range that is not whole blocks"));
        }
        Ok(sector * SECTOR_SIZE)
    }

    /// Reads and checks the segments of a discard or write-zeroes request, all before the first
    /// is carried out. `flags` are those that the request may have.
    fn ranges(&self, data: &Segments, feature: u32, flags: u32) -> Result<Ranges, Refusal> {
        let ro = self.profile.ro;
        if !ro && !has(self.features, feature) {
            return Err((Status::Unsupp, "a request that was not negotiated"));
        }
        let count = data.len() / RANGE_LEN;
        if count == 0 || !data.len().is_multiple_of(RANGE_LEN) {
            return Err((Status::IoErr, "the data is no whole number of segments"));
        }
        if count > MAX_RANGES as usize {
            return Err((Status::IoErr, "more segments than offered"));
        }
        let mut bytes = [0; RANGE_LEN * MAX_RANGES as usize];
        let len = data.copy_to(&mut bytes);
        let (segments, _) = bytes[..len].as_chunks::<RANGE_LEN>();
        let parsed = segments.iter().map(|segment| {
            let [
                s0,
                s1,
                s2,
                s3,
                s4,
                s5,
                s6,
                s7,
                n0,
                n1,
                n2,
                n3,
                f0,
                f1,
                f2,
                f3,
            ] = *segment;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            (sector, sectors, u32::from_le_bytes([f0, f1, f2, f3]))
        });
        if parsed.clone().any(|(_, _, given)| given & !flags != 0) {
            return Err((Status::Unsupp, "an unknown flag is set"));
        }
        if ro {
            return Err((Status::IoErr, "a discard of or zeroes for a read-only disk"));
        }
        parsed
            .map(|(sector, sectors, given)| {
                if sectors > self.profile.max_range_sectors() {
                    return Err((Status::IoErr, "a segment larger than offered"));
                }
                Ok(Range {
                    offset: self.range(sector, u64::from(sectors))?,
                    len: u64::from(sectors) * SECTOR_SIZE,
                    unmap: given & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0
                        && self.profile.may_unmap(),
                })
            })
            .collect()
    }
}
