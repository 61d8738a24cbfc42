//! The PCI bus: configuration mechanism #1, the host bridge, and the window of addresses in which
//! devices answer (PCI 3.0).

pub mod config;
#[cfg(test)]
pub(crate) mod fake;
pub mod msix;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::devices::BusDevice;
use crate::{Error, Result};
use config::{BAR0, COMMAND, COMMAND_MEMORY, ConfigSpace, HEADER_TYPE, Identity, MULTI_FUNCTION};

/// Slots beside that of the host bridge.
const SLOTS: usize = 31;
/// Functions of a slot.
const FUNCTIONS: usize = 8;
/// How many devices fit on the bus, beside the host bridge.
pub const MAX_DEVICES: usize = SLOTS * FUNCTIONS;

/// A function on the PCI bus. Called by vCPU threads, several at once.
pub trait PciDevice: Send + Sync {
    /// The device is now at `address`; its BAR answers inside `window` only. Called once, first.
    fn plug(&self, address: PciAddress, window: Range<u64>);
    /// Reads configuration registers, within one dword.
    fn read_config(&self, offset: u8, data: &mut [u8]);
    /// Writes configuration registers, within one dword.
    fn write_config(&self, offset: u8, data: &[u8]);
    /// The addresses at which BAR 0 answers now.
    fn decoded(&self) -> Option<Range<u64>>;
    /// Reads BAR 0; the access is inside.
    fn read_bar(&self, offset: u64, data: &mut [u8]);
    /// Writes BAR 0; the access is inside.
    fn write_bar(&self, offset: u64, data: &[u8]);
    /// The machine ends: stops serving, so that what is behind the function may be plugged into
    /// another machine. What the guest does from now on has no effect.
    fn shutdown(&self);
}

/// Where a function is; there is one bus, bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciAddress {
    /// Slot: the PCI device number, 0 to 31.
    pub slot: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

/// Where the host bridge is.
pub const HOST_BRIDGE: PciAddress = PciAddress {
    slot: 0,
    function: 0,
};

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.slot, self.function)
    }
}

/// The bus: a host bridge in slot 0 and the devices, in the order they were added.
///
/// Built before the vCPUs start; then shared, without a lock, by [`ConfigPorts`] and [`Window`].
///
/// A kernel that walks the bus slot by slot, and each slot function by function, meets the
/// devices in that order: it names disks by it.
pub struct PciBus {
    bridge: ConfigSpace,
    /// How many functions a slot has: one, unless there are more devices than slots.
    functions: usize,
    devices: Vec<Arc<dyn PciDevice>>,
    window: Range<u64>,
    /// Where each device's BAR was put, rising; with the device's index.
    homes: Vec<(Range<u64>, usize)>,
}

impl PciBus {
    /// An empty bus for `count` devices, which answer at the guest physical addresses `window`,
    /// below 4 GiB.
    pub fn new(window: Range<u64>, count: usize) -> Self {
        // QEMU's generic host bridge: kernels have no quirks for it.
        let bridge = ConfigSpace::new(&Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        PciBus {
            bridge,
            functions: count.div_ceil(SLOTS).max(1),
            devices: Vec::new(),
            window,
            homes: Vec::new(),
        }
    }

    /// Plugs a device into the next free address, and gives its BAR an address as firmware
    /// would: a kernel finds it programmed.
    ///
    /// Fails if the bus or the window is full.
    pub fn add(&mut self, device: Arc<dyn PciDevice>) -> Result<PciAddress> {
        let index = self.devices.len();
        let address = self.address(index).ok_or_else(|| {
            let most = self.functions.min(FUNCTIONS) * SLOTS;
            Error::failed(format!(
                "the PCI bus has no place for more than {most} devices"
            ))
        })?;
        device.plug(address, self.window.clone());
        device.write_config(BAR0, &u32::MAX.to_le_bytes());
        let mut mask = [0; 4];
        device.read_config(BAR0, &mut mask);
        // The lowest bits are no part of the size (section 6.2.5.1).
        let mask = u32::from_le_bytes(mask) & !0xf;
        if mask != 0 {
            let len = u64::from(!mask) + 1;
            let free = self.homes.last().map_or(self.window.start, |(r, _)| r.end);
            let start = free.next_multiple_of(len);
            let end = start + len;
            let (true, Ok(bar)) = (end <= self.window.end, u32::try_from(start)) else {
                return Err(Error::failed(format!(
                    "no place for {len:#x} bytes of PCI device {address} in the window {:#x}..{:#x}",
                    self.window.start, self.window.end
                )));
            };
            device.write_config(BAR0, &bar.to_le_bytes());
            device.write_config(COMMAND, &COMMAND_MEMORY.to_le_bytes());
            self.homes.push((start..end, index));
        }
        self.devices.push(device);
        Ok(address)
    }

    /// The configuration space of a function, as the guest reads it.
    pub fn config_space(&self, address: PciAddress) -> [u8; config::LEN] {
        let mut space = [0; config::LEN];
        for (offset, dword) in (0..=u8::MAX).step_by(4).zip(space.chunks_mut(4)) {
            self.read_config(address, offset, dword);
        }
        space
    }

    /// Guest physical addresses of the devices' BARs.
    pub fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Shuts every device down, in the order they were added. The vCPUs need not have stopped.
    pub fn shutdown(&self) {
        for device in &self.devices {
            device.shutdown();
        }
    }

    /// Where device `index` goes, counted from 0.
    fn address(&self, index: usize) -> Option<PciAddress> {
        let (slot, function) = (1 + index / self.functions, index % self.functions);
        (slot <= SLOTS && function < FUNCTIONS).then_some(PciAddress {
            slot: slot as u8,
            function: function as u8,
        })
    }

    fn device(&self, address: PciAddress) -> Option<&dyn PciDevice> {
        let (slot, function) = (
            usize::from(address.slot).checked_sub(1)?,
            usize::from(address.function),
        );
        let index = slot * self.functions + function;
        self.devices
            .get(index)
            .filter(|_| function < self.functions)
            .map(AsRef::as_ref)
    }

    fn read_config(&self, address: PciAddress, offset: u8, data: &mut [u8]) {
        if address == HOST_BRIDGE {
            return self.bridge.read(offset, data);
        }
        let Some(device) = self.device(address) else {
            return data.fill(0xff);
        };
        device.read_config(offset, data);
        // Only the bus knows whether there are functions beside function 0.
        let second = PciAddress {
            function: 1,
            ..address
        };
        if address.function == 0
            && self.device(second).is_some()
            && let Some(index) = HEADER_TYPE.checked_sub(offset)
            && let Some(header_type) = data.get_mut(usize::from(index))
        {
            *header_type |= MULTI_FUNCTION;
        }
    }

    fn write_config(&self, address: PciAddress, offset: u8, data: &[u8]) {
        if let Some(device) = self.device(address) {
            device.write_config(offset, data);
        }
    }

    /// The device whose BAR holds all `len` bytes at `address`, and the offset in the BAR.
    fn decode(&self, address: u64, len: usize) -> Option<(&dyn PciDevice, u64)> {
        let end = address.checked_add(len as u64)?;
        let within = |device: &Arc<dyn PciDevice>| {
            device
                .decoded()
                .filter(|bar| bar.start <= address && end <= bar.end)
                .map(|bar| address - bar.start)
        };
        // Kernels leave BARs where they found them: look there first.
        let after = self
            .homes
            .partition_point(|(home, _)| home.start <= address);
        let home = after
            .checked_sub(1)
            .and_then(|before| self.homes.get(before));
        home.and_then(|(_, index)| self.devices.get(*index))
            .into_iter()
            .chain(&self.devices)
            .find_map(|device| Some((device.as_ref(), within(device)?)))
    }
}

/// First of the [`CONFIG_PORTS_LEN`] ports of configuration mechanism #1: CONFIG_ADDRESS, then
/// CONFIG_DATA (section 3.2.2.3.2).
pub const CONFIG_PORTS: u64 = 0xcf8;
/// Number of ports of configuration mechanism #1.
pub const CONFIG_PORTS_LEN: u64 = 8;
/// Offset of CONFIG_DATA.
const CONFIG_DATA: u64 = 4;
/// CONFIG_ADDRESS: CONFIG_DATA accesses a configuration space.
const ENABLE: u32 = 1 << 31;
/// The bits that CONFIG_ADDRESS keeps: enable, bus, slot, function, dword.
const CONFIG_ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Configuration mechanism #1, at [`CONFIG_PORTS`].
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    /// CONFIG_ADDRESS. Guests use the two ports under a lock of theirs.
    address: AtomicU32,
}

impl ConfigPorts {
    /// The ports of `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        ConfigPorts {
            bus,
            address: AtomicU32::new(0),
        }
    }

    /// What an access of `len` bytes at `offset` into the ports goes to. It stays within the
    /// dword of CONFIG_DATA.
    fn target(&self, offset: u64, len: usize) -> Option<(PciAddress, u8)> {
        let latched = self.address.load(Ordering::Relaxed);
        let [dword, function, bus, _] = latched.to_le_bytes();
        let byte = offset.checked_sub(CONFIG_DATA)?;
        let inside = byte.checked_add(len as u64)? <= 4;
        if latched & ENABLE == 0 || bus != 0 || !inside {
            return None;
        }
        let address = PciAddress {
            slot: function >> 3,
            function: function & 7,
        };
        Some((address, dword + byte as u8))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *data = self.address.load(Ordering::Relaxed).to_le_bytes();
        } else if let Some((address, offset)) = self.target(offset, data.len()) {
            self.bus.read_config(address, offset, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Anything but a whole dword is not for CONFIG_ADDRESS, by the specification.
        if let (0, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) {
            let address = u32::from_le_bytes(data) & CONFIG_ADDRESS_BITS;
            self.address.store(address, Ordering::Relaxed);
        } else if let Some((address, offset)) = self.target(offset, data.len()) {
            self.bus.write_config(address, offset, data);
        }
    }
}

/// The addresses at which the devices' BARs answer: [`PciBus::window`].
pub struct Window {
    bus: Arc<PciBus>,
}

impl Window {
    /// The window of `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Window { bus }
    }
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let address = self.bus.window.start.saturating_add(offset);
        match self.bus.decode(address, data.len()) {
            Some((device, offset)) => device.read_bar(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let address = self.bus.window.start.saturating_add(offset);
        if let Some((device, offset)) = self.bus.decode(address, data.len()) {
            device.write_bar(offset, data);
        }
    }
}

/// Locks a mutex whose last holder may have panicked.
///
/// Registers are valid one by one, so the worst that a half-done change leaves is a device that
/// its driver has to reset. A second panic would be worse: on the way out it would keep the
/// other devices from being shut down, and their disks from being flushed.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
