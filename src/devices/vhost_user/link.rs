//! One connection to a back end: the messages that set it up, start its virtqueues and stop them.
//!
//! Every call waits for the back end, and ends when the connection is cut.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Error, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::channel::{Channel, News};
use super::offer::{CONFIG_LEN, Config, Offer, WRITEBACK, has};
use crate::devices::virtio::{ActiveQueue, Interrupt};
use crate::devices::{GuestMemory, event};

/// The feature bit of virtio that stands for vhost-user's own features.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Those of vhost-user's own features that are used where they are offered. Guest memory has two
/// regions at most, so one message says all of it: memory slots are not needed.
const WANTED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD);

/// A connection to a back end.
pub(super) struct Link {
    frontend: Frontend,
    stream: UnixStream,
    channel: Option<Channel>,
    pub(super) offer: Offer,
}

/// What the driver has set up: there from its activation to a reset. It outlives the back end.
pub(super) struct Active {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) features: u64,
    pub(super) queues: Vec<ActiveQueue>,
    pub(super) interrupt: Arc<dyn Interrupt>,
    /// Whether a back end has had the virtqueues already.
    pub(super) started: bool,
    /// The back end's record of the requests in flight.
    pub(super) in_flight: Option<(VhostUserInflight, File)>,
}

/// The host's error in one of the library's, where that is what it is.
fn failed(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::VhostUserProtocol(error) => match error {
            Error::SocketError(error) | Error::SocketBroken(error) => error,
            Error::Disconnected | Error::PartialMessage => {
                io::Error::new(io::ErrorKind::UnexpectedEof, "it has closed the connection")
            }
            Error::BackendInternalError => io::Error::other("it has refused a message"),
            error => wrong(error.to_string()),
        },
        error => wrong(error.to_string()),
    }
}

/// The error of a back end that makes a mistake.
fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Link {
    /// Negotiates with a back end that is to serve so many virtqueues, and asks what it offers.
    ///
    /// # Errors
    ///
    /// It serves no disk, makes a mistake, or goes away.
    pub(super) fn new(stream: UnixStream, queues: u16) -> io::Result<Link> {
        let mut frontend = Frontend::from_stream(stream.try_clone()?, queues.into());
        let features = frontend.get_features().map_err(failed)?;
        if features & PROTOCOL_FEATURES == 0 {
            return Err(wrong("it knows no features of vhost-user"));
        }
        let protocol = frontend.get_protocol_features().map_err(failed)? & WANTED;
        if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(wrong("it has no configuration space, so it is no disk"));
        }
        frontend.set_protocol_features(protocol).map_err(failed)?;
        let queues = match protocol.contains(VhostUserProtocolFeatures::MQ) {
            true => frontend.get_queue_num().map_err(failed)?,
            false => 1,
        };
        if queues == 0 {
            return Err(wrong("it has no virtqueue"));
        }
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // From now on a message that goes wrong is known to.
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_owner().map_err(failed)?;
        let config = config(&mut frontend)?;
        let offer = Offer {
            features,
            queues,
            in_flight: protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD),
            config,
        };
        offer.check().map_err(wrong)?;
        let channel = match protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            true => {
                let (channel, theirs) = Channel::new()?;
                frontend.set_backend_request_fd(&theirs).map_err(failed)?;
                Some(channel)
            }
            false => None,
        };
        Ok(Link {
            frontend,
            stream,
            channel,
            offer,
        })
    }

    /// Readable when the back end has gone: it says nothing unasked.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Readable when it has sent messages of its own.
    pub(super) fn channel_fd(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_ref().map(Channel::as_fd)
    }

    /// Takes its own messages; whether its configuration space has changed, which is in the offer
    /// then.
    pub(super) fn listen(&mut self) -> io::Result<bool> {
        let Some(channel) = &mut self.channel else {
            return Ok(false);
        };
        match channel.take()? {
            News::Nothing => return Ok(false),
            News::End => {
                self.channel = None;
                return Ok(false);
            }
            News::ConfigChanged => {}
        }
        let config = config(&mut self.frontend)?;
        let offer = Offer {
            config,
            ..self.offer.clone()
        };
        offer.check().map_err(wrong)?;
        let changed = offer != self.offer;
        self.offer = offer;
        Ok(changed)
    }

    /// Has the back end cache writes, or not.
    pub(super) fn set_writeback(&mut self, writeback: u8) -> io::Result<()> {
        // A field that a driver can write is flagged with 0, and 1 is for migration; the library
        // has other names for them.
        let flags = VhostUserConfigFlags::empty();
        let frontend = &mut self.frontend;
        let field = frontend.set_config(WRITEBACK as u32, flags, &[writeback]);
        field.map(drop).map_err(failed)
    }

    /// Hands the virtqueues over. `calls` are what their interrupts signal, in the same order.
    pub(super) fn start(
        &mut self,
        active: &mut Active,
        writeback: u8,
        calls: &[EventFd],
        broken: &EventFd,
    ) -> io::Result<()> {
        let frontend = &mut self.frontend;
        let features = active.features | PROTOCOL_FEATURES;
        frontend.set_features(features).map_err(failed)?;
        let memory = &active.memory;
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions = regions.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        frontend.set_mem_table(&regions).map_err(failed)?;
        // A back end may take this to be another driver, with a cache as at first.
        if has(active.features, VIRTIO_BLK_F_CONFIG_WCE) {
            self.set_writeback(writeback)?;
        }
        if self.offer.in_flight {
            self.share_in_flight(active)?;
        }
        let frontend = &mut self.frontend;
        for (queue, call) in active.queues.iter().zip(calls) {
            let index = usize::from(queue.index);
            let rings = &queue.queue;
            // A device begins with the first entry. Another one goes on behind what was used; the
            // record says which requests before that are to be done still, and which behind it are
            // done already.
            let base = match active.started {
                true => used(&active.memory, rings)?,
                false => 0,
            };
            frontend
                .set_vring_num(index, rings.size())
                .and_then(|()| frontend.set_vring_base(index, base))
                .map_err(failed)?;
            let addresses = addresses(&active.memory, rings)?;
            frontend
                .set_vring_addr(index, &addresses)
                .and_then(|()| frontend.set_vring_err(index, broken))
                .and_then(|()| frontend.set_vring_call(index, call))
                .and_then(|()| frontend.set_vring_kick(index, &queue.kick))
                .map_err(failed)?;
        }
        // From here on there may be requests in flight.
        active.started = true;
        for queue in &active.queues {
            let index = usize::from(queue.index);
            frontend.set_vring_enable(index, true).map_err(failed)?;
            // What the driver has made available before, nobody may have looked at.
            event::signal(&queue.kick);
        }
        Ok(())
    }

    /// Shares the record of the requests in flight: the one that there is, or a new one of the
    /// back end's.
    fn share_in_flight(&mut self, active: &mut Active) -> io::Result<()> {
        let frontend = &mut self.frontend;
        let (what, file) = match active.in_flight.take() {
            Some(record) => record,
            None => {
                let last = active.queues.iter().map(|queue| queue.index).max();
                let sizes = active.queues.iter().map(|queue| queue.queue.size());
                let wanted = VhostUserInflight {
                    num_queues: last.map_or(0, |last| last.saturating_add(1)),
                    queue_size: sizes.max().unwrap_or_default(),
                    ..VhostUserInflight::default()
                };
                if wanted.num_queues == 0 {
                    return Ok(());
                }
                let (what, file) = frontend.get_inflight_fd(&wanted).map_err(failed)?;
                // As libvhost-user answers, which leaves the rest out.
                let what = VhostUserInflight {
                    num_queues: wanted.num_queues,
                    queue_size: wanted.queue_size,
                    ..what
                };
                (what, file)
            }
        };
        let shared = frontend.set_inflight_fd(&what, file.as_raw_fd());
        active.in_flight = Some((what, file));
        shared.map_err(failed)
    }

    /// Has the interrupts of a virtqueue signal something else.
    pub(super) fn set_call(&mut self, index: u16, call: &EventFd) -> io::Result<()> {
        let set = self.frontend.set_vring_call(index.into(), call);
        set.map_err(failed)
    }

    /// Stops the virtqueues: when it returns, every request that was taken is answered.
    pub(super) fn stop(&mut self, active: &Active) -> io::Result<()> {
        for queue in &active.queues {
            let stopped = self.frontend.get_vring_base(queue.index.into());
            stopped.map_err(failed)?;
        }
        Ok(())
    }
}

fn config(frontend: &mut Frontend) -> io::Result<Config> {
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, bytes) = frontend
        .get_config(0, CONFIG_LEN as u32, flags, &[0; CONFIG_LEN])
        .map_err(failed)?;
    match bytes.try_into() {
        Ok(bytes) => Ok(Config(bytes)),
        Err(_) => Err(wrong("a configuration space of another length")),
    }
}

/// Where the rings are, as addresses of this process.
fn addresses(memory: &GuestMemory, queue: &Queue) -> io::Result<VringConfigData> {
    let address = |at: u64| {
        memory
            .get_host_address(GuestAddress(at))
            .map(|host| host as u64)
            .map_err(|error| wrong(format!("a ring lies outside guest memory: {error}")))
    };
    Ok(VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: address(queue.desc_table())?,
        used_ring_addr: address(queue.used_ring())?,
        avail_ring_addr: address(queue.avail_ring())?,
        log_addr: None,
    })
}

/// An index in a ring: behind the ring's flags.
fn index(memory: &GuestMemory, ring: u64) -> io::Result<u16> {
    let at = GuestAddress(ring).checked_add(2);
    let index: Option<u16> = at.and_then(|at| memory.load(at, Ordering::Acquire).ok());
    let index = index.ok_or_else(|| wrong("a ring lies outside guest memory"))?;
    Ok(u16::from_le(index))
}

/// The index of a virtqueue's used ring.
fn used(memory: &GuestMemory, queue: &Queue) -> io::Result<u16> {
    index(memory, queue.used_ring())
}

impl Active {
    /// Whether the driver waits for requests. A back end without a record of them could not tell
    /// which.
    pub(super) fn waits(&self) -> io::Result<bool> {
        for ActiveQueue { queue, .. } in &self.queues {
            if used(&self.memory, queue)? != index(&self.memory, queue.avail_ring())? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
