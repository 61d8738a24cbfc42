//! The operations themselves, each of which notes what it did and compares what it finds.

use std::ops::Range;
use std::rc::Rc;

use super::super::content::{SECTOR, Value};
use super::closed::Closed;
use super::{Traffic, What, close, open};
use crate::{Buffer, Disk, Segments};

/// How sectors are changed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    Write,
    Zeroes { unmap: bool },
    Discard,
}

impl Traffic<'_> {
    /// Memory in pieces of odd sizes at odd addresses, as a guest may choose to have it.
    fn memory(&mut self, len: usize) -> Result<Segments, String> {
        let skip = self.random.of(&[0, 0, 0, 1, 4, 512]);
        let buffer = Buffer::zeroed(len + skip, 4096).map_err(|error| error.to_string())?;
        let mut rest = Segments::from_buffer(buffer).slice(skip, len);
        let piece = self.random.of(&[7, 512, 4096, 1 << 20, 1 << 20]);
        if rest.len() / piece > 2000 {
            return Ok(rest);
        }
        let keep = rest.keep();
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let piece = rest.split_to(piece);
            pieces.push((piece.iovecs()[0].iov_base.cast(), piece.len()));
        }
        // SAFETY: the pieces are those of the buffer, which is kept.
        Ok(unsafe { Segments::new(pieces, keep) })
    }

    pub(super) fn read(&mut self, sectors: Range<u64>) {
        let len = ((sectors.end - sectors.start) * SECTOR) as usize;
        let memory = match self.memory(len) {
            Ok(memory) => memory,
            Err(error) => return self.shared.fail(error),
        };
        memory.fill(0xee);
        let id = self.fly(&sectors, false);
        let before: Vec<_> = {
            let model = self.shared.model.borrow();
            sectors
                .clone()
                .map(|sector| model.allowed(sector))
                .collect()
        };
        let (disk, shared) = (Rc::clone(&self.disk), Rc::clone(&self.shared));
        self.subject.ring.spawn(async move {
            let result = disk.read(sectors.start * SECTOR, memory.clone()).await;
            drop(disk);
            let Some(flight) = shared.land(id) else {
                return;
            };
            match result {
                Err(error) => shared.fail(format!("read of sectors {sectors:?}: {error}")),
                Ok(()) => {
                    let mut found = vec![0; len];
                    memory.copy_to(&mut found);
                    shared.compare(&flight, Some(&before), &found);
                }
            }
        });
    }

    pub(super) fn change(&mut self, sectors: Range<u64>, value: Value, way: Way) {
        let (offset, len) = (
            sectors.start * SECTOR,
            (sectors.end - sectors.start) * SECTOR,
        );
        let memory = match way {
            Way::Write => match self.memory(len as usize) {
                Ok(memory) => Some(memory),
                Err(error) => return self.shared.fail(error),
            },
            _ => None,
        };
        if let Some(memory) = &memory {
            let mut bytes = vec![0; len as usize];
            for (sector, to) in sectors.clone().zip(bytes.chunks_mut(SECTOR as usize)) {
                value.fill(sector, to);
            }
            memory.copy_from(&bytes);
        }
        let decides = !matches!(way, Way::Discard);
        let (act, began) = self.shared.act(What::Change {
            sectors: sectors.clone(),
            value,
            decides,
        });
        self.shared.begin_change(&sectors, value);
        let id = self.fly(&sectors, true);
        let (disk, shared) = (Rc::clone(&self.disk), Rc::clone(&self.shared));
        self.subject.ring.spawn(async move {
            let result = match (way, memory) {
                (Way::Write, Some(memory)) => disk.write(offset, memory).await,
                (Way::Zeroes { unmap }, _) => disk.write_zeroes(offset, len, unmap).await,
                _ => disk.discard(offset, len).await,
            };
            drop(disk);
            match result {
                Err(error) => shared.fail(format!("{way:?} of sectors {sectors:?}: {error}")),
                Ok(()) => {
                    let now = shared.acted(act);
                    let mut model = shared.model.borrow_mut();
                    model.end(sectors, value, began, now, decides);
                }
            }
            shared.land(id);
        });
    }

    pub(super) fn flush(&mut self) {
        let id = self.fly(&(0..0), false);
        let (act, _) = self.shared.act(What::Flush);
        let (disk, shared) = (Rc::clone(&self.disk), Rc::clone(&self.shared));
        self.subject.ring.spawn(async move {
            let result = disk.flush().await;
            drop(disk);
            match result {
                Err(error) => shared.fail(format!("flush: {error}")),
                Ok(()) => drop(shared.acted(act)),
            }
            shared.land(id);
        });
    }

    pub(super) async fn resize(&mut self) -> Result<(), String> {
        let from = self.shared.model.borrow().size();
        let to = match self.random.below(3) {
            // Within the last cluster, a few clusters, anywhere.
            0 => from + self.block * (1 + self.random.below(8)),
            1 => from + self.load.cluster * self.random.below(9),
            _ => self.random.below(self.load.largest / self.block + 1) * self.block,
        };
        let to = to.clamp(self.block, self.load.largest.max(from));
        let to = match self.load.shrinks {
            true => to / self.block * self.block,
            false => (to / self.block * self.block).max(from),
        };
        if to < from {
            // A guest has nothing in flight where its disk ends.
            self.below(1).await?;
        }
        let (act, _) = self.shared.act(What::Resize { from, to });
        self.disk
            .resize(to)
            .await
            .map_err(|error| format!("resize from {from} to {to}: {error}"))?;
        self.shared.acted(act);
        if self.disk.size() != to {
            return Err(format!("resized to {to}, it has {}", self.disk.size()));
        }
        self.shared.model.borrow_mut().resize(to);
        Ok(())
    }

    pub(super) async fn reopen(&mut self) -> Result<(), String> {
        self.below(1).await?;
        let size = self.disk.size();
        let (act, _) = self.shared.act(What::Flush);
        // Closed before it is opened again: it is locked.
        let nothing: Box<dyn Disk> = Box::new(Closed);
        close(std::mem::replace(&mut self.disk, Rc::new(nothing))).await?;
        self.shared.acted(act);
        let again = open(self.subject).await?;
        if again.size() != size {
            return Err(format!("reopened, it has {} of {size}", again.size()));
        }
        self.disk = Rc::new(again);
        Ok(())
    }

    /// Reads everything that was ever touched.
    pub(super) async fn sweep(&mut self) -> Result<(), String> {
        self.below(1).await?;
        let size = self.shared.model.borrow().size();
        for area in &self.load.areas {
            let mut start = area.start;
            while start < area.end.min(size) {
                let end = (start + (1 << 20)).min(area.end).min(size);
                self.read(start / SECTOR..end / SECTOR);
                self.below(4).await?;
                start = end;
            }
        }
        self.below(1).await
    }
}
