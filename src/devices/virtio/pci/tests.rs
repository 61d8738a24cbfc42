//! A device and a machine to drive it in, as a kernel does. Sections are those of virtio 1.3.

mod hostile;
mod interrupts;
mod layout;
mod life;
mod negotiation;
mod notifications;
mod queues;

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddress;

use super::*;
use crate::devices::BusDevice;
use crate::devices::pci::fake::{FakeHypervisor, FakeMsi};
use crate::devices::pci::{ConfigPorts, PciBus, Window};

const WINDOW: Range<u64> = 0xc000_0000..0xc020_0000;
const MEMORY_LEN: usize = 0x10_0000;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// What [`FakeDevice`] offers: bits 3 and 60 stand for features of the device.
const OFFERED: u64 = VERSION_1 | EVENT_IDX | 1 << 3 | 1 << 60;

/// A device that records what the transport tells it.
struct FakeDevice {
    device_type: u32,
    features: u64,
    sizes: Vec<u16>,
    config: Vec<u8>,
    refuse: bool,
    interrupt: Option<Arc<dyn Interrupt>>,
    activation: Option<Activation>,
    activations: usize,
    /// What each negotiation came to.
    negotiated: Vec<u64>,
    resets: usize,
    remapped: usize,
    /// Stands for stopping the device's thread.
    on_reset: Box<dyn FnMut() + Send>,
}

impl Device for FakeDevice {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        self.sizes.clone()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, index) in data.iter_mut().zip(offset as usize..) {
            *byte = self.config.get(index).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let writable = self.config.iter_mut().skip(offset as usize);
        for (register, byte) in writable.zip(data) {
            *register = *byte;
        }
    }

    fn negotiated(&mut self, features: u64) {
        assert!(self.activation.is_none(), "active already");
        self.negotiated.push(features);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        if self.refuse {
            return Err(io::Error::other("refused by the test"));
        }
        assert!(self.activation.is_none(), "active already");
        self.activations += 1;
        self.activation = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        (self.on_reset)();
        self.resets += 1;
        self.activation = None;
    }

    fn connect(&mut self, interrupt: Arc<dyn Interrupt>) {
        self.interrupt = Some(interrupt);
    }

    fn remapped(&mut self) {
        assert!(self.activation.is_some(), "not active");
        self.remapped += 1;
    }
}

fn device(device_type: u32, sizes: &[u16]) -> Arc<Mutex<FakeDevice>> {
    Arc::new(Mutex::new(FakeDevice {
        device_type,
        features: OFFERED,
        sizes: sizes.to_vec(),
        config: (0..16).collect(),
        refuse: false,
        interrupt: None,
        activation: None,
        activations: 0,
        negotiated: Vec::new(),
        resets: 0,
        remapped: 0,
        on_reset: Box::new(|| {}),
    }))
}

/// A machine with one device, in slot 1.
struct Machine {
    hypervisor: Arc<FakeHypervisor>,
    device: Arc<Mutex<FakeDevice>>,
    bus: Arc<PciBus>,
    ports: ConfigPorts,
    window: Window,
    /// Where the BAR is.
    bar: u64,
}

impl Machine {
    /// A machine with a block device of two virtqueues.
    fn new() -> Self {
        Machine::with(device(2, &[256, 128]))
    }

    fn with(device: Arc<Mutex<FakeDevice>>) -> Self {
        let hypervisor = Arc::new(FakeHypervisor::default());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
        let transport =
            VirtioPci::new(device.clone(), Arc::new(memory), hypervisor.clone()).unwrap();
        let mut bus = PciBus::new(WINDOW, 1);
        bus.add(Arc::new(transport)).unwrap();
        let bus = Arc::new(bus);
        let mut machine = Machine {
            hypervisor,
            device,
            ports: ConfigPorts::new(bus.clone()),
            window: Window::new(bus.clone()),
            bus,
            bar: 0,
        };
        machine.bar = u64::from(machine.config(BAR0));
        machine
    }

    /// Reads a dword of the device's configuration space.
    fn config(&self, offset: u8) -> u32 {
        let mut data = [0; 4];
        self.select_config(offset);
        self.ports.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    fn config_u8(&self, offset: u8) -> u8 {
        (self.config(offset & !3) >> (8 * (offset & 3))) as u8
    }

    fn write_config(&self, offset: u8, data: &[u8]) {
        self.select_config(offset);
        self.ports.write(4 + u64::from(offset & 3), data);
    }

    fn select_config(&self, offset: u8) {
        let address = 0x8000_0800 | u32::from(offset & !3);
        self.ports.write(0, &address.to_le_bytes());
    }

    fn read<const N: usize>(&self, page: u64, offset: u64) -> [u8; N] {
        let mut data = [0x55; N];
        let address = self.bar + page * PAGE + offset;
        self.window.read(address - WINDOW.start, &mut data);
        data
    }

    fn write(&self, page: u64, offset: u64, data: &[u8]) {
        let address = self.bar + page * PAGE + offset;
        self.window.write(address - WINDOW.start, data);
    }

    fn common_u8(&self, offset: u64) -> u8 {
        self.read::<1>(COMMON, offset)[0]
    }

    fn common_u16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(COMMON, offset))
    }

    fn common_u32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(COMMON, offset))
    }

    fn set_u16(&self, offset: u64, value: u16) {
        self.write(COMMON, offset, &value.to_le_bytes());
    }

    fn set_u32(&self, offset: u64, value: u32) {
        self.write(COMMON, offset, &value.to_le_bytes());
    }

    fn status(&self) -> u8 {
        self.common_u8(common::DEVICE_STATUS)
    }

    fn set_status(&self, value: u8) {
        self.write(COMMON, common::DEVICE_STATUS, &[value]);
    }

    /// Steps 1 to 6 of section 3.1.1; returns the status.
    fn negotiate(&self, features: u64) -> u8 {
        self.set_status(0);
        self.set_status(1);
        self.set_status(1 | 2);
        self.accept(features);
        self.set_status(1 | 2 | 8);
        self.status()
    }

    fn accept(&self, features: u64) {
        for (select, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set_u32(common::DRIVER_FEATURE_SELECT, select);
            self.set_u32(common::DRIVER_FEATURE, word);
        }
    }

    /// Sets up and enables a virtqueue of 64 entries.
    fn enable_queue(&self, index: u16) {
        self.set_u16(common::QUEUE_SELECT, index);
        self.set_u16(common::QUEUE_SIZE, 64);
        let start = 0x1_0000 + 0x4000 * u64::from(index);
        for (register, offset) in [
            (common::QUEUE_DESC, 0),
            (common::QUEUE_DRIVER, 0x1000),
            (common::QUEUE_DEVICE, 0x2000),
        ] {
            self.write(COMMON, register, &(start + offset).to_le_bytes());
        }
        self.set_u16(common::QUEUE_ENABLE, 1);
    }

    /// The whole of section 3.1.1, with both virtqueues.
    fn drive(&self) {
        assert_eq!(self.negotiate(VERSION_1 | EVENT_IDX), 1 | 2 | 8);
        self.enable_queue(0);
        self.enable_queue(1);
        self.set_status(1 | 2 | 4 | 8);
        assert_eq!(self.status(), 1 | 2 | 4 | 8);
    }

    /// Turns MSI-X on, and maps configuration changes to vector 0 and virtqueues to the next
    /// ones. Returns the hypervisor's interrupts in the same order.
    fn map_vectors(&self, queues: u16) -> Vec<Arc<FakeMsi>> {
        self.set_msix_control(0x8000);
        self.set_u16(common::CONFIG_MSIX_VECTOR, 0);
        for queue in 0..queues {
            self.set_u16(common::QUEUE_SELECT, queue);
            self.set_u16(common::QUEUE_MSIX_VECTOR, queue + 1);
        }
        for vector in 0..=u64::from(queues) {
            self.write(MSIX_TABLE, 16 * vector, &0xfee0_1000u64.to_le_bytes());
            self.write(MSIX_TABLE, 16 * vector + 8, &(0x40 + vector).to_le_bytes());
        }
        self.hypervisor.msis.lock().unwrap().clone()
    }

    fn set_msix_control(&self, control: u16) {
        let capability = self.capability(0x11, None);
        self.write_config(capability + 2, &control.to_le_bytes());
    }

    /// Offset of a capability in the list.
    fn capability(&self, id: u8, cfg_type: Option<u8>) -> u8 {
        let mut offset = self.config_u8(0x34);
        while offset != 0 {
            let found = self.config_u8(offset) == id
                && cfg_type.is_none_or(|cfg_type| self.config_u8(offset + 3) == cfg_type);
            if found {
                return offset;
            }
            offset = self.config_u8(offset + 1);
        }
        panic!("no capability {id:#x} {cfg_type:?}");
    }

    /// The interrupt that the device was given.
    fn interrupt(&self) -> Arc<dyn Interrupt> {
        lock(&self.device).interrupt.clone().unwrap()
    }

    fn resets(&self) -> usize {
        lock(&self.device).resets
    }

    fn is_active(&self) -> bool {
        lock(&self.device).activation.is_some()
    }
}
