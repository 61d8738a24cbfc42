//! The crate's device as a disk: it is asked for no more than one cluster at a time, and never
//! for two things at once that it would confuse.

use std::cell::Cell;
use std::io;
use std::mem;
use std::ops::RangeInclusive;
use std::rc::Rc;

use formats::{Disk, Limits, Pending, Ring, Segments};
use futures_util::StreamExt;
use futures_util::stream;
use qcow2_rs::dev::Qcow2Dev;
use qcow2_rs::error::Qcow2Error;
use qcow2_rs::meta::MappingSource;

use crate::bounce::Bounce;
use crate::chain::Chain;
use crate::exclusion::Exclusion;
use crate::health::Health;
use crate::io::Io;

/// Clusters of one request that are under way together.
const TOGETHER: usize = 16;
/// The place in [`Qcow2Rs::tables`] that stands for all of them.
const TABLES: RangeInclusive<u64> = 0..=0;

/// An open image.
pub(crate) struct Qcow2Rs {
    /// Dropping it panics while there are tables that have not been written.
    dev: Rc<Qcow2Dev<Io>>,
    /// The image's own first.
    ios: Vec<Io>,
    ring: Ring,
    bounce: Rc<Bounce>,
    health: Rc<Health>,
    size: u64,
    cluster_bits: u32,
    /// What transfers must be multiples of, in bytes.
    block: u32,
    ro: bool,
    /// Clusters are copied before they are first written.
    copies: bool,
    /// By guest cluster: what changes how one is mapped has it for itself.
    clusters: Exclusion,
    /// Shared by what changes tables, held by what writes them out.
    tables: Exclusion,
    state: Cell<State>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// Flushed for the last time.
    Closed,
    /// Flushed for the last time, in vain.
    Lost,
}

/// What is written.
enum Source {
    Bytes(Segments),
    Zeroes,
}

/// A piece of a request: bytes of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    offset: u64,
    /// Where in the request it begins.
    at: usize,
    len: usize,
}

/// What a write has to do with a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    InPlace,
    /// It reads as zeroes already, and zeroes are to be written.
    Nothing,
    /// A cluster of the file is needed first.
    Allocates,
}

fn failed(error: Qcow2Error) -> io::Error {
    error.into_inner()
}

impl Qcow2Rs {
    pub(crate) fn new(ring: &Ring, chain: Chain, ro: bool) -> Self {
        Qcow2Rs {
            size: chain.header.size,
            cluster_bits: chain.header.cluster_bits,
            copies: chain.header.backing_file.is_some(),
            dev: Rc::new(chain.dev),
            ios: chain.ios,
            ring: ring.clone(),
            bounce: chain.bounce,
            health: chain.health,
            block: chain.block,
            ro,
            clusters: Exclusion::default(),
            tables: Exclusion::default(),
            state: Cell::new(State::Open),
        }
    }

    fn clusters(&self, offset: u64, len: u64) -> RangeInclusive<u64> {
        offset >> self.cluster_bits..=(offset + len.max(1) - 1) >> self.cluster_bits
    }

    /// A request, cut at the clusters' ends.
    fn parts(&self, offset: u64, len: u64) -> impl Iterator<Item = Part> + use<> {
        let (end, size) = (offset + len, 1 << self.cluster_bits);
        let mut next = offset;
        std::iter::from_fn(move || {
            let part = Part {
                offset: next,
                at: (next - offset) as usize,
                len: (size - next % size).min(end - next) as usize,
            };
            next += part.len as u64;
            (part.len > 0).then_some(part)
        })
    }

    /// Does all parts, some of them together, to their ends even if one fails: the crate is
    /// never stopped half-way. The error is the first.
    async fn each<F>(
        &self,
        mut parts: impl Iterator<Item = Part>,
        together: usize,
        work: impl Fn(Part) -> F,
    ) -> io::Result<()>
    where
        F: Future<Output = io::Result<()>>,
    {
        let (Some(first), second) = (parts.next(), parts.next()) else {
            return Ok(());
        };
        let Some(second) = second else {
            return work(first).await;
        };
        let error = Cell::new(None);
        stream::iter([first, second].into_iter().chain(parts))
            .for_each_concurrent(together, |part| {
                let (work, error) = (work(part), &error);
                async move {
                    if let Err(failed) = work.await {
                        error.set(error.take().or(Some(failed)));
                    }
                }
            })
            .await;
        error.take().map_or(Ok(()), Err)
    }

    async fn read_part(&self, part: Part, to: &Segments) -> io::Result<()> {
        let mut chunk = self.bounce.take().await;
        let bytes = chunk.bytes(part.len);
        let count = self.dev.read_at(bytes, part.offset).await.map_err(failed)?;
        if count != part.len {
            // So it says that one of the clusters that it reads together could not be read.
            return Err(io::Error::other("a backing file could not be read"));
        }
        to.slice(part.at, part.len).copy_from(bytes);
        Ok(())
    }

    async fn write_part(&self, part: Part, from: &Source) -> io::Result<()> {
        if matches!(from, Source::Zeroes) && self.kind(part, from).await? == Kind::Nothing {
            return Ok(());
        }
        let mut chunk = self.bounce.take().await;
        let bytes = chunk.bytes(part.len);
        match from {
            Source::Bytes(from) => {
                from.slice(part.at, part.len).copy_to(bytes);
            }
            Source::Zeroes => bytes.fill(0),
        }
        self.dev.write_at(bytes, part.offset).await.map_err(failed)
    }

    async fn kind(&self, part: Part, from: &Source) -> io::Result<Kind> {
        let mapping = self.dev.get_mapping(part.offset).await.map_err(failed)?;
        Ok(match (&mapping.source, from) {
            (MappingSource::DataFile, _) if mapping.copied => Kind::InPlace,
            (MappingSource::Zero | MappingSource::Unallocated, Source::Zeroes) => Kind::Nothing,
            _ => Kind::Allocates,
        })
    }

    async fn allocates(
        &self,
        parts: impl Iterator<Item = Part>,
        from: &Source,
    ) -> io::Result<bool> {
        for part in parts {
            if self.kind(part, from).await? == Kind::Allocates {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn store(&self, offset: u64, len: u64, from: Source) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let parts = || self.parts(offset, len);
        let write = |part| self.write_part(part, &from);
        let clusters = self.clusters(offset, len);
        let shared = self.clusters.share(clusters.clone()).await;
        self.health.may_write()?;
        if !self.allocates(parts(), &from).await? {
            return self.each(parts(), TOGETHER, write).await;
        }
        drop(shared);
        let _clusters = self.clusters.exclude(clusters).await;
        // Where clusters are copied the crate writes tables out as it goes, in an order that it
        // loses when it does two at once.
        let (_tables, together) = match self.copies {
            true => (self.tables.exclude(TABLES).await, 1),
            false => (self.tables.share(TABLES).await, TOGETHER),
        };
        self.health.may_write()?;
        self.each(parts(), together, write).await
    }

    async fn fetch(&self, offset: u64, to: Segments) -> io::Result<()> {
        let len = to.len() as u64;
        let _clusters = self.clusters.share(self.clusters(offset, len)).await;
        self.health.may_read()?;
        let read = |part| self.read_part(part, &to);
        self.each(self.parts(offset, len), TOGETHER, read).await
    }

    async fn sync(&self) -> io::Result<()> {
        match self.ios.first() {
            Some(io) => io.sync().await,
            None => Ok(()),
        }
    }

    /// Writes all tables out, each only when what it points to is durable.
    async fn write_tables(&self) -> io::Result<()> {
        let _tables = self.tables.exclude(TABLES).await;
        self.sync().await?;
        self.dev.flush_meta().await.map_err(failed)?;
        self.sync().await
    }

    async fn flush_all(&self) -> io::Result<()> {
        match self.ro {
            true => Ok(()),
            false if self.dev.need_flush_meta() => self.write_tables().await,
            false => self.sync().await,
        }
    }

    /// Flushes for the last time.
    async fn finish(&self) -> io::Result<()> {
        let result = match self.ro {
            true => Ok(()),
            false => self.write_tables().await,
        };
        self.state.set(match result {
            Ok(()) => State::Closed,
            Err(_) => State::Lost,
        });
        result
    }
}

impl Disk for Qcow2Rs {
    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits {
            alignment: self.block,
            memory_alignment: 1,
            optimal_io: 1 << self.cluster_bits,
            discard_granularity: 0,
            write_zeroes: false,
            resize: false,
        }
    }

    fn read(&self, offset: u64, to: Segments) -> Pending<'_> {
        Box::pin(self.fetch(offset, to))
    }

    fn write(&self, offset: u64, from: Segments) -> Pending<'_> {
        Box::pin(self.store(offset, from.len() as u64, Source::Bytes(from)))
    }

    fn flush(&self) -> Pending<'_> {
        Box::pin(self.flush_all())
    }

    fn volatile(&self) -> bool {
        !self.ro && self.dev.need_flush_meta()
    }

    fn discard(&self, _: u64, _: u64) -> Pending<'_> {
        Box::pin(std::future::ready(Err(io::ErrorKind::Unsupported.into())))
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Pending<'_> {
        Box::pin(self.store(offset, len, Source::Zeroes))
    }

    fn resize(&self, _: u64) -> Pending<'_> {
        Box::pin(std::future::ready(Err(io::ErrorKind::Unsupported.into())))
    }

    fn close(self: Box<Self>) -> Pending<'static> {
        Box::pin(async move { self.finish().await })
    }
}

impl Drop for Qcow2Rs {
    fn drop(&mut self) {
        if self.state.get() == State::Open
            && !std::thread::panicking()
            && let Err(error) = self.ring.block_on(self.finish(), || {})
        {
            tracing::error!("an image was dropped, and could not be flushed: {error}");
        }
        if self.state.get() != State::Closed {
            // The tables stay in memory for good; the files do not stay open, nor locked.
            mem::forget(Rc::clone(&self.dev));
        }
        self.ios.iter().for_each(Io::close);
    }
}
