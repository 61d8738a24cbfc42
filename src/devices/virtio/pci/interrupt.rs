//! What a device's threads share with the transport: the interrupts, the status, the generation
//! of the configuration space.
//!
//! All of it is outside of the transport's locks. A vCPU that resets the device holds those locks
//! while it waits for the device's threads, and these may be about to interrupt the driver.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::devices::pci::msix::Msix;
use crate::devices::virtio::Interrupt;

/// Value of a vector register: the event is not mapped to a vector (section 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// Device status: the driver has noticed the device (section 2.1).
pub(super) const ACKNOWLEDGE: u8 = 1;
/// Device status: the driver can drive the device.
pub(super) const DRIVER: u8 = 2;
/// Device status: the driver is ready.
pub(super) const DRIVER_OK: u8 = 4;
/// Device status: feature negotiation is complete.
pub(super) const FEATURES_OK: u8 = 8;
/// Device status: only a reset gets the device going again.
pub(super) const DEVICE_NEEDS_RESET: u8 = 64;
/// Device status: the driver has given up.
pub(super) const FAILED: u8 = 128;
/// ISR status: an interrupt of a virtqueue (section 4.1.4.5).
const ISR_QUEUE: u8 = 1;
/// ISR status: a configuration change.
const ISR_CONFIG: u8 = 2;
/// Bit beside the generation: the configuration space has changed since the driver last read it.
const CHANGED: u16 = 1 << 8;

/// How a device on the PCI bus interrupts its driver (section 4.1.5).
pub(super) struct PciInterrupt {
    pub(super) msix: Msix,
    queue_vectors: Box<[AtomicU16]>,
    config_vector: AtomicU16,
    isr: AtomicU8,
    /// The generation in the low 8 bits, and [`CHANGED`].
    generation: AtomicU16,
    status: AtomicU8,
}

impl PciInterrupt {
    /// The interrupts of a device with `queues` virtqueues, none mapped to a vector.
    pub(super) fn new(queues: usize, msix: Msix) -> Self {
        PciInterrupt {
            msix,
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            generation: AtomicU16::new(0),
            status: AtomicU8::new(0),
        }
    }

    /// Maps the interrupts of a virtqueue to `vector`; to none, if that cannot be had.
    pub(super) fn map_queue(&self, queue: u16, vector: u16) {
        if let Some(mapped) = self.queue_vectors.get(usize::from(queue)) {
            mapped.store(self.claimed(vector), Ordering::SeqCst);
        }
    }

    /// Maps configuration changes to `vector`; to none, if that cannot be had.
    pub(super) fn map_config(&self, vector: u16) {
        self.config_vector
            .store(self.claimed(vector), Ordering::SeqCst);
    }

    fn claimed(&self, vector: u16) -> u16 {
        if vector != NO_VECTOR && self.msix.claim(vector) {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// The vector of a virtqueue, or NO_VECTOR.
    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        let mapped = self.queue_vectors.get(usize::from(queue));
        mapped.map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// The vector of configuration changes, or NO_VECTOR.
    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    /// The driver reads the ISR status, which resets it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// The device status.
    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Sets bits of the device status.
    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// The generation that the driver reads: the next one as soon as there is a change, but no
    /// further until the driver has seen it. So 256 changes do not look like none.
    pub(super) fn generation(&self) -> u8 {
        let generation = self.generation.load(Ordering::SeqCst);
        let changed = generation & CHANGED != 0;
        (generation as u8).wrapping_add(changed.into())
    }

    /// The driver has read the configuration space: the next change is news again.
    pub(super) fn config_was_read(&self) {
        let seen = |generation: u16| {
            let changed = generation & CHANGED != 0;
            changed.then_some(u16::from((generation as u8).wrapping_add(1)))
        };
        // Unchanged is an error to `fetch_update`, and nothing to do.
        let _ = self
            .generation
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, seen);
    }

    /// The device was reset: no event is mapped, none is pending, and the status reads 0.
    pub(super) fn reset(&self) {
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.msix.clear_pending();
        self.isr.store(0, Ordering::SeqCst);
        // Last: a driver that reads 0 finds the reset complete (section 2.4).
        self.status.store(0, Ordering::SeqCst);
    }

    fn notify_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        let vector = self.config_vector();
        if vector != NO_VECTOR {
            self.msix.signal(vector);
        }
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        if !self.msix.enabled() {
            self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
            return;
        }
        let vector = self.queue_vector(index);
        if vector != NO_VECTOR {
            self.msix.signal(vector);
        }
    }

    fn eventfd(&self, index: u16) -> Option<EventFd> {
        match self.queue_vector(index) {
            NO_VECTOR => None,
            vector => self.msix.eventfd(vector),
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_or(CHANGED, Ordering::SeqCst);
        self.notify_config();
    }

    fn needs_reset(&self) {
        let before = self.status.fetch_or(DEVICE_NEEDS_RESET, Ordering::SeqCst);
        // Before DRIVER_OK there is nobody to tell, and once is enough (section 2.1.2).
        if before & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK {
            self.notify_config();
        }
    }
}

/// The interrupts of a device that is plugged into no machine: nobody listens. A change of its
/// configuration space is found by the driver of the next machine anyway.
pub(super) struct Unplugged;

impl Interrupt for Unplugged {
    fn queue(&self, _index: u16) {}

    fn config_changed(&self) {}

    fn needs_reset(&self) {}
}
