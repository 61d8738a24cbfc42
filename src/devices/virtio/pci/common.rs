//! The common configuration structure (section 4.1.4.3): feature negotiation, device status,
//! virtqueues.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::interrupt::{
    ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, PciInterrupt,
};
use crate::devices::GuestMemory;
use crate::devices::virtio::Interrupt;

pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
pub(super) const DEVICE_FEATURE: u64 = 0x04;
pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
pub(super) const DRIVER_FEATURE: u64 = 0x0c;
pub(super) const CONFIG_MSIX_VECTOR: u64 = 0x10;
pub(super) const NUM_QUEUES: u64 = 0x12;
pub(super) const DEVICE_STATUS: u64 = 0x14;
pub(super) const CONFIG_GENERATION: u64 = 0x15;
pub(super) const QUEUE_SELECT: u64 = 0x16;
pub(super) const QUEUE_SIZE: u64 = 0x18;
pub(super) const QUEUE_MSIX_VECTOR: u64 = 0x1a;
pub(super) const QUEUE_ENABLE: u64 = 0x1c;
pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
pub(super) const QUEUE_DESC: u64 = 0x20;
pub(super) const QUEUE_DRIVER: u64 = 0x28;
pub(super) const QUEUE_DEVICE: u64 = 0x30;
/// Length of the structure: without the fields of features that are not offered.
pub(super) const LEN: u64 = 0x38;

/// What a write asks of the transport.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Request {
    /// Nothing, it is done.
    Nothing,
    /// Reset the device, then call [`Common::reset`].
    Reset,
    /// The driver has just set these bits of the device status: tell the device.
    Tell(u8),
    /// Interrupts of an active device go elsewhere: tell the device.
    Remapped,
}

/// The registers of the common configuration, but for what is shared with the device's threads
/// ([`PciInterrupt`]).
pub(super) struct Common {
    offered: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    /// What the driver accepts, which may be more than was offered.
    accepted: u128,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// The registers of a virtqueue.
struct QueueRegisters {
    max_size: u16,
    size: u16,
    enabled: bool,
    /// Addresses of the descriptor, driver and device areas.
    areas: [u64; 3],
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        QueueRegisters {
            max_size,
            size: max_size,
            enabled: false,
            areas: [0; 3],
        }
    }
}

impl Common {
    /// A device that offers these features, with virtqueues of these sizes: powers of two, at
    /// most 32768 (section 2.7).
    pub(super) fn new(offered: u64, queue_max_sizes: &[u16]) -> Self {
        Common {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            accepted: 0,
            queue_select: 0,
            queues: queue_max_sizes
                .iter()
                .map(|size| QueueRegisters::new(*size))
                .collect(),
        }
    }

    /// Everything as it was at the start, the device having been reset.
    pub(super) fn reset(&mut self, interrupt: &PciInterrupt) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Common::new(self.offered, &sizes);
        interrupt.reset();
    }

    /// The features that were negotiated, once FEATURES_OK is set.
    pub(super) fn features(&self) -> u64 {
        self.accepted as u64 & self.offered
    }

    /// Reads registers. None of them changes by being read, so any width will do.
    pub(super) fn read(&self, interrupt: &PciInterrupt, offset: u64, data: &mut [u8]) {
        let mut registers = [0; LEN as usize];
        let mut put = |offset: u64, value: &[u8]| {
            let start = offset as usize;
            registers[start..start + value.len()].copy_from_slice(value);
        };
        let selected = self.queues.get(usize::from(self.queue_select));
        let notify_off = selected.map_or(0, |_| self.queue_select);
        let vector = interrupt.queue_vector(self.queue_select);
        let device_feature = word(self.offered.into(), self.device_feature_select);
        let driver_feature = word(self.accepted, self.driver_feature_select);
        put(
            DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        put(DEVICE_FEATURE, &device_feature.to_le_bytes());
        put(
            DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(DRIVER_FEATURE, &driver_feature.to_le_bytes());
        put(CONFIG_MSIX_VECTOR, &interrupt.config_vector().to_le_bytes());
        put(NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(DEVICE_STATUS, &[interrupt.status()]);
        put(CONFIG_GENERATION, &[interrupt.generation()]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        put(QUEUE_MSIX_VECTOR, &vector.to_le_bytes());
        put(QUEUE_NOTIFY_OFF, &notify_off.to_le_bytes());
        if let Some(queue) = selected {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            for (area, start) in queue
                .areas
                .iter()
                .zip([QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE])
            {
                put(start, &area.to_le_bytes());
            }
        }
        let wanted = registers.iter().skip(offset as usize);
        for (byte, register) in data.iter_mut().zip(wanted) {
            *byte = *register;
        }
    }

    /// Writes a register: a whole one, or half of a 64-bit one (section 4.1.3.1). A write of any
    /// other width or place is not one that a driver may make, and is dropped.
    pub(super) fn write(&mut self, interrupt: &PciInterrupt, offset: u64, data: &[u8]) -> Request {
        if let Ok([byte]) = <[u8; 1]>::try_from(data) {
            if offset == DEVICE_STATUS {
                return self.set_status(interrupt, byte);
            }
        } else if let Ok(bytes) = data.try_into() {
            let vector = interrupt.queue_vector(self.queue_select);
            let selected = self.queue_select;
            self.write_16(interrupt, offset, u16::from_le_bytes(bytes));
            let active = interrupt.status() & DRIVER_OK != 0;
            if active && interrupt.queue_vector(selected) != vector {
                return Request::Remapped;
            }
        } else if let Ok(bytes) = data.try_into() {
            self.write_32(interrupt, offset, u32::from_le_bytes(bytes));
        } else if let Ok(bytes) = <[u8; 8]>::try_from(data)
            && let Some(area) = self.area(interrupt, offset)
            && offset.is_multiple_of(8)
        {
            *area = u64::from_le_bytes(bytes);
        }
        Request::Nothing
    }

    fn write_16(&mut self, interrupt: &PciInterrupt, offset: u64, value: u16) {
        match offset {
            CONFIG_MSIX_VECTOR => interrupt.map_config(value),
            QUEUE_SELECT => self.queue_select = value,
            // Vectors say where interrupts go, not what the device does: they are never frozen.
            QUEUE_MSIX_VECTOR => interrupt.map_queue(self.queue_select, value),
            QUEUE_SIZE => {
                if let Some(queue) = self.unfrozen(interrupt)
                    && value.is_power_of_two()
                    && value <= queue.max_size
                {
                    queue.size = value;
                }
            }
            QUEUE_ENABLE => {
                if let Some(queue) = self.unfrozen(interrupt)
                    && value == 1
                {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write_32(&mut self, interrupt: &PciInterrupt, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            // Nothing is accepted any more after FEATURES_OK (section 3.1.1).
            DRIVER_FEATURE if interrupt.status() & FEATURES_OK == 0 => {
                if let Some(shift) = shift(self.driver_feature_select) {
                    self.accepted &= !(u128::from(u32::MAX) << shift);
                    self.accepted |= u128::from(value) << shift;
                }
            }
            _ => {
                if let Some(area) = self.area(interrupt, offset)
                    && offset.is_multiple_of(4)
                {
                    let shift = offset % 8 * 8;
                    *area = *area & !(0xffff_ffff << shift) | u64::from(value) << shift;
                }
            }
        }
    }

    /// The selected virtqueue, if its registers may be written still.
    fn unfrozen(&mut self, interrupt: &PciInterrupt) -> Option<&mut QueueRegisters> {
        let queue = self.queues.get_mut(usize::from(self.queue_select))?;
        (interrupt.status() & DRIVER_OK == 0 && !queue.enabled).then_some(queue)
    }

    /// The address register that holds the byte at `offset`, if it may be written still.
    fn area(&mut self, interrupt: &PciInterrupt, offset: u64) -> Option<&mut u64> {
        let index = offset.checked_sub(QUEUE_DESC)? / 8;
        self.unfrozen(interrupt)?.areas.get_mut(index as usize)
    }

    /// The driver writes the device status (section 2.1): 0 resets, other bits are only ever
    /// added.
    fn set_status(&mut self, interrupt: &PciInterrupt, value: u8) -> Request {
        if value == 0 {
            return Request::Reset;
        }
        let before = interrupt.status();
        let mut new = value & !before & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        if (before | new) & (FAILED | DEVICE_NEEDS_RESET) != 0 {
            // The way on leads through a reset.
            new &= !(FEATURES_OK | DRIVER_OK);
        }
        if new & FEATURES_OK != 0 && !self.acceptable() {
            new &= !FEATURES_OK;
        }
        if new & DRIVER_OK != 0 && (before | new) & FEATURES_OK == 0 {
            // A driver that goes on without an agreement would wait for an answer for ever.
            new &= !DRIVER_OK;
            interrupt.needs_reset();
        }
        interrupt.add_status(new);
        Request::Tell(new)
    }

    /// Whether the device can work with what the driver accepts: nothing that was not offered,
    /// and VERSION_1, without which this would be a legacy driver (sections 2.2.2 and 6.2).
    fn acceptable(&self) -> bool {
        let offered = u128::from(self.offered);
        self.accepted & !offered == 0 && self.accepted >> VIRTIO_F_VERSION_1 & 1 == 1
    }

    /// The virtqueues that the driver enabled, with their index; or the index of one whose rings
    /// are not aligned or not in guest memory (section 2.7).
    pub(super) fn enabled_queues(&self, memory: &GuestMemory) -> Result<Vec<(u16, Queue)>, u16> {
        let event_idx = self.features() >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        (0..)
            .zip(&self.queues)
            .filter(|(_, queue)| queue.enabled)
            .map(|(index, registers)| {
                let mut queue = ring(registers).map_err(|_| index)?;
                queue.set_event_idx(event_idx);
                queue.set_ready(true);
                if queue.is_valid(memory) {
                    Ok((index, queue))
                } else {
                    Err(index)
                }
            })
            .collect()
    }
}

fn ring(registers: &QueueRegisters) -> Result<Queue, virtio_queue::Error> {
    let [desc, driver, device] = registers.areas.map(GuestAddress);
    let mut queue = Queue::new(registers.max_size)?;
    queue.try_set_size(registers.size)?;
    queue.try_set_desc_table_address(desc)?;
    queue.try_set_avail_ring_address(driver)?;
    queue.try_set_used_ring_address(device)?;
    Ok(queue)
}

/// Where a feature window begins; the last of the four ends at bit 127.
fn shift(select: u32) -> Option<u32> {
    (select < 4).then(|| select * 32)
}

/// The 32 feature bits in a window, zero past the last.
fn word(features: u128, select: u32) -> u32 {
    shift(select).map_or(0, |shift| (features >> shift) as u32)
}
