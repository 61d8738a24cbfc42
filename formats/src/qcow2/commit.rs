//! Making changes durable, in an order that leaves a valid image on the host at every instant.
//!
//! 1. the guest's data, and refcounts of what is newly in use;
//! 2. the refcount table, when there are new blocks of refcounts;
//! 3. L2 tables, which refer to what was written in step 1;
//! 4. the L1 table, when there are new L2 tables;
//! 5. only then refcounts of what is no longer in use: at the next commit.
//!
//! Each step that something depends on ends with a barrier: fdatasync(2). If the power fails
//! between two steps, some clusters are leaked, and that is all.

use std::io;
use std::rc::Rc;

use super::Qcow2;
use super::alloc::Run;
use super::entry::OFFSET_MASK;
use super::header::{Header, incompatible};
use super::join::Join;
use super::slices::Dirty;
use super::table::Changes;
use crate::{Buffer, Segments};

/// Something in the image that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Damage(pub(super) String);

/// What one commit makes durable: everything that had happened when it began.
struct Pending {
    refcount_table: Changes,
    slices: Vec<Dirty>,
    /// Where the slices are written.
    placed: Vec<(u64, Rc<Buffer>)>,
    l1: Changes,
    unlinked: Vec<Run>,
    epoch: u64,
}

impl Qcow2 {
    /// Makes everything that has happened until now durable. Calls that come while a commit is
    /// under way share the next one.
    pub(super) async fn commit(&self) -> io::Result<()> {
        let wanted = self.commits_begun.get() + 1;
        let held = self.committing.only().await;
        if self.committed.get() >= wanted {
            return Ok(());
        }
        let number = self.commits_begun.get() + 1;
        self.commits_begun.set(number);
        if self.is_clean() {
            self.barrier().await?;
        } else {
            let pending = self.begin_commit()?;
            let result = self.write_out(&pending).await;
            self.end_commit(pending, result.is_ok());
            result?;
        }
        self.committed.set(number);
        // Whoever waits for the next commit does not wait for the host to free space.
        drop(held);
        self.retire().await;
        Ok(())
    }

    /// Leaves a durable image in which nothing is leaked.
    pub(super) async fn finish(&self) -> io::Result<()> {
        self.commit().await?;
        if self.condemned.get() {
            return Ok(());
        }
        self.release_reserved().await?;
        self.commit().await?;
        self.try_retire().await?;
        let end = self.alloc.borrow_mut().trim() << self.geometry.cluster_bits;
        match end < self.file.size() && !self.file.is_device() {
            true => self.file.resize(end).await,
            false => Ok(()),
        }
    }

    /// Whether nothing but the guest's data has changed.
    fn is_clean(&self) -> bool {
        !self.l2.borrow().is_dirty()
            && !self.refcounts.borrow().is_dirty()
            && !self.l1.borrow().is_dirty()
            && !self.refcount_table.borrow().is_dirty()
            && !self.alloc.borrow().has_unlinked()
    }

    /// Whether tables that say where the guest's data lies are in memory only. Until a commit has
    /// come to its end, those that it writes are.
    pub(super) fn is_volatile(&self) -> bool {
        self.writing_tables.get() || self.l2.borrow().is_dirty() || self.l1.borrow().is_dirty()
    }

    fn begin_commit(&self) -> io::Result<Pending> {
        let refcount_table = self.refcount_table.borrow_mut().take_changes()?;
        let mut l1 = self.l1.borrow_mut();
        let changes = match l1.take_changes() {
            Ok(changes) => changes,
            Err(error) => {
                self.refcount_table.borrow_mut().restore(&refcount_table);
                return Err(error);
            }
        };
        let slices = self.l2.borrow_mut().take_dirty();
        self.writing_tables
            .set(!slices.is_empty() || !changes.is_empty());
        let place = |dirty: &Dirty| {
            let table = l1.at(self.l1_index_of_slice(dirty.number)) & OFFSET_MASK;
            let offset = table + self.offset_in_l2_table(dirty.number);
            (table != 0).then(|| (offset, Rc::clone(&dirty.bytes)))
        };
        Ok(Pending {
            refcount_table,
            placed: slices.iter().filter_map(place).collect(),
            slices,
            l1: changes,
            unlinked: self.alloc.borrow_mut().take_unlinked(),
            epoch: self.epochs.advance(),
        })
    }

    async fn write_out(&self, pending: &Pending) -> io::Result<()> {
        self.write_refcounts().await?;
        self.barrier().await?;
        self.write_table(&pending.refcount_table, |header, (offset, entries)| {
            header.refcount_table_offset = offset;
            header.refcount_table_clusters = ((entries * 8) >> header.cluster_bits) as u32;
        })
        .await?;
        if !pending.placed.is_empty() {
            self.write_metadata(pending.placed.clone()).await?;
            self.file.flush().await?;
        }
        self.write_table(&pending.l1, |header, (offset, entries)| {
            header.l1_table_offset = offset;
            header.l1_size = entries as u32;
        })
        .await
    }

    fn end_commit(&self, pending: Pending, done: bool) {
        // What could not be written is dirty again.
        self.writing_tables.set(false);
        let numbers = pending.slices.iter().map(|dirty| dirty.number);
        self.l2.borrow_mut().settle(numbers, done);
        if done {
            let mut alloc = self.alloc.borrow_mut();
            return alloc.rest(pending.epoch, pending.unlinked);
        }
        self.refcount_table
            .borrow_mut()
            .restore(&pending.refcount_table);
        self.l1.borrow_mut().restore(&pending.l1);
        self.alloc.borrow_mut().restore_unlinked(pending.unlinked);
    }

    /// Writes what has changed of a table of the first level, durably.
    async fn write_table(
        &self,
        changes: &Changes,
        tell: impl FnOnce(&mut Header, (u64, usize)),
    ) -> io::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        self.write_metadata(changes.units.clone()).await?;
        self.file.flush().await?;
        match changes.moved {
            Some(place) => self.change_header(|header| tell(header, place)).await,
            None => Ok(()),
        }
    }

    /// All that was written until now is on the disk before anything that is written from now on.
    async fn barrier(&self) -> io::Result<()> {
        let Some(data) = &self.data else {
            return self.file.flush().await;
        };
        let mut both = Join::default();
        both.add(Box::pin(self.file.flush()));
        both.add(Box::pin(data.flush()));
        both.await
    }

    /// Changes the header, durably: all that can change lies in its first sector, which is
    /// written as a whole or not at all.
    pub(super) async fn change_header(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let _held = self.changing_header.only().await;
        let (mut header, bytes) = {
            let head = self.head.borrow();
            (head.header.clone(), head.bytes.clone())
        };
        change(&mut header);
        let mut unit = Buffer::zeroed(bytes.len(), 4096)?;
        unit.copy_from_slice(&bytes);
        header.patch(&mut unit);
        let bytes = unit.to_vec();
        self.file.write(0, Segments::from_buffer(unit)).await?;
        self.file.flush().await?;
        *self.head.borrow_mut() = super::Head { header, bytes };
        Ok(())
    }

    /// Damage was met: it is marked in the header, and the request fails with the error that this
    /// returns. From now on every request that would change the disk is refused, and no cluster is
    /// freed: what says that it is unused may be what is damaged. What was changed before is still
    /// committed, for the guest may have been told that it is there.
    pub(super) async fn condemn(&self, damage: Damage) -> io::Error {
        let path = self.file.path().display();
        if !self.condemned.replace(true) {
            tracing::error!(
                "`{path}` is damaged: {}; it is only read from now on",
                damage.0
            );
            let mark = |header: &mut Header| header.incompatible_features |= incompatible::CORRUPT;
            if !self.ro
                && let Err(error) = self.change_header(mark).await
            {
                tracing::error!("`{path}` could not be marked as damaged: {error}");
            }
        }
        io::Error::new(io::ErrorKind::InvalidData, damage.0)
    }

    /// Whether the image may be changed; else the error for a request that would.
    pub(super) fn writable(&self) -> io::Result<()> {
        match self.ro || self.condemned.get() {
            true => Err(rustix::io::Errno::ROFS.into()),
            false => Ok(()),
        }
    }
}
