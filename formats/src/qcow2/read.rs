//! Reading: cached L2 entries lead straight to the file.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use super::compressed::Decoder;
use super::join::Join;
use super::map::{Extent, Place};
use super::{Damage, Qcow2};
use crate::{Buffer, HostFile, Pending, Segments};

/// Clusters that have been decompressed lately.
pub(super) struct Decoded {
    decoder: RefCell<Decoder>,
    /// The latest comes last.
    clusters: Vec<(u64, Rc<Segments>)>,
}

/// Decompressed clusters are kept as long as they have no more bytes in all; one is always kept.
const DECODED: usize = 256 << 10;

impl Decoded {
    pub(super) fn new(decoder: Decoder) -> Self {
        Decoded {
            decoder: RefCell::new(decoder),
            clusters: Vec::new(),
        }
    }

    pub(super) fn clear(&mut self) {
        self.clusters.clear();
    }

    fn find(&self, offset: u64) -> Option<Rc<Segments>> {
        let found = self.clusters.iter().find(|(at, _)| *at == offset);
        found.map(|(_, cluster)| Rc::clone(cluster))
    }

    fn keep(&mut self, offset: u64, cluster: &Rc<Segments>) {
        while self.clusters.len() * cluster.len() >= DECODED.max(cluster.len()) {
            self.clusters.remove(0);
        }
        self.clusters.push((offset, Rc::clone(cluster)));
    }
}

impl Qcow2 {
    /// The file that data clusters lie in.
    pub(super) fn data_file(&self) -> &HostFile {
        self.data.as_ref().unwrap_or(&self.file)
    }

    /// Fills `to`: at once if all is known to lie in one place of the file.
    pub(super) fn read_at(&self, offset: u64, to: Segments) -> Pending<'_> {
        let len = to.len() as u64;
        let file = self.data_file();
        if let Ok(Some(extent)) = self.extent(offset, len)
            && extent.len == len
            && let Place::Data { host, .. } = extent.place
            && host + len <= file.size()
        {
            let in_flight = self.epochs.enter();
            let read = file.read(host, to);
            return Box::pin(async move {
                let _in_flight = in_flight;
                read.await
            });
        }
        Box::pin(self.read_extents(offset, to))
    }

    /// Fills `to`, from wherever it is, all places at once.
    pub(super) async fn read_extents(&self, mut offset: u64, mut to: Segments) -> io::Result<()> {
        let _in_flight = self.epochs.enter();
        let mut reads = Join::default();
        while !to.is_empty() {
            let extent = self.extent_of(offset, to.len() as u64).await?;
            let part = to.split_to(extent.len as usize);
            match extent.place {
                Place::Data { host, .. } => {
                    // The last cluster of a file may be cut short.
                    let read = self.data_file().read_zero_filled(host, part);
                    reads.add(Box::pin(read));
                }
                Place::Zero => part.fill(0),
                Place::Backing => self.add_backing(&mut reads, offset, part),
                Place::Compressed { offset: at, len } => {
                    reads.add(Box::pin(self.read_compressed(offset, at, len, part)));
                }
            }
            offset += extent.len;
        }
        reads.await
    }

    /// Reads from the backing file; past its end are zeroes.
    fn add_backing<'a>(&'a self, reads: &mut Join<'a>, offset: u64, mut to: Segments) {
        if let Some(backing) = &self.backing {
            let there = backing.size().saturating_sub(offset);
            let part = to.split_to(there.min(to.len() as u64) as usize);
            if !part.is_empty() {
                reads.add(backing.read(offset, part));
            }
        }
        to.fill(0);
    }

    /// Whether bytes of the disk that are nowhere in the image are known to be zeroes.
    pub(super) fn is_past_backing(&self, offset: u64) -> bool {
        self.backing.as_ref().is_none_or(|it| it.size() <= offset)
    }

    /// Whether all bytes of a range are known to be zeroes.
    pub(super) async fn is_zero(&self, mut offset: u64, mut len: u64) -> io::Result<bool> {
        while len > 0 {
            let Extent { place, len: run } = self.extent_of(offset, len).await?;
            match place {
                Place::Zero => {}
                Place::Backing if self.is_past_backing(offset) => {}
                _ => return Ok(false),
            }
            offset += run;
            len -= run;
        }
        Ok(true)
    }

    /// Reads from the cluster that is compressed at `at`, in at most `len` bytes.
    async fn read_compressed(
        &self,
        offset: u64,
        at: u64,
        len: u64,
        to: Segments,
    ) -> io::Result<()> {
        let within = self.geometry.in_cluster(offset) as usize;
        let found = self.decoded.borrow().find(at);
        let cluster = match found {
            Some(cluster) => cluster,
            None => self.decompress(offset, at, len).await?,
        };
        to.copy_segments(&cluster.slice(within, to.len()));
        Ok(())
    }

    async fn decompress(&self, offset: u64, at: u64, len: u64) -> io::Result<Rc<Segments>> {
        // O_DIRECT takes whole units only.
        let unit = u64::from(self.file.alignment());
        let start = at / unit * unit;
        let end = (at + len).next_multiple_of(unit);
        let raw = Segments::from_buffer(Buffer::zeroed((end - start) as usize, 4096)?);
        self.file.read_zero_filled(start, raw.clone()).await?;
        let raw = owned(raw)?;
        let mut cluster = Buffer::zeroed(self.geometry.cluster_size() as usize, 4096)?;
        let from = raw.get((at - start) as usize..).unwrap_or_default();
        let from = from.get(..len as usize).unwrap_or(from);
        let decoded = {
            let decoded = self.decoded.borrow();
            let mut decoder = decoded.decoder.borrow_mut();
            decoder.decompress(from, &mut cluster)
        };
        if let Err(error) = decoded {
            let offset = self.geometry.cluster_start(offset);
            let damage = format!("the compressed data for offset {offset:#x}: {error}");
            return Err(self.condemn(Damage(damage)).await);
        }
        let cluster = Rc::new(Segments::from_buffer(cluster));
        self.decoded.borrow_mut().keep(at, &cluster);
        Ok(cluster)
    }
}

/// The buffer of a read that is over.
pub(super) fn owned(memory: Segments) -> io::Result<Buffer> {
    let bytes = memory.into_buffer();
    bytes.ok_or_else(|| io::Error::other("the memory of a read that is over is in use"))
}
