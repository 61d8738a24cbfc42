//! What a front end's messages do: the state of one connection (vhost-user: "Message types").

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vmm_sys_util::eventfd::EventFd;

use super::calls::{self, Calls};
use super::inflight::{self, InFlight};
use super::memory::{MAX_REGIONS, Place, Regions};
use super::ring::{MAX_SIZE, Ring};
use super::unflushed::{Held, Holder};
use super::{lock, wrong};
use crate::devices::throttle::Throttle;
use crate::devices::virtio::blk::{Blk, Unflushed};
use crate::devices::virtio::{Activation, ActiveQueue, Device, Interrupt, Record};

/// The feature bit of virtio that stands for vhost-user's own features.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Offset of the field `writeback` in a block device's configuration space (virtio 1.3 section
/// 5.2.4), the only one that a driver can write to.
const WRITEBACK: u32 = 32;

/// One connection's state. The disk is served as long as a ring is ready.
pub(super) struct Backend {
    disk: Arc<Mutex<Blk>>,
    calls: Arc<Calls>,
    regions: Regions,
    rings: Vec<Ring>,
    in_flight: Option<InFlight>,
    unflushed: Option<Arc<Held>>,
    server: Holder,
    /// Limits what the records of front ends can have us log.
    records: Arc<Throttle>,
    /// As the front end has set them.
    features: u64,
    protocol: u64,
    /// The field `writeback`, as a driver has written it last. What the device makes of it follows
    /// from the features, which a front end may tell later. It outlives a reset: QEMU shows the
    /// next driver what it was told last, and does not tell it again.
    writeback: Option<u8>,
}

impl Backend {
    pub(super) fn new(disk: Arc<Mutex<Blk>>, server: Holder, records: Arc<Throttle>) -> Backend {
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
            records,
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

    fn ring(&mut self, index: u32) -> io::Result<&mut Ring> {
        let known = self.rings.len();
        usize::try_from(index)
            .ok()
            .and_then(|index| self.rings.get_mut(index))
            .ok_or_else(|| wrong(format!("virtqueue {index} of {known}")))
    }

    /// Makes a change that what is served must not see half made: nothing is in flight meanwhile.
    fn change<T>(&mut self, change: impl FnOnce(&mut Self) -> io::Result<T>) -> Result<T> {
        self.stop()
            .and_then(|()| change(self))
            .and_then(|changed| self.start().map(|()| changed))
            .map_err(refused)
    }

    fn is_serving(&self) -> bool {
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
    fn record_in(&mut self, memory: Option<InFlight>) {
        if self.unflushed.take().is_some_and(|held| held.is_ours()) {
            self.flush();
        }
        let held = memory.as_ref().map(|memory| memory.unflushed(self.server));
        let news = match &held {
            Some(Some(held)) => held.is_lost(),
            Some(None) => true,
            None => false,
        };
        if news && let Some(held_back) = self.records.pass() {
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
        if let Err(error) = handle.flush() {
            tracing::error!("what a front end has written cannot be flushed: {error}");
        }
    }

    /// Everything as at the beginning of the connection, but for what was negotiated.
    fn reset(&mut self) -> Result<()> {
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

fn refused(error: io::Error) -> Error {
    Error::ReqHandlerError(error)
}

fn place(region: &VhostUserMemoryRegion) -> Place {
    Place {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

/// Where in bytes of the configuration space from `offset` on the field `writeback` is.
fn writeback_in(offset: u32) -> Option<usize> {
    WRITEBACK
        .checked_sub(offset)
        .and_then(|at| at.try_into().ok())
}

/// An eventfd that the front end may leave out.
fn optional(file: Option<File>) -> Result<Option<OwnedFd>> {
    file.map(calls::eventfd).transpose().map_err(refused)
}

fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("a message that was not negotiated"))
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(lock(&self.disk).features() | PROTOCOL_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::FeatureMismatch);
        }
        if features == self.features {
            return Ok(());
        }
        self.change(|this| {
            this.features = features;
            // Without vhost-user's own features no message enables a ring.
            if features & PROTOCOL_FEATURES == 0 {
                this.rings.iter_mut().for_each(|ring| ring.enabled = true);
            }
            lock(&this.disk).negotiated(features & !PROTOCOL_FEATURES);
            Ok(())
        })
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut table = Regions::default();
        for (region, file) in regions.iter().zip(files) {
            table.add(place(region), file).map_err(refused)?;
        }
        self.change(|this| {
            this.regions = table;
            Ok(None)
        })
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.change(|this| {
            this.regions.add(place(region), file)?;
            Ok(None)
        })
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.change(|this| {
            this.regions.remove(place(region))?;
            // So a front end exchanges a region that has changed: the next message brings the
            // other one.
            let ready = this.rings.iter_mut().filter(|ring| ring.is_ready());
            ready.for_each(|ring| ring.waits = true);
            Ok(())
        })
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.change(|this| this.ring(index)?.set_size(num))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        self.change(|this| {
            let ring = this.ring(index)?;
            ring.set_areas([descriptor, available, used]);
            Ok(())
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.change(|this| this.ring(index)?.set_base(base))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.change(|this| {
            let ring = this.ring(index)?;
            // It is stopped until there is a kick again.
            ring.kick = None;
            ring.waits = false;
            Ok(ring.base())
        })?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let kick = optional(file)?;
        if kick.is_none() {
            return Err(refused(wrong("a virtqueue that is polled was not offered")));
        }
        self.change(|this| {
            let negotiated = this.features & PROTOCOL_FEATURES != 0;
            let ring = this.ring(index.into())?;
            ring.enabled |= !negotiated;
            ring.kick = kick;
            Ok(())
        })
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.ring(index.into()).map_err(refused)?;
        self.calls.set_call(index.into(), optional(file)?);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.ring(index.into()).map_err(refused)?;
        self.calls.set_error(index.into(), optional(file)?);
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if self.ring(index).map_err(refused)?.enabled == enable {
            return Ok(());
        }
        self.change(|this| {
            this.ring(index)?.enabled = enable;
            Ok(())
        })
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_protocol_features()?.bits() != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // A message has 4 KiB at most, and so has the answer.
        let mut config = vec![0; size as usize];
        lock(&self.disk).read_config(offset.into(), &mut config);
        // What the device makes of it is known while it serves.
        if let Some(writeback) = self.writeback.filter(|_| !self.is_serving())
            && let Some(field) = writeback_in(offset).and_then(|at| config.get_mut(at))
        {
            *field = writeback;
        }
        Ok(config)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        if let Some(writeback) = writeback_in(offset).and_then(|at| buf.get(at)) {
            let writeback = u8::from(*writeback != 0);
            self.writeback = Some(writeback);
            if let Some(held) = &self.unflushed {
                held.keep_writeback(writeback);
            }
            lock(&self.disk).write_config(WRITEBACK.into(), &[writeback]);
        }
        Ok(())
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if usize::from(queues) > self.rings.len() || size > MAX_SIZE {
            return Err(refused(wrong(
                "more requests in flight than the virtqueues hold",
            )));
        }
        let file = inflight::create(queues, size).map_err(refused)?;
        let len = inflight::len(queues, size) as u64;
        Ok((VhostUserInflight::new(len, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (given.num_queues, given.queue_size);
        if usize::from(queues) > self.rings.len() || size > MAX_SIZE {
            return Err(refused(wrong(
                "more requests in flight than the virtqueues hold",
            )));
        }
        self.change(|this| {
            let memory = InFlight::open(file, given.mmap_offset, queues, size)?;
            this.record_in(Some(memory));
            Ok(())
        })
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        not_offered()
    }
}
