//! What is served to one front end: the state of its connection.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex};

use vhost::vhost_user::Result;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vmm_sys_util::eventfd::EventFd;

use super::calls::Calls;
use super::inflight::InFlight;
use super::memory::Regions;
use super::messages::refused;
use super::ring::Ring;
use super::unflushed::{Held, Holder};
use super::{lock, wrong};
use crate::devices::throttle::Throttle;
use crate::devices::virtio::blk::{Blk, Unflushed};
use crate::devices::virtio::{Activation, ActiveQueue, Device, Interrupt, Record};

/// The feature bit of virtio that stands for vhost-user's own features.
pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Offset of the field `writeback` in a block device's configuration space (virtio 1.3 section
/// 5.2.4), the only one that a driver can write to.
pub(super) const WRITEBACK: u32 = 32;

/// One connection's state. The disk is served as long as a ring is ready.
pub(super) struct Backend {
    pub(super) disk: Arc<Mutex<Blk>>,
    pub(super) calls: Arc<Calls>,
    pub(super) regions: Regions,
    pub(super) rings: Vec<Ring>,
    in_flight: Option<InFlight>,
    pub(super) unflushed: Option<Arc<Held>>,
    server: Holder,
    /// Limits what front ends can have us log with their records, or by coming and going.
    warnings: Arc<Throttle>,
    /// As the front end has set them.
    pub(super) features: u64,
    pub(super) protocol: u64,
    /// The field `writeback`, as a driver has written it last. What the device makes of it follows
    /// from the features, which a front end may tell later. It outlives a reset: QEMU shows the
    /// next driver what it was told last, and does not tell it again.
    pub(super) writeback: Option<u8>,
}

impl Backend {
    pub(super) fn new(disk: Arc<Mutex<Blk>>, server: Holder, warnings: Arc<Throttle>) -> Backend {
        let queues = lock(&disk).queue_max_sizes().len();
        let calls = Arc::new(Calls::new(queues));
        lock(&disk).connect(Arc::clone(&calls) as Arc<dyn Interrupt>);
        Backend {
            disk,
            calls,
            regions: Regions::default(),
            rings: (0..queues).map(|_| Ring::default()).collect(),
            in_flight: None,
            unflushed: None,
            server,
            warnings,
            features: 0,
            protocol: 0,
            writeback: None,
        }
    }

    /// Whether a protocol feature was negotiated.
    pub(super) fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol & feature.bits() != 0
    }

    /// Whether a message that asks for an answer gets one: from the negotiation of vhost-user's
    /// own features on, which comes before that of virtio's.
    pub(super) fn acknowledges(&self) -> bool {
        self.has(VhostUserProtocolFeatures::REPLY_ACK)
    }

    pub(super) fn calls(&self) -> &Calls {
        &self.calls
    }

    pub(super) fn ring(&mut self, index: u32) -> io::Result<&mut Ring> {
        let known = self.rings.len();
        usize::try_from(index)
            .ok()
            .and_then(|index| self.rings.get_mut(index))
            .ok_or_else(|| wrong(format!("virtqueue {index} of {known}")))
    }

    /// Makes a change that what is served must not see half made: nothing is in flight meanwhile.
    pub(super) fn change<T>(
        &mut self,
        change: impl FnOnce(&mut Self) -> io::Result<T>,
    ) -> Result<T> {
        self.stop()
            .and_then(|()| change(self))
            .and_then(|changed| self.start().map(|()| changed))
            .map_err(refused)
    }

    pub(super) fn is_serving(&self) -> bool {
        self.rings.iter().any(|ring| ring.served.is_some())
    }

    /// Stops serving: what was taken is given back when it returns.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        if !self.is_serving() {
            return Ok(());
        }
        lock(&self.disk).reset();
        let memory = self.regions.memory()?;
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let Some(ahead) = ring.served.take() else {
                continue;
            };
            let used = ring.used(&self.regions, &memory)?;
            let ahead = match &self.in_flight {
                Some(shared) => shared.record(index as u16, ring.size(), used)?.in_flight(),
                None => ahead,
            };
            ring.set_base(used.wrapping_add(ahead).into())?;
        }
        Ok(())
    }

    /// Serves the rings that are ready, but for those that wait for their memory.
    fn start(&mut self) -> io::Result<()> {
        if !self.rings.iter().any(Ring::is_ready) {
            return Ok(());
        }
        let memory = match self.regions.memory() {
            // There is none at all.
            Err(_) if self.rings.iter().all(|it| it.waits || !it.is_ready()) => return Ok(()),
            memory => memory?,
        };
        let mut queues = Vec::new();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let Some(kick) = ring.kick.as_ref().filter(|_| ring.is_ready()) else {
                continue;
            };
            if ring.waits && ring.queue(&self.regions, &memory, 0, 0).is_err() {
                continue;
            }
            let index = index as u16;
            let used = ring.used(&self.regions, &memory)?;
            let (record, ahead) = match &self.in_flight {
                None => (None, ring.base().wrapping_sub(used)),
                Some(shared) => {
                    let log = shared.record(index, ring.size(), used)?;
                    let ahead = log.in_flight();
                    (Some(Box::new(log) as Box<dyn Record>), ahead)
                }
            };
            let queue = ring.queue(&self.regions, &memory, used, ahead)?;
            let kick = kick.try_clone()?;
            // SAFETY: `into_raw_fd` gives the descriptor away, and nobody else has it.
            let kick = unsafe { EventFd::from_raw_fd(kick.into_raw_fd()) };
            queues.push(ActiveQueue {
                index,
                queue,
                kick,
                record,
            });
            ring.served = Some(ahead);
            ring.waits = false;
        }
        if queues.is_empty() {
            return Ok(());
        }
        let features = self.features & !PROTOCOL_FEATURES;
        let mut disk = lock(&self.disk);
        disk.record_unflushed(self.unflushed.clone().map(|it| it as Arc<dyn Unflushed>));
        disk.negotiated(features);
        if let Some(writeback) = self.writeback {
            disk.write_config(WRITEBACK.into(), &[writeback]);
        }
        let interrupt: Arc<dyn Interrupt> = self.calls.clone();
        disk.activate(Activation {
            memory,
            features,
            queues,
            interrupt,
        })
    }

    /// Goes on with another record of requests in flight, or without, while nothing is served. The
    /// one before is left as one that says that nothing is unflushed: who has it next may not come
    /// back before this server has ended.
    pub(super) fn record_in(&mut self, memory: Option<InFlight>) {
        if self.unflushed.take().is_some_and(|held| held.is_ours()) {
            self.flush();
        }
        let held = memory.as_ref().map(|memory| memory.unflushed(self.server));
        let news = match &held {
            Some(Some(held)) => held.is_lost(),
            Some(None) => true,
            None => false,
        };
        if news && let Some(held_back) = self.warnings.pass() {
            match held {
                Some(Some(_)) => tracing::error!(
                    held_back,
                    "the server before was killed: writes that it had completed and not flushed are \
                     lost; the guest's next flush fails, to tell it"
                ),
                _ => tracing::warn!(
                    held_back,
                    "the front end's record of requests in flight is another program's: \
                     if writes are lost with a server, nobody will know"
                ),
            }
        }
        self.unflushed = held.flatten().map(Arc::new);
        if let Some(held) = &self.unflushed {
            match self.writeback {
                Some(writeback) => held.keep_writeback(writeback),
                // As an earlier server was told.
                None => self.writeback = held.writeback(),
            }
        }
        self.in_flight = memory;
    }

    fn flush(&self) {
        let handle = lock(&self.disk).handle();
        if let Err(error) = handle.flush()
            && let Some(held_back) = self.warnings.pass()
        {
            tracing::error!(
                held_back,
                "what a front end has written cannot be flushed: {error}"
            );
        }
    }

    /// Everything as at the beginning of the connection, but for what was negotiated.
    pub(super) fn reset(&mut self) -> Result<()> {
        self.stop().map_err(refused)?;
        for ring in &mut self.rings {
            *ring = Ring::default();
        }
        self.record_in(None);
        Ok(())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // The next front end finds a device that has negotiated nothing.
        lock(&self.disk).reset();
        // With a record or without: who goes on with another server may have none.
        self.flush();
        self.calls.close();
    }
}
