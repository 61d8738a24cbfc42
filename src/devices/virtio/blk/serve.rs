//! One request's way on the disk's thread: its chain read and checked, carried out by the image,
//! its status written.

use std::fmt;
use std::io;
use std::sync::atomic::Ordering;

use formats::Disk;

use super::batch::Job;
use super::features::SECTOR_SIZE;
use super::latency::{Finished, Measured};
use super::reply::Reply;
use super::request::{Range, Request, Rules, Status};
use super::worker::{Cache, Worker};

impl Worker {
    /// Serves one request; returns its used length, and the bytes of its data.
    pub(super) async fn serve(&self, job: Job) -> (u32, usize) {
        let (request, reply, durable) = match self.accept(job) {
            Ok(accepted) => accepted,
            Err(len) => return (len, 0),
        };
        let (bytes, kind) = match &request {
            Request::In { to, .. } => (to.len(), Some(Measured::Read)),
            Request::Out { from, .. } => (from.len(), Some(Measured::Write)),
            Request::Flush => (0, Some(Measured::Flush)),
            _ => (0, None),
        };
        let len = match self.execute(request, durable).await {
            Ok(written) => {
                if let Some(kind) = kind {
                    let taken = job.taken;
                    self.finished.borrow_mut().push(Finished { taken, kind });
                }
                reply.write(Status::Ok, written)
            }
            Err(failure) => {
                self.failed(&failure);
                reply.write(Status::IoErr, 0)
            }
        };
        (len, bytes)
    }

    /// Reads and checks the request of a job. The third value is whether a write must be durable
    /// before it completes. Fails with the used length of a request that is answered already.
    fn accept(&self, job: Job) -> Result<(Request, Reply, bool), u32> {
        let serving = self.serving.borrow();
        let Some(serving) = serving.as_ref() else {
            return Err(0);
        };
        let chain = serving.queues[job.queue].chain(job.head, &mut self.scratch.borrow_mut());
        let mut chain = chain.map_err(|broken| {
            self.refused(broken.reason, &"a descriptor chain");
            let status = broken
                .last
                .map(|last| last.copy_from(&[Status::IoErr as u8]));
            u32::from(status.is_some())
        })?;
        let Some(reply) = Reply::split_off(&mut chain.writable) else {
            self.refused("there is no byte for the status", &"a descriptor chain");
            return Err(0);
        };
        let rules = Rules {
            profile: &self.profile,
            features: serving.features,
            capacity: self.shared.size.load(Ordering::Relaxed) / SECTOR_SIZE,
        };
        match Request::parse(chain.readable, chain.writable, &rules) {
            Ok(request) => {
                let durable = match serving.cache {
                    Cache::WriteBack => false,
                    Cache::WriteThrough => true,
                    Cache::Configurable => !self.shared.writeback.load(Ordering::Acquire),
                };
                Ok((request, reply, durable))
            }
            Err(refused) => {
                self.refused(refused.reason, &refused.header);
                Err(reply.write(refused.status, 0))
            }
        }
    }

    /// Carries out a request; returns the number of bytes written to its data.
    async fn execute(&self, request: Request, durable: bool) -> Result<usize, Failure> {
        let counters = &self.shared.counters;
        let disk = self.disk().map_err(Failure::of("open", 0, 0))?;
        match request {
            Request::In { offset, to } => {
                let len = to.len();
                if len > 0 {
                    let read = disk.read(offset, to).await;
                    read.map_err(Failure::of("read", offset, len as u64))?;
                }
                counters.reads.add(1);
                counters.read_bytes.add(len as u64);
                return Ok(len);
            }
            Request::Out { offset, from } => {
                let len = from.len() as u64;
                if len > 0 {
                    let written = disk.write(offset, from).await;
                    written.map_err(Failure::of("write", offset, len))?;
                }
                self.harden(&**disk, durable).await?;
                counters.writes.add(1);
                counters.written_bytes.add(len);
            }
            Request::Flush => {
                self.harden(&**disk, true).await?;
                counters.flushes.add(1);
            }
            Request::GetId { to } => return Ok(to.copy_from(&self.id)),
            Request::Discard(ranges) => {
                for Range { offset, len, .. } in ranges {
                    if len > 0 {
                        let discarded = disk.discard(offset, len).await;
                        discarded.map_err(Failure::of("discard", offset, len))?;
                    }
                }
                counters.discards.add(1);
            }
            Request::WriteZeroes(ranges) => {
                for Range { offset, len, unmap } in ranges {
                    if len > 0 {
                        let zeroed = disk.write_zeroes(offset, len, unmap).await;
                        zeroed.map_err(Failure::of("write zeroes", offset, len))?;
                    }
                }
                self.harden(&**disk, durable).await?;
                counters.write_zeroes.add(1);
            }
        }
        Ok(0)
    }

    /// Makes what was written durable, if it has to be.
    async fn harden(&self, disk: &dyn Disk, durable: bool) -> Result<(), Failure> {
        if !durable {
            self.unflushed.completed(disk);
            return Ok(());
        }
        let flush = || Failure::of("flush", 0, 0);
        self.unflushed.check().map_err(flush())?;
        disk.flush().await.map_err(flush())?;
        self.unflushed.flushed(disk);
        Ok(())
    }

    /// Logs a request that got no further than its checks.
    fn refused(&self, reason: &str, what: &dyn fmt::Display) {
        self.shared.counters.refused.add(1);
        if let Some(held_back) = self.shared.guest_errors.pass() {
            tracing::warn!(disk = self.name, held_back, "guest error: {reason}: {what}");
        }
    }

    /// Logs a request that failed on the host.
    fn failed(&self, failure: &Failure) {
        self.shared.counters.host_errors.add(1);
        if let Some(held_back) = self.host_errors.pass() {
            let Failure {
                op,
                offset,
                len,
                error,
            } = failure;
            tracing::error!(
                disk = self.name,
                offset,
                len,
                held_back,
                "{op} failed: {error}"
            );
        }
    }
}

/// A request that failed on the host.
struct Failure {
    op: &'static str,
    offset: u64,
    len: u64,
    error: io::Error,
}

impl Failure {
    fn of(op: &'static str, offset: u64, len: u64) -> impl FnOnce(io::Error) -> Failure {
        move |error| Failure {
            op,
            offset,
            len,
            error,
        }
    }
}
