//! The crate's I/O, carried out by our ring.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::rc::Rc;

use formats::qcow2::Header;
use formats::{Buffer, HostFile, Segments};
use qcow2_rs::error::Qcow2Result;
use qcow2_rs::ops::{Qcow2IoOps, Qcow2OpsFlags};

use crate::bounce::Bounce;
use crate::health::{Health, Lost};

/// The file of one image of a chain, as the crate sees it. Clones share it.
#[derive(Clone)]
pub(crate) struct Io(Rc<Host>);

/// Where the metadata lies that the crate changes in its own way.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// In bytes.
    pub(crate) cluster_size: u64,
    /// Of the refcount table, in bytes.
    pub(crate) refcount_table: Range<u64>,
    /// Whether the crate writes refcount blocks whole, not in parts. L2 tables it always does.
    pub(crate) whole: bool,
}

struct Host {
    /// Gone once the image is given up.
    file: RefCell<Option<Rc<HostFile>>>,
    writable: bool,
    places: Places,
    bounce: Rc<Bounce>,
    health: Rc<Health>,
    /// No write that has begun ends later, nor does the file.
    end: Cell<u64>,
    /// Memory for metadata, as long as a cluster.
    spare: Cell<Option<Segments>>,
}

impl Io {
    pub(crate) fn new(
        file: HostFile,
        writable: bool,
        places: Places,
        bounce: &Rc<Bounce>,
        health: &Rc<Health>,
    ) -> Io {
        Io(Rc::new(Host {
            end: Cell::new(file.size()),
            file: RefCell::new(Some(Rc::new(file))),
            writable,
            places,
            bounce: Rc::clone(bounce),
            health: Rc::clone(health),
            spare: Cell::new(None),
        }))
    }

    /// Closes the file, whoever still has this: from now on there are only errors.
    pub(crate) fn close(&self) {
        self.0.file.borrow_mut().take();
    }

    /// Makes everything that was written durable.
    pub(crate) async fn sync(&self) -> io::Result<()> {
        self.0.sync().await
    }
}

impl Host {
    fn file(&self) -> io::Result<Rc<HostFile>> {
        let file = self.file.borrow();
        file.clone().ok_or(io::ErrorKind::NotConnected.into())
    }

    /// For writing metadata, and for what comes before a write of data.
    fn writable(&self) -> io::Result<Rc<HostFile>> {
        self.health.may_write()?;
        match self.writable {
            true => self.file(),
            false => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    /// Memory for metadata: all of it, to be given back, and the first `len` bytes.
    fn memory(&self, len: usize) -> io::Result<(Segments, Segments)> {
        let spare = self.spare.take().filter(|spare| spare.len() >= len);
        let whole = match spare {
            Some(spare) => spare,
            None => {
                let len = len.max(self.places.cluster_size as usize);
                Segments::from_buffer(Buffer::zeroed(len, 4096)?)
            }
        };
        let part = whole.slice(0, len);
        Ok((whole, part))
    }

    /// Takes notice that something is about to be written.
    fn reaches(&self, end: u64) {
        self.end.set(self.end.get().max(end));
    }

    async fn sync(&self) -> io::Result<()> {
        let file = self.writable()?;
        let stake = self.health.stake(Lost::Writes);
        stake.settle(file.flush().await)
    }

    /// Reads; what lies past the end of the file is zeroes.
    async fn fill(&self, file: &HostFile, offset: u64, to: Segments) -> io::Result<()> {
        match self.writable {
            // It grows by what is written, which `HostFile` does not know. At its end there is
            // always a whole cluster.
            true => {
                let ring = file.ring();
                ring.read_zero_filled_at(file.file(), offset, to).await
            }
            false => file.read_zero_filled(offset, to).await,
        }
    }

    /// Reads metadata, or what is copied to a cluster of the image's own.
    async fn read_metadata(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let file = self.file()?;
        let (whole, part) = self.memory(bytes.len())?;
        let stake = self.health.stake(Lost::All);
        stake.settle(self.fill(&file, offset, part.clone()).await)?;
        part.copy_to(bytes);
        self.spare.set(Some(whole));
        Ok(())
    }

    /// Writes metadata, or a cluster that was copied.
    async fn write_metadata(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let file = self.writable()?;
        let stake = self.health.stake(Lost::Writes);
        let places = &self.places;
        if offset < places.cluster_size {
            // The crate writes a header of its own making. No image that is let in needs that.
            return stake.settle(Err(io::ErrorKind::InvalidInput.into()));
        }
        let (whole, part) = self.memory(bytes.len())?;
        part.copy_from(bytes);
        let end = offset + bytes.len() as u64;
        self.reaches(end);
        let mut result = file.write(offset, part).await;
        self.spare.set(Some(whole));
        let table = &places.refcount_table;
        if result.is_ok() && offset < table.end && end > table.start {
            // The crate goes on to L2 tables whose clusters only a new refcount block counts.
            result = file.flush().await;
        }
        stake.settle(result)
    }

    /// Makes a cluster of its own read as zeroes, which was in nobody's use.
    async fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        let file = self.writable()?;
        let stake = self.health.stake(Lost::Writes);
        if offset < self.end.get() || file.is_device() {
            return stake.settle(file.write_zeroes(offset, len, true).await);
        }
        // Where the file does not reach yet it has nothing but zeroes. It is made to reach so far
        // by a write, for that cannot cut off what another has written behind it meanwhile.
        let last = u64::from(file.alignment().max(512)).min(len);
        self.reaches(offset + len);
        let (whole, part) = self.memory(last as usize)?;
        part.fill(0);
        let result = file.write(offset + len - last, part).await;
        self.spare.set(Some(whole));
        stake.settle(result)
    }
}

impl Places {
    /// `slice_bits` is log2 of the bytes of a refcount block that the crate writes together.
    pub(crate) fn of(header: &Header, slice_bits: u8) -> Places {
        let table = header.refcount_table_offset;
        let len = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        Places {
            cluster_size: header.cluster_size(),
            refcount_table: table..table + len,
            whole: u32::from(slice_bits) == header.cluster_bits,
        }
    }
}

impl Qcow2IoOps for Io {
    async fn read_to(&self, offset: u64, buf: &mut [u8]) -> Qcow2Result<usize> {
        let host = &*self.0;
        host.health.may_read()?;
        let len = buf.len();
        match host.bounce.segments(buf.as_mut_ptr(), len) {
            Some(to) => host.fill(&*host.file()?, offset, to).await?,
            None => host.read_metadata(offset, buf).await?,
        }
        Ok(len)
    }

    async fn write_from(&self, offset: u64, buf: &[u8]) -> Qcow2Result<()> {
        let host = &*self.0;
        match host.bounce.segments(buf.as_ptr().cast_mut(), buf.len()) {
            Some(from) => {
                let file = host.writable()?;
                host.reaches(offset + buf.len() as u64);
                file.write(offset, from).await?;
            }
            None => host.write_metadata(offset, buf).await?,
        }
        Ok(())
    }

    /// Makes a cluster read as zeroes: an answer of an error makes the crate write them, and of
    /// that it does not look whether it fails.
    async fn fallocate(&self, offset: u64, len: usize, flags: u32) -> Qcow2Result<()> {
        let host = &*self.0;
        let metadata = flags & Qcow2OpsFlags::FALLOCATE_ZERO_RAGE != 0;
        if metadata && host.places.whole {
            // What follows is a write of all of it.
            return Ok(host.writable().map(drop)?);
        }
        Ok(host.clear(offset, len as u64).await?)
    }

    async fn fsync(&self, _offset: u64, _len: usize, _flags: u32) -> Qcow2Result<()> {
        Ok(self.0.sync().await?)
    }
}
