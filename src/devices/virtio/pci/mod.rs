//! Virtio over the PCI bus (virtio 1.3 section 4.1): the modern transport, with MSI-X only.

mod capabilities;
mod common;
mod doorbells;
mod interrupt;

use std::io;
use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use tracing::warn;
use virtio_bindings::virtio_config::{
    VIRTIO_F_ADMIN_VQ, VIRTIO_F_NOTIF_CONFIG_DATA, VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_RING_PACKED, VIRTIO_F_RING_RESET, VIRTIO_F_SR_IOV,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::devices::pci::config::{BAR0, COMMAND, ConfigSpace};
use crate::devices::pci::msix::Msix;
use crate::devices::pci::{PciAddress, PciDevice, lock};
use crate::devices::throttle::Throttle;
use crate::devices::virtio::{Activation, ActiveQueue, Device, Interrupt};
use crate::devices::{GuestMemory, Hypervisor};
use crate::{Error, Result};
use capabilities::{
    BAR_LEN, COMMON, DEVICE, ISR, MAX_QUEUES, MAX_VECTORS, MSIX_PENDING, MSIX_TABLE, NOTIFY,
    Offsets, PAGE,
};
use common::{Common, Request};
use doorbells::Doorbells;
use interrupt::{DRIVER_OK, FEATURES_OK, PciInterrupt, Unplugged};

/// Features that would change this transport, which does not have them, whatever a device says.
const NOT_OFFERED: u64 = 1 << VIRTIO_F_RING_PACKED
    | 1 << VIRTIO_F_SR_IOV
    | 1 << VIRTIO_F_NOTIFICATION_DATA
    | 1 << VIRTIO_F_NOTIF_CONFIG_DATA
    | 1 << VIRTIO_F_RING_RESET
    | 1 << VIRTIO_F_ADMIN_VQ;

/// A virtio device on the PCI bus.
///
/// Locks are taken in this order: configuration space, state, device, MSI-X table. What a
/// device's threads call ([`Interrupt`]) takes at most the last.
///
/// The bus master bit is a plain register bit: a device whose driver forgot it works.
pub struct VirtioPci {
    device_type: u32,
    device: Arc<Mutex<dyn Device>>,
    memory: Arc<GuestMemory>,
    interrupt: Arc<PciInterrupt>,
    /// Address on the bus, and the window in which the BAR may answer.
    place: OnceLock<(PciAddress, Range<u64>)>,
    config: Mutex<ConfigSpace>,
    offsets: Offsets,
    /// Where the BAR answers, [`NOWHERE`] if it does not. Changed under the configuration
    /// space's lock.
    bar: AtomicU64,
    state: Mutex<State>,
    warnings: Throttle,
}

/// Largest size of a virtqueue (section 2.7).
const MAX_QUEUE_SIZE: u16 = 1 << 15;
const NOWHERE: u64 = u64::MAX;

struct State {
    common: Common,
    doorbells: Doorbells,
    /// The device belongs to this machine no longer.
    unplugged: bool,
}

impl VirtioPci {
    /// The transport of `device`, with interrupts of its own: the device is told of them.
    ///
    /// A device is in one machine at a time: the transport of the last one must have been shut
    /// down, or dropped, before.
    ///
    /// Fails if the device has a type without PCI device ID, too many virtqueues, or one of a
    /// size that is not a power of two.
    pub fn new(
        device: Arc<Mutex<dyn Device>>,
        memory: Arc<GuestMemory>,
        hypervisor: Arc<dyn Hypervisor>,
    ) -> Result<Self> {
        let (device_type, features, sizes) = {
            let device = lock(&device);
            (
                device.device_type(),
                device.features(),
                device.queue_max_sizes(),
            )
        };
        if sizes.len() > MAX_QUEUES {
            return Err(Error::failed(format!(
                "virtio device type {device_type} has {} virtqueues, expected at most {MAX_QUEUES}",
                sizes.len()
            )));
        }
        let odd = |size: &&u16| !size.is_power_of_two() || **size > MAX_QUEUE_SIZE;
        if let Some(size) = sizes.iter().find(odd) {
            return Err(Error::failed(format!(
                "virtio device type {device_type} has a virtqueue of size {size}, expected a \
                 power of two, at most {MAX_QUEUE_SIZE}"
            )));
        }
        // A vector for each virtqueue and one for configuration changes.
        let vectors = MAX_VECTORS.min(sizes.len() as u16 + 1);
        let msix = Msix::new(vectors, hypervisor.clone());
        let (config, offsets) = capabilities::config_space(device_type, sizes.len(), &msix)?;
        let interrupt = Arc::new(PciInterrupt::new(sizes.len(), msix));
        lock(&device).connect(interrupt.clone());
        Ok(VirtioPci {
            device_type,
            device,
            memory,
            interrupt,
            place: OnceLock::new(),
            config: Mutex::new(config),
            offsets,
            bar: AtomicU64::new(NOWHERE),
            state: Mutex::new(State {
                common: Common::new(features & !NOT_OFFERED, &sizes),
                doorbells: Doorbells::new(hypervisor),
                unplugged: false,
            }),
            warnings: Throttle::default(),
        })
    }

    /// Section 2.4.1. The status reads 0 when all else is done.
    fn reset(&self, state: &mut State) {
        state.doorbells.stop();
        lock(&self.device).reset();
        state.common.reset(&self.interrupt);
    }

    /// Hands the virtqueues to the device: the driver has set DRIVER_OK.
    fn activate(&self, state: &mut State) -> io::Result<()> {
        let enabled = state.common.enabled_queues(&self.memory).map_err(|index| {
            let problem = format!("the rings of virtqueue {index} are not in guest memory");
            io::Error::new(io::ErrorKind::InvalidInput, problem)
        })?;
        let mut doorbells = Vec::with_capacity(enabled.len());
        let mut queues = Vec::with_capacity(enabled.len());
        for (index, queue) in enabled {
            // Blocking: so io_uring can read it at once, without a poll before.
            let kick = EventFd::new(EFD_CLOEXEC)?;
            doorbells.push((index, kick.try_clone()?));
            queues.push(ActiveQueue {
                index,
                queue,
                kick,
                record: None,
            });
        }
        state.doorbells.start(doorbells);
        let interrupt: Arc<dyn Interrupt> = self.interrupt.clone();
        lock(&self.device).activate(Activation {
            memory: self.memory.clone(),
            features: state.common.features(),
            queues,
            interrupt,
        })
    }

    fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) {
        match state.common.write(&self.interrupt, offset, data) {
            Request::Nothing => {}
            Request::Reset => self.reset(state),
            Request::Remapped => lock(&self.device).remapped(),
            Request::Tell(status) => {
                if status & FEATURES_OK != 0 {
                    lock(&self.device).negotiated(state.common.features());
                }
                if status & DRIVER_OK != 0
                    && let Err(error) = self.activate(state)
                {
                    state.doorbells.stop();
                    self.interrupt.needs_reset();
                    self.warn(&error);
                }
            }
        }
    }

    fn warn(&self, error: &io::Error) {
        if let Some(held_back) = self.warnings.pass() {
            let device_type = self.device_type;
            let pci = self.place.get().map(|(address, _)| address.to_string());
            warn!(device_type, pci, %error, held_back, "a virtio device needs a reset");
        }
    }

    /// Follows what the guest has written to the configuration space.
    fn apply_decoding(&self, config: &ConfigSpace) {
        let decoded = self
            .place
            .get()
            .and_then(|(_, window)| config.decoded(window))
            .map(|range| range.start);
        let bar = decoded.unwrap_or(NOWHERE);
        if self.bar.swap(bar, Ordering::SeqCst) != bar {
            lock(&self.state).doorbells.move_to(decoded);
        }
    }
}

impl PciDevice for VirtioPci {
    fn plug(&self, address: PciAddress, window: Range<u64>) {
        // Called once; a second place would be refused.
        let _ = self.place.set((address, window));
    }

    fn read_config(&self, offset: u8, data: &mut [u8]) {
        let mut config = lock(&self.config);
        if self.offsets.touches_pci_cfg_data(offset, data.len())
            && let Some((bar_offset, len)) = self.offsets.pci_cfg_window(&config)
        {
            let mut window = [0; 4];
            let (window, _) = window.split_at_mut(len);
            self.read_bar(bar_offset, window);
            config.set(self.offsets.pci_cfg_data(), window);
        }
        config.read(offset, data);
    }

    fn write_config(&self, offset: u8, data: &[u8]) {
        let mut config = lock(&self.config);
        config.write(offset, data);
        if self.offsets.touches_msix_control(offset, data.len()) {
            let control = config.u16(self.offsets.msix_control());
            let before = self.interrupt.msix.enabled();
            self.interrupt.msix.set_control(control);
            let state = lock(&self.state);
            if self.interrupt.msix.enabled() != before
                && self.interrupt.status() & DRIVER_OK != 0
                && !state.unplugged
            {
                lock(&self.device).remapped();
            }
        }
        if matches!(offset & !3, COMMAND | BAR0) {
            self.apply_decoding(&config);
        }
        if self.offsets.touches_pci_cfg_data(offset, data.len())
            && let Some((bar_offset, len)) = self.offsets.pci_cfg_window(&config)
        {
            let window = config.u32(self.offsets.pci_cfg_data()).to_le_bytes();
            self.write_bar(bar_offset, window.split_at(len).0);
        }
    }

    fn decoded(&self) -> Option<Range<u64>> {
        let bar = self.bar.load(Ordering::SeqCst);
        (bar != NOWHERE).then(|| bar..bar + BAR_LEN)
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (page, offset) = (offset / PAGE, offset % PAGE);
        match page {
            COMMON => lock(&self.state).common.read(&self.interrupt, offset, data),
            ISR => {
                if let (0, Some(status)) = (offset, data.first_mut()) {
                    *status = self.interrupt.take_isr();
                }
            }
            DEVICE => {
                let state = lock(&self.state);
                if !state.unplugged {
                    lock(&self.device).read_config(offset, data);
                    self.interrupt.config_was_read();
                }
            }
            MSIX_TABLE => self.interrupt.msix.read_table(offset, data),
            MSIX_PENDING => self.interrupt.msix.read_pending(offset, data),
            _ => {}
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        let (page, offset) = (offset / PAGE, offset % PAGE);
        if page == MSIX_TABLE {
            return self.interrupt.msix.write_table(offset, data);
        }
        let mut state = lock(&self.state);
        if state.unplugged {
            return;
        }
        match page {
            COMMON => self.write_common(&mut state, offset, data),
            DEVICE => lock(&self.device).write_config(offset, data),
            NOTIFY => state.doorbells.ring(offset),
            _ => {}
        }
    }

    fn shutdown(&self) {
        let mut state = lock(&self.state);
        if mem::replace(&mut state.unplugged, true) {
            return;
        }
        self.reset(&mut state);
        self.interrupt.msix.set_control(0);
        // Our interrupts, and the hypervisor's things in them, end with this machine.
        lock(&self.device).connect(Arc::new(Unplugged));
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.shutdown();
    }
}

#[cfg(test)]
mod tests;
