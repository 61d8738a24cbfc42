//! What a guest finds of its machine: told without KVM, and without opening a file, by the same
//! code that builds one to be run.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::devices::{self, functions};
use super::machine::{SharedDevice, plug};
use super::{acpi, boot};
use crate::config::Vm;
use crate::devices::pci::{HOST_BRIDGE, PciAddress};
use crate::devices::virtio::blk::Unopened;
use crate::devices::virtio::rng::Rng;
use crate::devices::{GuestMemory, Hypervisor, Msi};
use crate::{Error, Result};

/// A machine as its guest finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// The whole kernel command line.
    pub cmdline: String,
    /// The ACPI tables as they lie in memory, the root pointer first.
    pub acpi: Vec<u8>,
    /// The functions of the PCI bus, rising by address.
    pub pci: Vec<Function>,
}

/// A function of the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where it is.
    pub address: PciAddress,
    /// What it is.
    pub device: Device,
    /// Its configuration space at power-on.
    pub config: Vec<u8>,
}

/// What a function of the PCI bus is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The host bridge.
    HostBridge,
    /// The entropy source.
    Entropy,
    /// The disk of this index.
    Disk(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::HostBridge => f.write_str("host bridge"),
            Device::Entropy => f.write_str("entropy source"),
            Device::Disk(index) => write!(f, "disk {index}"),
        }
    }
}

/// The machine of a configuration.
///
/// # Errors
///
/// There is no such machine: the PCI bus is full, say.
pub fn shape(config: &Vm) -> Result<Shape> {
    let devices: Vec<_> = functions(config)
        .map(|function| match function {
            devices::Function::Entropy => {
                let device: SharedDevice = Arc::new(Mutex::new(Rng::new()));
                (Device::Entropy, device)
            }
            devices::Function::Disk(index, block) => {
                let device = Arc::new(Mutex::new(Unopened::new(block.queues)));
                (Device::Disk(index), device as SharedDevice)
            }
        })
        .collect();
    let (kinds, plugged): (Vec<_>, Vec<_>) = devices.into_iter().unzip();
    Ok(Shape {
        cpus: config.cpus,
        memory: config.memory,
        // In which partition the root is depends on what a disk holds.
        cmdline: boot::cmdline(config, None),
        acpi: acpi::tables(&acpi::Machine::of(config))?,
        pci: bus(kinds, &plugged)?,
    })
}

/// The bus with these devices plugged in.
fn bus(kinds: Vec<Device>, devices: &[SharedDevice]) -> Result<Vec<Function>> {
    // No device is activated: none looks at memory.
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4096)])
        .map_err(|error| Error::failed(format!("cannot allocate memory: {error}")))?;
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(NoHypervisor);
    let (bus, addresses) = plug(devices, &Arc::new(memory), &hypervisor)?;
    let all = [(HOST_BRIDGE, Device::HostBridge)]
        .into_iter()
        .chain(addresses.into_iter().zip(kinds));
    Ok(all
        .map(|(address, device)| Function {
            address,
            device,
            config: bus.config_space(address).to_vec(),
        })
        .collect())
}

/// For a machine that is never run: no guest enables an interrupt or rings a doorbell.
struct NoHypervisor;

impl Hypervisor for NoHypervisor {
    fn msi(&self) -> io::Result<Box<dyn Msi>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn add_doorbell(&self, _address: u64, _fd: &EventFd) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn remove_doorbell(&self, _address: u64, _fd: &EventFd) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests;
