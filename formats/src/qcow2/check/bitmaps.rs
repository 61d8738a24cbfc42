//! The clusters of persistent dirty bitmaps (qcow2 specification, "Bitmaps").

use super::super::Header;
use super::super::entry::OFFSET_MASK;
use super::super::header::{autoclear, be16, be32, be64};
use super::walk::Walk;
use super::{CheckError, io};

/// The largest directory that is believed: that of QEMU.
const MAX_DIRECTORY: u64 = 64 << 20;
/// Length of an entry of the directory before its extra data and its name.
const ENTRY: usize = 24;
/// Bits of an entry of a bitmap's table that must be 0.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// How much of a table is read at once.
const CHUNK: usize = 1 << 20;

impl Walk<'_> {
    /// Counts the bitmaps, unless they are no longer valid: then their clusters are leaked.
    pub(super) fn count_bitmaps(&mut self, header: &Header) -> Result<(), CheckError> {
        let Some(bitmaps) = header.bitmaps else {
            return Ok(());
        };
        if header.autoclear_features & autoclear::BITMAPS == 0 || bitmaps.count == 0 {
            return Ok(());
        }
        let (offset, len) = (bitmaps.directory_offset, bitmaps.directory_len);
        self.count_table(offset, len, || "the bitmap directory".into())?;
        if len > MAX_DIRECTORY.min(self.file_len) {
            let wrong = format!("the bitmap directory is said to have {len} bytes");
            self.astray(1, || wrong);
            return Ok(());
        }
        let mut directory = vec![0; len as usize];
        io::read_padded(self.file, offset, &mut directory)?;
        let mut rest = &directory[..];
        // Tables cannot overlap: all together they are in the file.
        let mut left = self.file_len;
        for number in 0..bitmaps.count {
            let entry_len = (ENTRY + usize::from(be16(rest, 18)))
                .saturating_add(be32(rest, 20) as usize)
                .saturating_add(7)
                & !7;
            let (table, entries) = (be64(rest, 0), be32(rest, 8));
            let table_len = u64::from(entries) * 8;
            if rest.len() < entry_len || table_len > left {
                self.astray(1, || {
                    format!("entry {number} of the bitmap directory is damaged")
                });
                return Ok(());
            }
            left -= table_len;
            rest = &rest[entry_len..];
            self.count_table(table, table_len, || format!("the table of bitmap {number}"))?;
            self.count_bitmap(number, table, table_len)?;
        }
        Ok(())
    }

    fn count_bitmap(&mut self, number: u32, offset: u64, len: u64) -> Result<(), CheckError> {
        let mut chunk = vec![0; CHUNK.min(len as usize)];
        let mut done = 0;
        while done < len {
            let now = (len - done).min(CHUNK as u64) as usize;
            let part = &mut chunk[..now];
            if io::read_table(self.file, offset + done, part)? {
                for entry in part.chunks(8).map(|entry| be64(entry, 0)) {
                    self.bitmap_entry(number, entry)?;
                }
            }
            done += now as u64;
        }
        Ok(())
    }

    fn bitmap_entry(&mut self, number: u32, entry: u64) -> Result<(), CheckError> {
        let at = || format!("an entry of the table of bitmap {number}, {entry:#x},");
        let offset = entry & OFFSET_MASK;
        let unaligned = self.geometry.in_cluster(offset) != 0;
        // Without a place, bit 0 says what all bits of it are.
        if entry & RESERVED != 0 || unaligned || offset != 0 && entry & 1 != 0 {
            self.astray(1, || format!("{} is damaged", at()));
            return Ok(());
        }
        match offset {
            0 => Ok(()),
            _ => self.count(offset, self.geometry.cluster_size(), 1, at),
        }
    }
}
