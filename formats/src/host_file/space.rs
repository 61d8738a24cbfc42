//! Space on the host: allocating it, freeing it, and making zeroes without writing them.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::ioctl::{Setter, opcode};

use super::{HostFile, Kind};
use crate::{Buffer, Extent, Segments};

/// Zeroes are written from one piece of memory of this size, again and again.
const ZEROES: usize = 64 << 10;
/// Bytes of zeroes in one write.
const ZEROES_AT_ONCE: usize = 16 * ZEROES;
/// Space is allocated in steps of this size, so that there is progress to report.
const STEP: u64 = 1 << 30;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Whether an error says that the host does not know how.
fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    )
}

impl HostFile {
    /// The smallest unit that [`HostFile::discard`] frees, in bytes; 0 if the host cannot. The
    /// image must be open for writing.
    pub async fn discard_granularity(&self) -> u32 {
        match self.kind {
            Kind::Regular => {
                // Past its end a file has nothing to lose.
                let end = self.size().next_multiple_of(self.block.into());
                let punch = self
                    .ring
                    .fallocate(&self.file, PUNCH, end, self.block.into());
                if punch.await.is_ok() { self.block } else { 0 }
            }
            Kind::Device => queue_limit(&self.file, "discard_granularity").unwrap_or(0),
        }
    }

    /// Frees a range on the host. A range of a file then reads as zeroes; one of a block device
    /// as the device likes, and no more than its whole sectors.
    pub async fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.kind {
            Kind::Regular => {
                self.note_zeroing(offset, offset + len);
                self.ring.fallocate(&self.file, PUNCH, offset, len).await
            }
            Kind::Device => {
                let sector = u64::from(rustix::fs::ioctl_blksszget(&self.file)?);
                let start = offset.next_multiple_of(sector);
                let end = (offset + len) / sector * sector;
                if start >= end {
                    return Ok(());
                }
                let range = [start, end - start];
                let discard = move |device: BorrowedFd<'_>| {
                    // SAFETY: BLKDISCARD (linux/fs.h) takes a pointer to two 64-bit numbers.
                    let ioctl =
                        unsafe { Setter::<{ opcode::none(0x12, 119) }, [u64; 2]>::new(range) };
                    // SAFETY: the opcode and its argument are as above.
                    Ok(unsafe { rustix::ioctl::ioctl(device, ioctl) }?)
                };
                self.ring.call(&self.file, discard).await
            }
        }
    }

    /// Makes a range read as zeroes; with `unmap` its space is freed where the host can do both.
    pub async fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.note_zeroing(offset, offset + len);
        // The block layer takes both calls for its devices too, and keeps its cache in step.
        let ways = [
            (unmap, PUNCH, &self.no_punch),
            (true, ZERO_RANGE, &self.no_zero_range),
        ];
        for (wanted, mode, refused) in ways {
            if !wanted || refused.get() {
                continue;
            }
            match self.ring.fallocate(&self.file, mode, offset, len).await {
                Err(error) if unsupported(&error) => refused.set(true),
                // A block device with sectors larger than the range's ends.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return result,
            }
        }
        self.write_out(offset, len).await
    }

    /// Writes zeroes.
    async fn write_out(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeroes = self.zeroes()?;
        while len > 0 {
            let part = zeroes.slice(0, len.min(ZEROES_AT_ONCE as u64) as usize);
            let count = part.len() as u64;
            self.ring.write_all_at(&self.file, offset, part).await?;
            offset += count;
            len -= count;
        }
        Ok(())
    }

    /// 1 MiB of zeroes, to be written.
    pub(crate) fn zeroes(&self) -> io::Result<Segments> {
        if let Some(zeroes) = self.zeroes.get() {
            return Ok(zeroes.clone());
        }
        let buffer = Rc::new(Buffer::zeroed(ZEROES, ZEROES)?);
        let pieces = (0..ZEROES_AT_ONCE / ZEROES).map(|_| (buffer.as_ptr(), ZEROES));
        // SAFETY: every piece is the buffer, which is kept, and which nobody writes to.
        let zeroes = unsafe { Segments::new(pieces, buffer.clone()) };
        Ok(self.zeroes.get_or_init(|| zeroes).clone())
    }

    /// Tells whether there is data at `offset` or a hole, and how much of `len` bytes is like it.
    /// What lies past the end of a file is a hole; a block device has none.
    pub fn extent(&self, offset: u64, len: u64) -> io::Result<Extent> {
        if self.kind == Kind::Device {
            return Ok(Extent { data: true, len });
        }
        // Should it have been freed since, then data is still what it may be called. To find the
        // end of a long run the host goes through all of it, which is not for every piece of it.
        let (start, end) = self.data.get();
        if (start..end).contains(&offset) {
            let len = len.min(end - offset);
            return Ok(Extent { data: true, len });
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            // No data follows.
            Err(Errno::NXIO) => return Ok(Extent { data: false, len }),
            // A file system that does not tell.
            Err(Errno::INVAL) => return Ok(Extent { data: true, len }),
            Err(errno) => return Err(errno.into()),
        };
        if start > offset {
            let len = len.min(start - offset);
            return Ok(Extent { data: false, len });
        }
        let end = match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
            Ok(end) => end,
            // Cut off in this moment.
            Err(Errno::NXIO) => return Ok(Extent { data: false, len }),
            Err(errno) => return Err(errno.into()),
        };
        self.data.set((offset, end));
        let len = len.min(end.saturating_sub(offset).max(1));
        Ok(Extent { data: true, len })
    }

    /// Allocates every block of a file up to `size`, and makes it that long. What it holds is
    /// left alone, as is its length after an error. `progress` is told how far it is, in bytes.
    pub async fn allocate(&self, size: u64, progress: impl Fn(u64)) -> io::Result<()> {
        if self.kind == Kind::Device {
            return Ok(());
        }
        let old = self.size();
        self.check_space(size)?;
        let mut result = self.reserve(old, size, progress).await;
        if result.is_ok() && size > old {
            // Refused past RLIMIT_FSIZE, which space past the end is not.
            result = self.resize(size).await;
        }
        if result.is_err() && size > old {
            // What was allocated past the end is given back.
            let _ = self
                .ring
                .fallocate(&self.file, PUNCH, old, size - old)
                .await;
            let _ = rustix::fs::ftruncate(&self.file, old);
        }
        result
    }

    /// Refuses at once a file of `size` bytes, all allocated, that cannot fit: before the host's last block is taken for it.
    pub(crate) fn check_space(&self, size: u64) -> io::Result<()> {
        let stat = rustix::fs::fstat(&self.file)?;
        let has = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        let host = rustix::fs::fstatvfs(&self.file)?;
        let free = host.f_bfree.saturating_mul(host.f_frsize);
        // Some file systems do not know how large they are.
        match host.f_blocks > 0 && size.saturating_sub(has) > free {
            true => Err(Errno::NOSPC.into()),
            false => Ok(()),
        }
    }

    async fn reserve(&self, old: u64, size: u64, progress: impl Fn(u64)) -> io::Result<()> {
        let mut done = 0;
        while done < size {
            self.ring.check_wanted()?;
            let len = STEP.min(size - done);
            let mode = libc::FALLOC_FL_KEEP_SIZE;
            match self.ring.fallocate(&self.file, mode, done, len).await {
                Err(error) if unsupported(&error) => {
                    return self.fill_holes(old, size, progress).await;
                }
                result => result?,
            }
            done += len;
            progress(done);
        }
        Ok(())
    }

    /// Writes zeroes wherever the file has nothing.
    async fn fill_holes(&self, old: u64, size: u64, progress: impl Fn(u64)) -> io::Result<()> {
        let mut at = 0;
        while at < size {
            let (start, end) = match at < old {
                true => hole(&self.file, at, old)?,
                // The rest of a sector that the file ends in reads as zeroes already.
                false => (at.next_multiple_of(self.alignment().into()).min(size), size),
            };
            at = start;
            while at < end {
                self.ring.check_wanted()?;
                let len = (end - at).min(ZEROES_AT_ONCE as u64);
                self.write_out(at, len).await?;
                at += len;
                progress(at);
            }
            progress(at);
        }
        Ok(())
    }
}

/// The first hole of a file at or after `from`, and where it ends; an empty one at `size` if
/// there is none.
fn hole(file: impl AsFd, from: u64, size: u64) -> io::Result<(u64, u64)> {
    let start = match rustix::fs::seek(&file, SeekFrom::Hole(from)) {
        Ok(start) => start.min(size),
        // Past the end of the file.
        Err(Errno::NXIO) => size,
        Err(errno) => return Err(errno.into()),
    };
    let end = match rustix::fs::seek(&file, SeekFrom::Data(start)) {
        Ok(end) => end.min(size),
        Err(Errno::NXIO) => size,
        Err(errno) => return Err(errno.into()),
    };
    Ok((start, end))
}

/// A limit of a block device, as sysfs tells it; a partition has those of its disk.
fn queue_limit(device: impl AsFd, name: &str) -> Option<u32> {
    let number = rustix::fs::fstat(device).ok()?.st_rdev;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    ["queue", "../queue"].into_iter().find_map(|queue| {
        let path = format!("/sys/dev/block/{major}:{minor}/{queue}/{name}");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    })
}
