//! The devices of the machine: serial port, PCI bus, virtio devices. They know nothing of KVM,
//! only of the traits in this module; the virtio devices know nothing of PCI either.

pub(crate) mod bell;
pub mod bus;
pub(crate) mod event;
pub mod pci;
pub mod power;
pub mod pvpanic;
pub mod serial;
pub(crate) mod throttle;
pub mod vhost_user;
pub mod virtio;

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// The guest's memory, in one or two regions (a hole lies below 4 GiB).
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// A device on the port I/O or memory-mapped I/O bus. Called by vCPU threads.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` into the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// One message-signalled interrupt: an eventfd that, once routed, interrupts the guest without
/// passing through us (KVM's irqfd).
pub trait Msi: Send + Sync {
    /// Sends interrupts signalled on [`Msi::eventfd`] as this message (PCI 3.0 section 6.8).
    fn route(&self, address: u64, data: u32) -> io::Result<()>;
    /// Stops delivery (the vector is masked or MSI-X disabled).
    fn unroute(&self) -> io::Result<()>;
    /// Signalling it sends the message.
    fn eventfd(&self) -> &EventFd;
}

/// What a PCI device asks of the hypervisor.
pub trait Hypervisor: Send + Sync {
    /// A new interrupt, not routed yet.
    fn msi(&self) -> io::Result<Box<dyn Msi>>;
    /// From now on a guest write of any length at `address` signals `fd` and does not exit
    /// (KVM's ioeventfd).
    fn add_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()>;
    /// Ends what [`Hypervisor::add_doorbell`] began with the same arguments.
    fn remove_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()>;
}
