//! O_DIRECT: what it demands of a transfer, and how transfers that do not comply are bounced.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{AtFlags, Statx, StatxFlags};

use super::{HostFile, Kind};
use crate::{Buffer, Segments};

/// Memory for one bounced transfer; longer ones go in pieces.
const MAX_BOUNCE: usize = 256 << 10;

/// What O_DIRECT demands, in bytes: powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of the address of each piece of memory.
    pub(super) memory: u32,
    /// Of the offset in the file, and of the length of each piece.
    pub(super) offset: u32,
}

impl Alignment {
    /// What a file that was opened with O_DIRECT demands; `None` if it turns out that its file
    /// system cannot do it after all.
    pub(super) fn of(file: impl AsFd, kind: Kind) -> io::Result<Option<Alignment>> {
        let flags = StatxFlags::DIOALIGN;
        let statx = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, flags);
        match statx {
            Ok(Statx {
                stx_mask,
                stx_dio_mem_align: memory,
                stx_dio_offset_align: offset,
                ..
            }) if stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
                Ok((memory > 0 && offset > 0).then_some(Alignment { memory, offset }))
            }
            // Linux before 6.1, or a file system that does not say.
            _ => match kind {
                Kind::Device => {
                    let sector = rustix::fs::ioctl_blksszget(&file)?;
                    Ok(Some(Alignment {
                        memory: sector,
                        offset: sector,
                    }))
                }
                Kind::Regular => Self::probe(&file),
            },
        }
    }

    /// Finds the smallest length and address that a read takes.
    fn probe(file: impl AsFd) -> io::Result<Option<Alignment>> {
        const MOST: usize = 4096;
        let buffer = Buffer::zeroed(2 * MOST, MOST)?;
        let reads = |skip: usize, len: usize| {
            let fd = file.as_fd().as_raw_fd();
            // SAFETY: `skip` and `len` are at most half of the buffer each.
            unsafe { libc::pread(fd, buffer.as_ptr().add(skip).cast(), len, 0) >= 0 }
        };
        let sizes = [512, 1024, 2048, MOST];
        let offset = sizes.into_iter().find(|size| reads(0, *size));
        let memory = sizes.into_iter().find(|size| reads(*size, MOST));
        Ok(offset.zip(memory).map(|(offset, memory)| Alignment {
            memory: memory as u32,
            offset: offset as u32,
        }))
    }

    /// Whether O_DIRECT takes these pieces as they are.
    pub(super) fn takes(self, segments: &Segments) -> bool {
        segments.is_aligned(self.memory as usize, self.offset as usize)
    }

    fn buffer(self, len: usize) -> io::Result<Segments> {
        let len = len.min(MAX_BOUNCE);
        Ok(Segments::from_buffer(Buffer::zeroed(
            len,
            self.memory as usize,
        )?))
    }
}

impl HostFile {
    pub(super) async fn read_bounced(
        &self,
        direct: Alignment,
        mut offset: u64,
        mut to: Segments,
    ) -> io::Result<()> {
        let buffer = direct.buffer(to.len())?;
        while !to.is_empty() {
            let part = to.split_to(buffer.len());
            let aligned = buffer.slice(0, part.len());
            self.ring
                .read_exact_at(&self.file, offset, aligned.clone())
                .await?;
            part.copy_segments(&aligned);
            offset += part.len() as u64;
        }
        Ok(())
    }

    pub(super) async fn write_bounced(
        &self,
        direct: Alignment,
        mut offset: u64,
        mut from: Segments,
    ) -> io::Result<()> {
        let buffer = direct.buffer(from.len())?;
        while !from.is_empty() {
            let part = from.split_to(buffer.len());
            let aligned = buffer.slice(0, part.len());
            aligned.copy_segments(&part);
            self.ring.write_all_at(&self.file, offset, aligned).await?;
            offset += part.len() as u64;
        }
        Ok(())
    }
}
