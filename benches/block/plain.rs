//! What the device is measured against: the same transfers by a plain io_uring loop on the same
//! file, in the same memory.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use io_uring::{IoUring, opcode, squeue, types::Fd};
use launcher::devices::GuestMemory;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::Result;
use crate::driver::BUFFERS;
use crate::workload::Workload;

/// One ring, one thread, and as much in flight as all virtqueues have.
pub(crate) struct Plain<'a> {
    ring: IoUring,
    file: File,
    work: &'a Workload,
    buffers: *mut u8,
    in_flight: usize,
}

impl<'a> Plain<'a> {
    pub(crate) fn new(
        path: &Path,
        direct: bool,
        memory: &'a GuestMemory,
        work: &'a Workload,
    ) -> Result<Self> {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(flags);
        Ok(Plain {
            ring: IoUring::new((work.depth * work.queues) as u32)?,
            file: options.open(path)?,
            work,
            buffers: memory.get_host_address(GuestAddress(BUFFERS as u64))?,
            in_flight: 0,
        })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    fn transfer(&self, slot: u64, offset: u64) -> squeue::Entry {
        let (fd, len) = (Fd(self.file.as_raw_fd()), self.work.len as u32);
        let data = self.buffers.wrapping_add(self.work.len * slot as usize);
        let entry = match self.work.write {
            true => opcode::Write::new(fd, data, len).offset(offset).build(),
            false => opcode::Read::new(fd, data, len).offset(offset).build(),
        };
        entry.user_data(slot)
    }

    fn push(&mut self, slot: u64, offset: u64) -> Result<()> {
        let entry = self.transfer(slot, offset);
        // SAFETY: slots are distinct pieces of guest memory, which outlives `self`, and no slot
        // is used again before its completion: `drop` waits for what is in flight.
        unsafe { self.ring.submission().push(&entry)? };
        self.in_flight += 1;
        Ok(())
    }

    /// Carries out a transfer for each of the offsets.
    pub(crate) fn run(&mut self, mut offsets: impl Iterator<Item = u64>) -> Result<()> {
        for (slot, offset) in (0..(self.work.depth * self.work.queues) as u64).zip(&mut offsets) {
            self.push(slot, offset)?;
        }
        let mut done = Vec::new();
        while self.in_flight > 0 {
            self.ring.submit_and_wait(1)?;
            done.extend(self.ring.completion());
            for entry in done.drain(..) {
                self.in_flight -= 1;
                if entry.result() != self.work.len as i32 {
                    return Err(format!("a transfer ended with {}", entry.result()).into());
                }
                if let Some(offset) = offsets.next() {
                    self.push(entry.user_data(), offset)?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Plain<'_> {
    fn drop(&mut self) {
        while self.in_flight > 0 && self.ring.submit_and_wait(1).is_ok() {
            self.in_flight -= self.ring.completion().count();
        }
    }
}
