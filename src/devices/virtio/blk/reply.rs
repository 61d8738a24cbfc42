//! Where the outcome of a request goes: the final byte of its chain.

use formats::Segments;

use super::request::Status;

/// Where the outcome of a request goes.
pub(super) struct Reply {
    /// The final byte of the chain.
    status: Segments,
    /// The first byte before it that the device may write, if any.
    first: Segments,
    /// Number of bytes before the status.
    len: usize,
}

impl Reply {
    /// Takes the status byte off the device-writable part; the data is left. `None` if there is
    /// no byte at all.
    pub(super) fn split_off(writable: &mut Segments) -> Option<Reply> {
        let len = writable.len().checked_sub(1)?;
        let data = writable.split_to(len);
        let status = std::mem::replace(writable, data);
        Some(Reply {
            status,
            first: writable.slice(0, 1),
            len,
        })
    }

    /// Writes the status after `written` bytes of data. Returns the used length: what was
    /// written from the first device-writable byte on (section 2.7.8.2).
    pub(super) fn write(&self, status: Status, written: usize) -> u32 {
        // The status counts only if all the data before it was written. Yet a driver may take 0
        // for a request that the device never looked at, so one byte of the data is written.
        let len = match written {
            _ if written == self.len => written + 1,
            0 => {
                self.first.fill(0);
                1
            }
            _ => written,
        };
        // Last: a driver may let its buffers overlap.
        self.status.copy_from(&[status as u8]);
        // A chain has 2^32 bytes at most, 16 of them the header.
        u32::try_from(len).unwrap_or(u32::MAX)
    }
}
