//! A machine without processors: PCI bus, guest memory, one device.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, LazyLock, Mutex};

use formats::{Engine, Image};
use launcher::devices::pci::{ConfigPorts, PciBus, PciDevice, Window};
use launcher::devices::virtio::Device;
use launcher::devices::virtio::blk::{Blk, BlkHandle, BlkOptions};
use launcher::devices::virtio::pci::VirtioPci;
use launcher::devices::{BusDevice, GuestMemory, Hypervisor, Msi};
use tempfile::TempDir;
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

const WINDOW: std::ops::Range<u64> = 0xc000_0000..0xc020_0000;
/// The one device of the bus.
const FUNCTION: DeviceFunction = DeviceFunction {
    bus: 0,
    device: 1,
    function: 0,
};

/// Guest memory of all machines: the driver's [`Hal`] has no place for one of its own.
struct Memory {
    guest: Arc<GuestMemory>,
    /// Free pages: first, and how many.
    free: Mutex<BTreeMap<u64, u64>>,
}

static MEMORY: LazyLock<Memory> = LazyLock::new(|| {
    const PAGES: u64 = 64 << 8;
    let len = PAGES as usize * PAGE_SIZE;
    Memory {
        guest: Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), len)]).unwrap()),
        // To the driver, page 0 is none.
        free: Mutex::new([(1, PAGES - 1)].into()),
    }
});

impl Memory {
    fn allocate(&self, pages: usize) -> PhysAddr {
        let mut free = self.free.lock().unwrap();
        let pages = pages as u64;
        let fits = free.iter().find(|(_, len)| **len >= pages);
        let (first, len) = fits.map(|(first, len)| (*first, *len)).unwrap();
        free.remove(&first);
        if len > pages {
            free.insert(first + pages, len - pages);
        }
        first * PAGE_SIZE as u64
    }

    fn free(&self, address: PhysAddr, pages: usize) {
        let first = address / PAGE_SIZE as u64;
        self.free.lock().unwrap().insert(first, pages as u64);
    }
}

/// The driver's way to guest memory: buffers are copied in and out, as it would with an IOMMU.
pub(crate) struct GuestHal;

// SAFETY: pages come from guest memory, which lives as long as the process; no two allocations
// share one, and they are zeroed.
unsafe impl Hal for GuestHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let address = MEMORY.allocate(pages);
        let zeroes = vec![0; pages * PAGE_SIZE];
        let at = GuestAddress(address);
        MEMORY.guest.write_slice(&zeroes, at).unwrap();
        let host = MEMORY.guest.get_host_address(at).unwrap();
        (address, NonNull::new(host).unwrap())
    }

    unsafe fn dma_dealloc(address: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        MEMORY.free(address, pages);
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("registers are not memory here");
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let address = MEMORY.allocate(buffer.len().div_ceil(PAGE_SIZE));
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller promises a valid buffer that nobody writes to meanwhile.
            let bytes = unsafe { buffer.as_ref() };
            let at = GuestAddress(address);
            MEMORY.guest.write_slice(bytes, at).unwrap();
        }
        address
    }

    unsafe fn unshare(address: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: the caller promises a valid buffer that nobody else uses meanwhile.
            let bytes = unsafe { buffer.as_mut() };
            let at = GuestAddress(address);
            MEMORY.guest.read_slice(bytes, at).unwrap();
        }
        MEMORY.free(address, buffer.len().div_ceil(PAGE_SIZE));
    }
}

/// A hypervisor whose doorbells all exit, and whose interrupts go nowhere: this driver polls.
struct NoHypervisor;

struct NoMsi(EventFd);

impl Msi for NoMsi {
    fn route(&self, _: u64, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn unroute(&self) -> io::Result<()> {
        Ok(())
    }

    fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

impl Hypervisor for NoHypervisor {
    fn msi(&self) -> io::Result<Box<dyn Msi>> {
        Ok(Box::new(NoMsi(EventFd::new(0)?)))
    }

    fn add_doorbell(&self, _: u64, _: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn remove_doorbell(&self, _: u64, _: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

/// A machine with one device.
pub(crate) struct Machine {
    ports: Arc<ConfigPorts>,
    window: Arc<Window>,
    transport: Arc<VirtioPci>,
}

impl Machine {
    pub(crate) fn new(device: impl Device + 'static) -> Machine {
        let device = Arc::new(Mutex::new(device));
        let memory = Arc::clone(&MEMORY.guest);
        let transport = VirtioPci::new(device, memory, Arc::new(NoHypervisor)).unwrap();
        let transport = Arc::new(transport);
        let mut bus = PciBus::new(WINDOW, 1);
        bus.add(Arc::clone(&transport) as _).unwrap();
        let bus = Arc::new(bus);
        Machine {
            ports: Arc::new(ConfigPorts::new(Arc::clone(&bus))),
            window: Arc::new(Window::new(bus)),
            transport,
        }
    }

    /// The driver's view of the bus.
    pub(crate) fn root(&self) -> PciRoot<Ports> {
        PciRoot::new(Ports(Arc::clone(&self.ports)))
    }

    /// The device's registers, found as a driver finds them.
    pub(crate) fn registers(&self) -> Registers {
        let mut root = self.root();
        let bar = root.bar_info(FUNCTION, 0).unwrap().unwrap();
        let (bar, len) = bar.memory_address_size().unwrap();
        assert!(WINDOW.start <= bar && bar + len <= WINDOW.end);
        let ports = Ports(Arc::clone(&self.ports));
        let mut structures = [None; 5];
        let mut multiplier = 0;
        for capability in root.capabilities(FUNCTION).filter(|it| it.id == 9) {
            let word = |offset| u64::from(ports.read_word(FUNCTION, capability.offset + offset));
            let cfg_type = usize::from(capability.private_header >> 8);
            let (start, size) = (word(8), word(12));
            assert_eq!(word(4) & 0xff, 0, "all is in BAR 0");
            assert!(start + size <= len);
            if cfg_type == 2 {
                multiplier = word(16);
            }
            if let Some(structure) = structures.get_mut(cfg_type) {
                structure.get_or_insert(bar - WINDOW.start + start);
            }
        }
        let id = ports.read_word(FUNCTION, 0) >> 16;
        Registers {
            window: Arc::clone(&self.window),
            device_type: DeviceType::try_from((id - 0x1040) as u8).unwrap(),
            common: structures[1].unwrap(),
            notify: structures[2].unwrap(),
            isr: structures[3].unwrap(),
            device: structures[4].unwrap(),
            multiplier,
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.transport.shutdown();
    }
}

/// Configuration mechanism #1.
pub(crate) struct Ports(Arc<ConfigPorts>);

impl Ports {
    fn select(&self, function: DeviceFunction, register: u8) {
        let DeviceFunction {
            bus,
            device,
            function,
        } = function;
        let address = 1 << 31
            | u32::from(bus) << 16
            | u32::from(device) << 11
            | u32::from(function) << 8
            | u32::from(register);
        self.0.write(0, &address.to_le_bytes());
    }
}

impl ConfigurationAccess for Ports {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        let mut data = [0; 4];
        self.select(function, register);
        self.0.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        self.select(function, register);
        self.0.write(4, &data.to_le_bytes());
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Ports(Arc::clone(&self.0))
    }
}

/// The structures of section 4.1.4, by their offsets in the window.
pub(crate) struct Registers {
    window: Arc<Window>,
    device_type: DeviceType,
    common: u64,
    notify: u64,
    isr: u64,
    device: u64,
    multiplier: u64,
}

/// Fields of `struct virtio_pci_common_cfg` (section 4.1.4.3).
mod field {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(super) const DEVICE_FEATURE: u64 = 4;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(super) const DRIVER_FEATURE: u64 = 12;
    pub(super) const DEVICE_STATUS: u64 = 20;
    pub(super) const CONFIG_GENERATION: u64 = 21;
    pub(super) const QUEUE_SELECT: u64 = 22;
    pub(super) const QUEUE_SIZE: u64 = 24;
    pub(super) const QUEUE_ENABLE: u64 = 28;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 30;
    pub(super) const QUEUE_DESC: u64 = 32;
    pub(super) const QUEUE_DRIVER: u64 = 40;
    pub(super) const QUEUE_DEVICE: u64 = 48;
}

impl Registers {
    fn get<const N: usize>(&self, field: u64) -> [u8; N] {
        let mut data = [0; N];
        self.window.read(self.common + field, &mut data);
        data
    }

    fn set(&self, field: u64, data: &[u8]) {
        self.window.write(self.common + field, data);
    }

    fn queue_u16(&self, queue: u16, field: u64) -> u16 {
        self.set(field::QUEUE_SELECT, &queue.to_le_bytes());
        u16::from_le_bytes(self.get(field))
    }
}

impl Transport for Registers {
    fn device_type(&self) -> DeviceType {
        self.device_type
    }

    fn read_device_features(&mut self) -> u64 {
        let word = |select: u32| {
            self.set(field::DEVICE_FEATURE_SELECT, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.get(field::DEVICE_FEATURE)))
        };
        word(0) | word(1) << 32
    }

    fn write_driver_features(&mut self, features: u64) {
        for (select, word) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.set(field::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            self.set(field::DRIVER_FEATURE, &word.to_le_bytes());
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.queue_u16(queue, field::QUEUE_SIZE).into()
    }

    fn notify(&mut self, queue: u16) {
        let offset = u64::from(self.queue_u16(queue, field::QUEUE_NOTIFY_OFF)) * self.multiplier;
        self.window
            .write(self.notify + offset, &queue.to_le_bytes());
    }

    fn get_status(&self) -> DeviceStatus {
        let [status] = self.get(field::DEVICE_STATUS);
        DeviceStatus::from_bits_retain(status.into())
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.set(field::DEVICE_STATUS, &[status.bits() as u8]);
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.set(field::QUEUE_SELECT, &queue.to_le_bytes());
        self.set(field::QUEUE_SIZE, &(size as u16).to_le_bytes());
        self.set(field::QUEUE_DESC, &descriptors.to_le_bytes());
        self.set(field::QUEUE_DRIVER, &driver_area.to_le_bytes());
        self.set(field::QUEUE_DEVICE, &device_area.to_le_bytes());
        self.set(field::QUEUE_ENABLE, &1u16.to_le_bytes());
    }

    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, queue: u16) -> bool {
        self.queue_u16(queue, field::QUEUE_ENABLE) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let mut isr = [0];
        self.window.read(self.isr, &mut isr);
        InterruptStatus::from_bits_retain(isr[0].into())
    }

    fn read_config_generation(&self) -> u32 {
        let [generation] = self.get(field::CONFIG_GENERATION);
        generation.into()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes();
        self.window.read(self.device + offset as u64, bytes);
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<()> {
        let bytes = value.as_bytes();
        self.window.write(self.device + offset as u64, bytes);
        Ok(())
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // Nothing of the driver's may be touched from here on.
        self.set_status(DeviceStatus::empty());
        assert_eq!(self.get_status(), DeviceStatus::empty());
    }
}

/// An image on the host, and how it is shown to the guest.
pub(crate) struct Disk {
    pub(crate) format: &'static str,
    pub(crate) engine: Engine,
    pub(crate) ro: bool,
    dir: TempDir,
}

impl Disk {
    /// An image of these bytes.
    pub(crate) fn new(bytes: &[u8]) -> Disk {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("disk.img"), bytes).unwrap();
        Disk {
            format: "sparse-raw",
            engine: Engine::Auto,
            ro: false,
            dir,
        }
    }

    /// A machine that has it.
    pub(crate) fn plug(&self) -> (Machine, BlkHandle) {
        let image = Image {
            ro: self.ro,
            sparse: self.format != "raw",
            ..Image::new(self.dir.path().join("disk.img"))
        };
        let blk = Blk::open(BlkOptions {
            image,
            format: formats::find(self.format).unwrap(),
            ephemeral: false,
            id: Some("SECOND DRIVER".into()),
            queues: 1,
            engine: self.engine,
            poll: None,
            cpus: Vec::new(),
        });
        let blk = blk.unwrap();
        let handle = blk.handle();
        (Machine::new(blk), handle)
    }

    pub(crate) fn file(&self) -> File {
        File::open(self.dir.path().join("disk.img")).unwrap()
    }

    /// What the host has.
    pub(crate) fn image(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("disk.img")).unwrap()
    }
}
