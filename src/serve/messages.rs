//! What a front end's messages do (vhost-user: "Message types").

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::backend::{Backend, PROTOCOL_FEATURES, WRITEBACK};
use super::calls;
use super::inflight::{self, InFlight};
use super::memory::{MAX_REGIONS, Place, Regions};
use super::ring::MAX_SIZE;
use super::{lock, wrong};
use crate::devices::virtio::Device;

pub(super) fn refused(error: io::Error) -> Error {
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

impl Backend {
    /// A record of requests in flight is for the virtqueues that there are, and for no more than
    /// they hold.
    fn check_in_flight(&self, queues: u16, size: u16) -> io::Result<()> {
        match usize::from(queues) > self.rings.len() || size > MAX_SIZE {
            true => Err(wrong("more requests in flight than the virtqueues hold")),
            false => Ok(()),
        }
    }
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
        self.check_in_flight(queues, size).map_err(refused)?;
        let file = inflight::create(queues, size).map_err(refused)?;
        let len = inflight::len(queues, size) as u64;
        Ok((VhostUserInflight::new(len, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (given.num_queues, given.queue_size);
        self.check_in_flight(queues, size).map_err(refused)?;
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
