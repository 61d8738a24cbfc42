//! Changing the size of the disk.

use std::io;
use std::time::Instant;

use rustix::io::Errno;

use super::Qcow2;
use super::blank::Blank;
use super::header::MAX_L1_BYTES;
use crate::{HostFile, Progress};

impl Qcow2 {
    /// Changes the size of the disk: all or nothing. New space reads as zeroes, whatever the
    /// backing file has there.
    pub(super) async fn resize_to(&self, size: u64) -> io::Result<()> {
        self.writable()?;
        if !size.is_multiple_of(self.block_size.into()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let _held = self.resizing.only().await;
        match size.cmp(&self.size.get()) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Less => self.shrink(size).await,
            std::cmp::Ordering::Greater => self.extend(size).await,
        }
    }

    async fn shrink(&self, size: u64) -> io::Result<()> {
        self.commit().await?;
        self.set_size(size).await?;
        let bits = self.geometry.cluster_bits;
        let old_end = self.l1.borrow().len() << self.geometry.l2_bits();
        let cut_off = size.div_ceil(1 << bits)..old_end;
        // The disk has its new size: what is left now takes space, and does no harm.
        let mut result = match self.blank(cut_off, Blank::Drop).await {
            Ok(()) => self.commit().await,
            failed => failed,
        };
        if let Some(data) = self.data.as_ref().filter(|data| !data.is_device()) {
            let end = size.next_multiple_of(data.alignment().into());
            result = result.and(data.resize(end).await);
        }
        if let Err(error) = result {
            let path = self.file.path().display();
            tracing::warn!("what was cut off of `{path}` could not be freed: {error}");
        }
        Ok(())
    }

    async fn extend(&self, size: u64) -> io::Result<()> {
        if !self.sparse {
            // Before anything moves.
            let file = self.data_file();
            file.check_space(file.size().saturating_add(size - self.size.get()))?;
        }
        self.extend_l1(size).await?;
        self.blank_new_space(size).await?;
        if !self.sparse
            && let Err(error) = self.allocate_new_space(size).await
        {
            self.give_back_new_space(size).await;
            return Err(error);
        }
        if let Some(data) = &self.data {
            self.blank_data_file(data, size).await?;
        }
        self.commit().await?;
        self.set_size(size).await
    }

    /// Allocates the space up to `size`, and reports how far that is.
    async fn allocate_new_space(&self, size: u64) -> io::Result<()> {
        let (file, start) = (self.data_file(), Instant::now());
        let progress = |done, total| {
            file.ring().report(&Progress {
                path: self.file.path(),
                done,
                total,
                elapsed: start.elapsed(),
            });
        };
        self.allocate_range(self.size.get()..size, progress).await
    }

    /// Frees what was allocated past the end of the disk before the host refused more.
    async fn give_back_new_space(&self, size: u64) {
        let bits = self.geometry.cluster_bits;
        let clusters = self.size.get().div_ceil(1 << bits)..size.div_ceil(1 << bits);
        self.giving_back.set(true);
        let freed = match self.blank(clusters, Blank::Drop).await {
            Ok(()) => self.commit().await,
            failed => failed,
        };
        self.giving_back.set(false);
        if let Err(error) = freed {
            let path = self.file.path().display();
            tracing::warn!("what `{path}` was to grow by could not be freed: {error}");
        }
    }

    /// Makes a data file show zeroes up to `size` too: it may be one that is read as it is.
    async fn blank_data_file(&self, data: &HostFile, size: u64) -> io::Result<()> {
        let old = self.size.get().next_multiple_of(data.alignment().into());
        let end = size.next_multiple_of(data.alignment().into());
        let stale = end.min(data.size());
        if stale > old {
            data.write_zeroes(old, stale - old, self.sparse).await?;
        }
        match data.size() < end && !data.is_device() {
            true => data.resize(end).await,
            false => Ok(()),
        }
    }

    async fn set_size(&self, size: u64) -> io::Result<()> {
        self.change_header(|header| header.size = size).await?;
        self.size.set(size);
        Ok(())
    }

    /// Makes the L1 table large enough, in another place if need be.
    async fn extend_l1(&self, size: u64) -> io::Result<()> {
        let covered = self.geometry.cluster_bits + self.geometry.l2_bits();
        let entries = size.div_ceil(1 << covered);
        let (old_offset, old_len) = self.l1.borrow().place();
        if entries * 8 <= old_len {
            return Ok(());
        }
        if entries * 8 > MAX_L1_BYTES {
            return Err(Errno::FBIG.into());
        }
        let bits = self.geometry.cluster_bits;
        let clusters = (entries * 8).div_ceil(1 << bits);
        let allocating = self.allocating.only().await;
        let new = self.allocate_table(clusters).await?;
        drop(allocating);
        self.places
            .borrow_mut()
            .add(new.start..new.start + new.count);
        self.l1.borrow_mut().relocate(new.start << bits, entries);
        self.unlink_table(old_offset, old_len);
        self.commit().await
    }

    /// Makes the space up to `size` read as zeroes: what stale L2 entries map there, the rest of
    /// the last cluster, and what a longer backing file has.
    async fn blank_new_space(&self, size: u64) -> io::Result<()> {
        let bits = self.geometry.cluster_bits;
        let old = self.size.get();
        let first = old.div_ceil(1 << bits);
        let end = size.div_ceil(1 << bits);
        self.blank(first..end, Blank::Drop).await?;
        let last_end = (first << bits).min(size.next_multiple_of(1 << bits));
        self.zero_data(old..last_end, false).await?;
        let backed = self.backing.as_ref().map_or(0, |backing| backing.size());
        let hidden_end = backed.div_ceil(1 << bits).min(end);
        if hidden_end > first {
            self.zero_clusters(first..hidden_end, false).await?;
        }
        Ok(())
    }
}
