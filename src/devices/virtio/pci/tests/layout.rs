//! What a driver finds: PCI identity, capabilities, the BAR.

use super::*;

/// Section 4.1.2.1.
#[test]
fn the_pci_identity_follows_from_the_device_type() {
    for (device_type, class) in [(2, 0x01_80_00), (4, 0x00_ff_00), (1, 0xff_00_00)] {
        let machine = Machine::with(device(device_type, &[16]));
        let id = (0x1040 + device_type) << 16 | 0x1af4;
        assert_eq!(machine.config(0), id, "vendor and device ID");
        assert_eq!(machine.config(8), class << 8 | 1, "class code, revision 1");
        assert_eq!(machine.config(0x2c), id, "subsystem");
        assert_eq!(machine.config(0x3c) >> 8, 0, "no interrupt pin");
    }
}

#[test]
fn a_device_type_without_device_id_is_refused() {
    for device_type in [0, 0x40, 0x1_0002] {
        let error = refusal(device(device_type, &[16]));
        assert!(error.contains(&device_type.to_string()), "{error}");
    }
}

/// Section 2.7.
#[test]
fn a_virtqueue_size_that_is_no_power_of_two_is_refused() {
    for size in [0, 3, 0xffff] {
        let error = refusal(device(2, &[16, size]));
        assert!(error.contains(&format!("size {size}")), "{error}");
    }
    assert!(refusal(device(2, &[1; 1025])).contains("1025 virtqueues"));
}

fn refusal(device: Arc<Mutex<FakeDevice>>) -> String {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    let hypervisor = Arc::new(FakeHypervisor::default());
    let transport = VirtioPci::new(device.clone(), Arc::new(memory), hypervisor);
    assert!(lock(&device).interrupt.is_none());
    transport.err().unwrap().to_string()
}

/// Section 4.1.4: one capability a structure, each inside the BAR, none over another.
#[test]
fn the_capabilities_describe_the_bar() {
    let machine = Machine::with(device(2, &[16; 5]));
    assert_eq!(machine.config(4) >> 16, 1 << 4, "there is a list");
    let mut ends = 0;
    let mut describe = |cfg_type, cap_len| {
        let capability = machine.capability(0x09, Some(cfg_type));
        assert_eq!(machine.config_u8(capability + 2), cap_len);
        assert_eq!(machine.config_u8(capability + 4), 0, "BAR 0");
        let offset = machine.config(capability + 8);
        let length = machine.config(capability + 12);
        assert!(u64::from(offset + length) <= BAR_LEN);
        assert_eq!(offset % 0x1000, 0);
        assert_eq!(ends & (1 << (offset / 0x1000)), 0, "a page of its own");
        ends |= 1 << (offset / 0x1000);
        (capability, length)
    };
    assert_eq!(describe(1, 16).1, 56, "common");
    let (notify, length) = describe(2, 20);
    assert_eq!(machine.config(notify + 16), 4, "notify_off_multiplier");
    assert_eq!(length, 20);
    assert_eq!(describe(3, 16).1, 1, "ISR");
    assert!(describe(4, 16).1 >= 64, "device");
    let pci_cfg = machine.capability(0x09, Some(5));
    assert_eq!(machine.config_u8(pci_cfg + 2), 20);
}

/// Section 4.1.4: the driver does not change capabilities.
#[test]
fn capabilities_are_read_only_but_for_msix_control_and_pci_cfg() {
    let machine = Machine::new();
    let msix = machine.capability(0x11, None);
    let pci_cfg = machine.capability(0x09, Some(5));
    let offsets = || (0x40..=0xfc).step_by(4);
    let before: Vec<_> = offsets().map(|offset| machine.config(offset)).collect();
    for offset in offsets() {
        machine.write_config(offset, &[0xff; 4]);
    }
    for (offset, before) in offsets().zip(before) {
        let writable = match offset {
            _ if offset == msix => 0xc000_0000,
            _ if offset == pci_cfg + 4 => 0xff,
            _ if (pci_cfg + 8..pci_cfg + 20).contains(&offset) => u32::MAX,
            _ => 0,
        };
        let after = machine.config(offset);
        assert_eq!(after, before | writable, "offset {offset:#x}");
    }
}

/// Section 4.1.5.1.2: a vector for each virtqueue and one for configuration changes, up to 65.
#[test]
fn there_is_a_vector_for_each_event() {
    for (queues, vectors) in [(0, 1), (1, 2), (4, 5), (64, 65), (100, 65)] {
        let machine = Machine::with(device(2, &vec![16; queues]));
        let control = machine.config(machine.capability(0x11, None)) >> 16;
        assert_eq!(control + 1, vectors);
        assert_eq!(usize::from(machine.common_u16(common::NUM_QUEUES)), queues);
    }
}

/// PCI 3.0 section 6.2.5.1: 32 KiB, 32-bit, not prefetchable; programmed already.
#[test]
fn the_bar_is_programmed_and_can_be_sized() {
    let machine = Machine::new();
    assert_eq!(machine.bar, WINDOW.start);
    assert_eq!(machine.config(4) & 0b111, 0b010, "memory space is on");
    machine.write_config(BAR0, &[0xff; 4]);
    assert_eq!(machine.config(BAR0), 0xffff_8000);
    machine.write_config(BAR0, &(machine.bar as u32).to_le_bytes());
    assert_eq!(machine.common_u16(common::NUM_QUEUES), 2);
}

/// PCI 3.0 section 6.2.2.
#[test]
fn nothing_answers_while_memory_space_is_off() {
    let machine = Machine::new();
    machine.write_config(COMMAND, &[0]);
    assert_eq!(machine.common_u32(common::DEVICE_FEATURE), u32::MAX);
    machine.set_status(1);
    machine.write_config(COMMAND, &[0b10]);
    assert_eq!(machine.status(), 0);
}

/// Section 4.1.4.9: the window in the configuration space reaches the BAR, even one that does
/// not answer.
#[test]
fn pci_cfg_data_is_a_window_to_the_bar() {
    let machine = Machine::new();
    machine.write_config(COMMAND, &[0]);
    let capability = machine.capability(0x09, Some(5));
    let point = |offset: u64, len: u32| {
        machine.write_config(capability + 4, &[0]);
        machine.write_config(capability + 8, &(offset as u32).to_le_bytes());
        machine.write_config(capability + 12, &len.to_le_bytes());
    };
    let data = capability + 16;
    point(common::DEVICE_STATUS, 1);
    machine.write_config(data, &[3, 0xee, 0xee, 0xee]);
    assert_eq!(machine.config(data) & 0xff, 3, "device_status");
    point(common::QUEUE_SELECT, 2);
    machine.write_config(data, &[1, 0]);
    point(common::QUEUE_SIZE, 2);
    assert_eq!(machine.config(data) & 0xffff, 128, "queue 1");
    point(common::DEVICE_FEATURE_SELECT, 4);
    machine.write_config(data, &1u32.to_le_bytes());
    point(common::DEVICE_FEATURE, 4);
    assert_eq!(machine.config(data), (OFFERED >> 32) as u32);
    assert_eq!(machine.config_u8(data + 3), (OFFERED >> 56) as u8);
    point(DEVICE * PAGE + 4, 4);
    assert_eq!(machine.config(data), 0x0706_0504);
}

/// Section 4.1.4.9: accesses are aligned, of 1, 2 or 4 bytes, and inside the BAR.
#[test]
fn a_pci_cfg_window_that_is_not_allowed_reaches_nothing() {
    let machine = Machine::new();
    let capability = machine.capability(0x09, Some(5));
    let status = common::DEVICE_STATUS as u32;
    for (bar, offset, len) in [
        (0, status, 0),
        (0, status, 3),
        (0, status, 8),
        (0, status, u32::MAX),
        (1, status, 1),
        (0xff, status, 1),
        (0, 0x15, 2),
        (0, 0x8000, 1),
        (0, u32::MAX - 3, 4),
    ] {
        machine.write_config(capability + 4, &[bar]);
        machine.write_config(capability + 8, &offset.to_le_bytes());
        machine.write_config(capability + 12, &len.to_le_bytes());
        machine.write_config(capability + 16, &[3; 4]);
        assert_eq!(machine.config(capability + 16), 0x0303_0303);
        assert_eq!(
            machine.status(),
            0,
            "{len} bytes at {offset:#x} of BAR {bar}"
        );
    }
}
