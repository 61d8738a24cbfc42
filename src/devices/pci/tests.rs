//! Sections are those of PCI 3.0.

use super::*;

/// The window of these tests: room for 249 BARs of a page.
const WINDOW: Range<u64> = 0xc000_0000..0xc010_0000;

/// A function with a BAR of a page that reads as the function's number and remembers writes.
struct Probe {
    config: Mutex<ConfigSpace>,
    number: u8,
    window: Mutex<Range<u64>>,
    written: Mutex<Vec<(u64, Vec<u8>)>>,
    down: Mutex<usize>,
}

impl Probe {
    fn new(number: u8, bar_size: u32) -> Arc<Self> {
        let config = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1000 + u16::from(number),
            revision: 1,
            class: 0xff_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        Arc::new(Probe {
            config: Mutex::new(match bar_size {
                0 => config,
                size => config.memory_bar(size),
            }),
            number,
            window: Mutex::new(0..0),
            written: Mutex::default(),
            down: Mutex::default(),
        })
    }
}

impl PciDevice for Probe {
    fn plug(&self, _address: PciAddress, window: Range<u64>) {
        *lock(&self.window) = window;
    }

    fn read_config(&self, offset: u8, data: &mut [u8]) {
        lock(&self.config).read(offset, data);
    }

    fn write_config(&self, offset: u8, data: &[u8]) {
        lock(&self.config).write(offset, data);
    }

    fn decoded(&self) -> Option<Range<u64>> {
        lock(&self.config).decoded(&lock(&self.window))
    }

    fn read_bar(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.number);
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        lock(&self.written).push((offset, data.to_vec()));
    }

    fn shutdown(&self) {
        *lock(&self.down) += 1;
    }
}

/// A bus with `count` devices.
fn machine(count: u8) -> (Arc<PciBus>, Vec<Arc<Probe>>) {
    let mut bus = PciBus::new(WINDOW, count.into());
    let probes: Vec<_> = (0..count)
        .map(|number| Probe::new(number, 0x1000))
        .collect();
    for probe in &probes {
        bus.add(probe.clone()).unwrap();
    }
    (Arc::new(bus), probes)
}

fn select(ports: &ConfigPorts, slot: u32, function: u32, offset: u32) {
    let address = 1 << 31 | slot << 11 | function << 8 | offset;
    ports.write(0, &address.to_le_bytes());
}

/// Reads a dword as a kernel does.
fn dword(ports: &ConfigPorts, slot: u32, function: u32, offset: u32) -> u32 {
    select(ports, slot, function, offset);
    let mut data = [0; 4];
    ports.read(4, &mut data);
    u32::from_le_bytes(data)
}

fn at(address: u64) -> u64 {
    address - WINDOW.start
}

fn memory(window: &Window, address: u64) -> u8 {
    let mut data = [0x55];
    window.read(at(address), &mut data);
    data[0]
}

#[test]
fn the_host_bridge_is_at_00_00_0() {
    let ports = ConfigPorts::new(machine(1).0);
    assert_eq!(dword(&ports, 0, 0, 0), 0x0008_1b36);
    assert_eq!(dword(&ports, 0, 0, 8) >> 16, 0x0600);
    select(&ports, 0, 0, 0x10);
    ports.write(4, &[0xff; 4]);
    assert_eq!(dword(&ports, 0, 0, 0x10), 0);
    assert_eq!(dword(&ports, 0, 1, 0), u32::MAX);
}

/// Section 3.2.2.3.2: CONFIG_ADDRESS takes whole dwords only; reserved bits read as zero.
#[test]
fn config_address_takes_only_dwords() {
    let ports = ConfigPorts::new(machine(0).0);
    let latched = || {
        let mut data = [0; 4];
        ports.read(0, &mut data);
        u32::from_le_bytes(data)
    };
    ports.write(0, &u32::MAX.to_le_bytes());
    assert_eq!(latched(), 0x80ff_fffc);
    ports.write(0, &[0]);
    ports.write(3, &[1]);
    ports.write(0, &[0, 0]);
    assert_eq!(latched(), 0x80ff_fffc);
    let mut data = [0; 2];
    ports.read(2, &mut data);
    assert_eq!(data, [0xff, 0xff]);
}

/// Section 3.2.2.3.2: without the enable bit CONFIG_DATA is a port like any other.
#[test]
fn config_data_needs_the_enable_bit() {
    let (bus, probes) = machine(1);
    let ports = ConfigPorts::new(bus);
    ports.write(0, &0x0000_0804u32.to_le_bytes());
    ports.write(4, &[0, 0, 0, 0]);
    let mut data = [0; 4];
    ports.read(4, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(lock(&probes[0].config).u16(COMMAND), COMMAND_MEMORY);
}

/// Section 3.2.2.3.1: bytes and words within the dword.
#[test]
fn config_data_is_accessed_in_bytes_words_and_dwords() {
    let ports = ConfigPorts::new(machine(3).0);
    select(&ports, 3, 0, 0);
    let whole = [0xf4, 0x1a, 0x02, 0x10];
    for (offset, len) in [(0, 1), (1, 1), (3, 1), (0, 2), (1, 2), (2, 2), (0, 4)] {
        let mut data = vec![0x55; len];
        ports.read(4 + offset as u64, &mut data);
        assert_eq!(data, whole[offset..offset + len], "{len} at {offset}");
    }
    for (offset, len) in [(1, 4), (3, 2), (2, 4)] {
        let mut data = vec![0x55; len];
        ports.read(4 + offset, &mut data);
        assert_eq!(data, vec![0xff; len], "{len} at {offset} leaves the dword");
    }
    select(&ports, 3, 0, 0x3c);
    ports.write(4, &[7]);
    ports.write(5, &[9, 9]);
    assert_eq!(dword(&ports, 3, 0, 0x3c), 7, "interrupt pin is read-only");
}

#[test]
fn absent_functions_read_all_ones() {
    let ports = ConfigPorts::new(machine(2).0);
    for (slot, function) in [(3, 0), (31, 7), (1, 1), (2, 7)] {
        assert_eq!(dword(&ports, slot, function, 0), u32::MAX);
        ports.write(4, &[0; 4]);
    }
    ports.write(0, &0x8001_0800u32.to_le_bytes());
    let mut data = [0; 4];
    ports.read(4, &mut data);
    assert_eq!(data, [0xff; 4], "there is no bus 1");
}

#[test]
fn each_device_has_a_slot_while_there_are_enough() {
    let ports = ConfigPorts::new(machine(31).0);
    for index in 0..31 {
        assert_eq!(dword(&ports, index + 1, 0, 0) >> 16, 0x1000 + index);
        assert_eq!(dword(&ports, index + 1, 1, 0), u32::MAX);
    }
}

#[test]
fn more_devices_than_slots_are_met_in_their_order_on_a_walk_of_the_bus() {
    let ports = ConfigPorts::new(machine(64).0);
    let walk = (1..32).flat_map(|slot| (0..8).map(move |function| (slot, function)));
    let ids = walk.map(|(slot, function)| dword(&ports, slot, function, 0));
    let met: Vec<_> = ids
        .filter(|id| *id != u32::MAX)
        .map(|id| id >> 16)
        .collect();
    assert_eq!(met, (0x1000..0x1040).collect::<Vec<_>>());
}

/// Section 6.2.1: header type bit 7, on function 0 of a slot with further functions.
#[test]
fn function_0_tells_of_further_functions() {
    let ports = ConfigPorts::new(machine(33).0);
    let header_type = |slot, function| dword(&ports, slot, function, 0x0c) >> 16;
    assert_eq!(header_type(1, 0), 0x80);
    assert_eq!(header_type(16, 0), 0x80);
    assert_eq!(header_type(17, 0), 0);
    assert_eq!(header_type(1, 1), 0);
    select(&ports, 1, 0, 0x0c);
    let mut data = [0; 2];
    ports.read(6, &mut data);
    assert_eq!(data, [0x80, 0]);
    ports.read(5, &mut data);
    assert_eq!(data, [0, 0x80]);
    let mut data = [0; 1];
    ports.read(7, &mut data);
    assert_eq!(data, [0]);
}

#[test]
fn the_249th_device_is_refused() {
    let mut bus = PciBus::new(WINDOW, 248);
    for number in 0..248 {
        bus.add(Probe::new(number, 0x1000)).unwrap();
    }
    let error = bus.add(Probe::new(248, 0x1000)).unwrap_err();
    assert!(
        error.to_string().contains("more than 248 devices"),
        "{error}"
    );
}

/// Section 6.2.5.1: the BAR is sized, and put at a multiple of its size.
#[test]
fn bars_are_programmed_as_firmware_would() {
    let mut bus = PciBus::new(0xc000_0800..0xc001_0000, 5);
    let sizes = [0x100, 0x4000, 0, 0x1000, 0x4000];
    let probes: Vec<_> = (0..)
        .zip(sizes)
        .map(|(n, size)| Probe::new(n, size))
        .collect();
    for probe in &probes {
        bus.add(probe.clone()).unwrap();
    }
    let bars: Vec<_> = probes.iter().map(|probe| probe.decoded()).collect();
    assert_eq!(
        bars,
        [
            Some(0xc000_0800..0xc000_0900),
            Some(0xc000_4000..0xc000_8000),
            None,
            Some(0xc000_8000..0xc000_9000),
            Some(0xc000_c000..0xc001_0000),
        ]
    );
    assert_eq!(bus.window(), 0xc000_0800..0xc001_0000);
}

#[test]
fn a_full_window_is_an_error() {
    let mut bus = PciBus::new(0xc000_0000..0xc000_1800, 2);
    bus.add(Probe::new(0, 0x1000)).unwrap();
    let error = bus.add(Probe::new(1, 0x1000)).unwrap_err().to_string();
    assert!(error.contains("00:02.0"), "{error}");
    assert!(error.contains("0xc0000000..0xc0001800"), "{error}");
    let mut beyond = PciBus::new(1 << 32..2 << 32, 1);
    beyond.add(Probe::new(0, 0x1000)).unwrap_err();
}

#[test]
fn the_window_reaches_the_bar_at_its_address() {
    let (bus, probes) = machine(40);
    let window = Window::new(bus);
    for number in [0u8, 1, 39] {
        let start = WINDOW.start + 0x1000 * u64::from(number);
        assert_eq!(memory(&window, start), number);
        assert_eq!(memory(&window, start + 0xfff), number);
        window.write(at(start) + 0x10, &[1, 2]);
        let written = lock(&probes[usize::from(number)].written);
        assert_eq!(*written, [(0x10, vec![1, 2])]);
    }
    assert_eq!(memory(&window, WINDOW.start + 0x1000 * 40), 0xff);
    assert_eq!(memory(&window, u64::MAX), 0xff);
}

#[test]
fn an_access_across_the_end_of_a_bar_finds_nothing() {
    let (bus, probes) = machine(2);
    let window = Window::new(bus);
    let mut data = [0; 4];
    window.read(0xffe, &mut data);
    assert_eq!(data, [0xff; 4]);
    window.write(0xffe, &data);
    assert!(probes.iter().all(|probe| lock(&probe.written).is_empty()));
}

/// Section 6.2.5: the guest may move a BAR, and switch it off.
#[test]
fn a_bar_answers_where_the_guest_moves_it() {
    let (bus, _) = machine(3);
    let ports = ConfigPorts::new(bus.clone());
    let window = Window::new(bus);
    let home = WINDOW.start + 0x1000;
    let moved = WINDOW.start + 0x8_0000;
    select(&ports, 2, 0, 0x10);
    ports.write(4, &(moved as u32).to_le_bytes());
    assert_eq!(memory(&window, home), 0xff);
    assert_eq!(memory(&window, moved), 1);
    select(&ports, 2, 0, 4);
    ports.write(4, &[0, 0]);
    assert_eq!(memory(&window, moved), 0xff);
    ports.write(4, &[2, 0]);
    assert_eq!(memory(&window, moved), 1);
}

#[test]
fn shutdown_reaches_every_device() {
    let (bus, probes) = machine(40);
    bus.shutdown();
    assert!(probes.iter().all(|probe| *lock(&probe.down) == 1));
}

/// A vCPU thread that panicked in a device does not take the rest of the machine with it.
#[test]
fn a_poisoned_lock_still_locks() {
    let mutex = Mutex::new(7);
    std::thread::scope(|scope| {
        let holder = scope.spawn(|| {
            let _guard = mutex.lock();
            panic!("on purpose");
        });
        assert!(holder.join().is_err());
    });
    assert_eq!(*lock(&mutex), 7);
}
