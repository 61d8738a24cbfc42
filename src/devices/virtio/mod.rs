//! Virtio devices (virtio 1.3). A device implements [`Device`]; a transport drives it.

pub mod blk;
mod chain;
pub mod pci;
mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;

use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::GuestMemory;

/// A virtio device, driven by a transport (section 2).
///
/// A device outlives the machine it is plugged into: after a guest reboot the same device, with
/// its open image, is plugged into the next machine.
pub trait Device: Send {
    /// Device type (section 5): 2 is a block device, 4 an entropy source.
    fn device_type(&self) -> u32;
    /// Feature bits that the device offers, VIRTIO_F_VERSION_1 included (section 2.2).
    fn features(&self) -> u64;
    /// Largest size of each virtqueue; the length is the number of virtqueues.
    fn queue_max_sizes(&self) -> Vec<u16>;
    /// Reads the device configuration space (section 2.5); bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device configuration space; what is not writable is left alone.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// The driver has set FEATURES_OK and these features are negotiated (section 3.1.1): fields of
    /// the configuration space that depend on them are final now.
    fn negotiated(&mut self, _features: u64) {}
    /// Starts serving: the driver has set DRIVER_OK. An error makes the transport set
    /// DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;
    /// Stops serving. When it returns, no request is in flight and guest memory is not touched
    /// any more. Called for a device that was not activated too.
    fn reset(&mut self);
    /// The interrupt to use for configuration changes, from before activation on: a resize works
    /// before the guest's driver is there.
    fn connect(&mut self, interrupt: Arc<dyn Interrupt>);
    /// The driver has changed where the interrupts of an active device go: eventfds of
    /// [`Interrupt::eventfd`] are to be had anew.
    fn remapped(&mut self) {}
}

/// What the driver set up before DRIVER_OK.
pub struct Activation {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The features that were negotiated.
    pub features: u64,
    /// The virtqueues that the driver enabled, in order of their index.
    pub queues: Vec<ActiveQueue>,
    /// How the device interrupts the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A virtqueue that the driver enabled. Size and addresses are final.
pub struct ActiveQueue {
    /// Index of the virtqueue.
    pub index: u16,
    /// The rings, validated: aligned, and inside guest memory.
    pub queue: Queue,
    /// Signalled when the driver has made buffers available. Reads of it block, or else cost a
    /// poll more.
    pub kick: EventFd,
    /// Keeps a record of the buffers in flight, where a transport needs one.
    pub record: Option<Box<dyn Record>>,
}

/// A record of the buffers of one virtqueue that the device has taken and not given back: with it
/// another device can go on where this one was killed.
///
/// All of it is called by the thread that serves the virtqueue.
pub trait Record: Send {
    /// The heads that an earlier device has taken and not given back, in that order: they are
    /// served first. The virtqueue's next available entry is behind them. Called once.
    fn resume(&mut self) -> Vec<u16>;
    /// A head was taken from the available ring.
    fn taken(&mut self, head: u16);
    /// A head will be put into the used ring.
    fn returning(&mut self, head: u16);
    /// It is there; `used` is the index of the used ring now.
    fn returned(&mut self, head: u16, used: u16);
}

/// A device's way to interrupt its driver.
pub trait Interrupt: Send + Sync {
    /// Used buffers wait in virtqueue `index`. One call a batch, after the used ring is updated
    /// and only if the driver asked for it.
    fn queue(&self, index: u16);
    /// An eventfd, for somebody outside of this process: signalling it does what
    /// [`Interrupt::queue`] does, until [`Device::remapped`] is called. `None`: there is none now.
    fn eventfd(&self, _index: u16) -> Option<EventFd> {
        None
    }
    /// The configuration space changed (section 2.5): raises its generation.
    fn config_changed(&self);
    /// The rings are broken beyond repair: sets DEVICE_NEEDS_RESET (section 2.1.2).
    fn needs_reset(&self);
}
