//! Virtqueue registers, and their way to the device.

use virtio_queue::QueueT;

use super::*;
use common::{
    QUEUE_DESC, QUEUE_DEVICE, QUEUE_DRIVER, QUEUE_ENABLE, QUEUE_MSIX_VECTOR, QUEUE_NOTIFY_OFF,
    QUEUE_SELECT, QUEUE_SIZE,
};

/// Section 4.1.4.3.1: queue_size is 0 where there is no virtqueue.
#[test]
fn a_virtqueue_that_does_not_exist_has_size_0() {
    let machine = Machine::new();
    for (index, size) in [(0, 256), (1, 128), (2, 0), (0xffff, 0)] {
        machine.set_u16(QUEUE_SELECT, index);
        assert_eq!(machine.common_u16(QUEUE_SELECT), index);
        assert_eq!(machine.common_u16(QUEUE_SIZE), size);
        let notify_off = if size == 0 { 0 } else { index };
        assert_eq!(machine.common_u16(QUEUE_NOTIFY_OFF), notify_off);
        machine.set_u16(QUEUE_SIZE, 16);
        machine.set_u16(QUEUE_ENABLE, 1);
        machine.write(COMMON, QUEUE_DESC, &[1; 8]);
        let enabled = u16::from(size != 0);
        assert_eq!(machine.common_u16(QUEUE_ENABLE), enabled);
    }
    machine.set_u16(QUEUE_SELECT, 2);
    assert_eq!(machine.read(COMMON, QUEUE_DESC), [0; 8]);
    assert_eq!(machine.common_u16(QUEUE_MSIX_VECTOR), 0xffff);
}

/// Section 4.1.4.3.2: a power of two; and no more than the device has.
#[test]
fn queue_size_takes_smaller_powers_of_two() {
    let machine = Machine::new();
    for (written, kept) in [
        (64, 64),
        (0, 64),
        (63, 64),
        (512, 64),
        (0xffff, 64),
        (1, 1),
        (256, 256),
    ] {
        machine.set_u16(QUEUE_SIZE, written);
        assert_eq!(machine.common_u16(QUEUE_SIZE), kept, "after {written}");
    }
}

/// Section 4.1.3.1: 64-bit fields are two 32-bit fields; eight bytes at once do as well.
#[test]
fn addresses_are_written_whole_or_in_halves() {
    let machine = Machine::new();
    for register in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE] {
        machine.write(COMMON, register, &0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(machine.common_u32(register), 0x5566_7788);
        assert_eq!(machine.common_u32(register + 4), 0x1122_3344);
        machine.set_u32(register + 4, 0xa1a2_a3a4);
        assert_eq!(machine.common_u32(register), 0x5566_7788);
        machine.set_u32(register, 0xb1b2_b3b4);
        let whole = u64::from_le_bytes(machine.read(COMMON, register));
        assert_eq!(whole, 0xa1a2_a3a4_b1b2_b3b4);
    }
}

/// Section 4.1.3.1: other widths than the field's are the driver's mistake.
#[test]
fn writes_of_other_widths_are_dropped() {
    let machine = Machine::new();
    let registers = || machine.read::<56>(COMMON, 0);
    let before = registers();
    for (offset, len) in [
        (0x00, 1),
        (0x00, 8),
        (0x02, 2),
        (QUEUE_SELECT, 1),
        (QUEUE_SELECT, 4),
        (QUEUE_SIZE, 1),
        (QUEUE_SIZE, 4),
        (QUEUE_SIZE, 8),
        (QUEUE_ENABLE, 1),
        (QUEUE_ENABLE, 4),
        (QUEUE_DESC, 1),
        (QUEUE_DESC, 2),
        (QUEUE_DESC + 2, 4),
        (QUEUE_DESC + 4, 8),
        (QUEUE_DESC + 1, 8),
        (QUEUE_DEVICE + 4, 8),
        (QUEUE_DEVICE + 8, 4),
        (QUEUE_DEVICE + 8, 8),
        (0xffc, 4),
    ] {
        machine.write(COMMON, offset, &[1, 0, 0, 0, 0, 0, 0, 0][..len]);
        assert_eq!(registers(), before, "{len} bytes at {offset:#x}");
    }
    assert_eq!(machine.read(COMMON, QUEUE_SIZE + 1), [1, 0xff, 0xff]);
    assert_eq!(machine.read(COMMON, 56), [0; 8]);
}

/// Section 4.1.4.3.2: the driver does not write 0; what else is no 1 is no value.
#[test]
fn queue_enable_takes_only_1() {
    let machine = Machine::new();
    for value in [0, 2, 0xffff] {
        machine.set_u16(QUEUE_ENABLE, value);
        assert_eq!(machine.common_u16(QUEUE_ENABLE), 0);
    }
    machine.set_u16(QUEUE_ENABLE, 1);
    machine.set_u16(QUEUE_ENABLE, 0);
    assert_eq!(machine.common_u16(QUEUE_ENABLE), 1);
}

/// Section 4.1.4.3.2: a virtqueue is set up before it is enabled.
#[test]
fn an_enabled_virtqueue_is_frozen() {
    let machine = Machine::new();
    machine.enable_queue(0);
    let before: [u8; 32] = machine.read(COMMON, QUEUE_SIZE);
    machine.set_u16(QUEUE_SIZE, 16);
    for register in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE] {
        machine.write(COMMON, register, &[1; 8]);
        machine.set_u32(register, 7);
        machine.set_u32(register + 4, 7);
    }
    assert_eq!(machine.read(COMMON, QUEUE_SIZE), before);
    machine.set_u16(QUEUE_SELECT, 1);
    machine.set_u16(QUEUE_SIZE, 16);
    assert_eq!(machine.common_u16(QUEUE_SIZE), 16, "the other is not");
}

/// Section 3.1.1: virtqueues are set up before DRIVER_OK.
#[test]
fn virtqueues_are_frozen_after_driver_ok() {
    let machine = Machine::new();
    machine.negotiate(VERSION_1);
    machine.set_status(1 | 2 | 4 | 8);
    for index in 0..2 {
        machine.set_u16(QUEUE_SELECT, index);
        let before: [u8; 32] = machine.read(COMMON, QUEUE_SIZE);
        machine.enable_queue(index);
        assert_eq!(machine.read(COMMON, QUEUE_SIZE), before);
    }
}

/// Sections 2.7 and 3.1.1 step 8: the device gets what the driver set up.
#[test]
fn the_device_gets_the_enabled_virtqueues() {
    let machine = Machine::new();
    machine.negotiate(VERSION_1 | 1 << 60);
    machine.enable_queue(1);
    assert!(!machine.is_active());
    machine.set_status(1 | 2 | 4 | 8);
    assert_eq!(machine.status(), 1 | 2 | 4 | 8);
    let device = lock(&machine.device);
    let activation = device.activation.as_ref().unwrap();
    assert_eq!(activation.features, VERSION_1 | 1 << 60);
    let [active] = &activation.queues[..] else {
        panic!("one virtqueue is enabled");
    };
    assert_eq!(active.index, 1);
    assert!(active.queue.ready());
    assert!(!active.queue.event_idx_enabled());
    assert_eq!((active.queue.size(), active.queue.max_size()), (64, 128));
    assert_eq!(active.queue.desc_table(), 0x1_4000);
    assert_eq!(active.queue.avail_ring(), 0x1_5000);
    assert_eq!(active.queue.used_ring(), 0x1_6000);
}

/// Section 2.7.7: VIRTIO_F_EVENT_IDX.
#[test]
fn event_idx_is_set_on_the_queue_when_negotiated() {
    let machine = Machine::new();
    machine.drive();
    let device = lock(&machine.device);
    let queues = &device.activation.as_ref().unwrap().queues;
    assert_eq!(queues.len(), 2);
    assert!(queues.iter().all(|active| active.queue.event_idx_enabled()));
}

/// Section 2.1.2: rings outside of memory or not aligned (section 2.7) need a reset, and the
/// driver is told.
#[test]
fn invalid_rings_need_a_reset() {
    let end = MEMORY_LEN as u64;
    for (register, address) in [
        (QUEUE_DESC, end),
        (QUEUE_DESC, end - 512),
        (QUEUE_DESC, u64::MAX - 15),
        (QUEUE_DESC, 0x1_0008),
        (QUEUE_DRIVER, end),
        (QUEUE_DRIVER, 0x1_1001),
        (QUEUE_DRIVER, end - 64),
        (QUEUE_DEVICE, end),
        (QUEUE_DEVICE, 0x1_2002),
        (QUEUE_DEVICE, end - 512),
    ] {
        let machine = Machine::new();
        machine.negotiate(VERSION_1);
        let msis = machine.map_vectors(1);
        machine.enable_queue(1);
        machine.set_u16(QUEUE_SELECT, 0);
        machine.set_u16(QUEUE_SIZE, 64);
        for (area, good) in [
            (QUEUE_DESC, 0x1_0000u64),
            (QUEUE_DRIVER, 0x1_1000),
            (QUEUE_DEVICE, 0x1_2000),
        ] {
            let address = if area == register { address } else { good };
            machine.write(COMMON, area, &address.to_le_bytes());
        }
        machine.set_u16(QUEUE_ENABLE, 1);
        machine.set_status(1 | 2 | 4 | 8);
        let problem = format!("register {register:#x}, address {address:#x}");
        assert_eq!(machine.status(), 0x40 | 1 | 2 | 4 | 8, "{problem}");
        assert_eq!(msis[0].signals(), 1, "{problem}");
        assert!(!machine.is_active());
        assert!(machine.hypervisor.doorbell_addresses().is_empty());
        machine.drive();
        assert!(machine.is_active());
    }
}

#[test]
fn a_device_that_refuses_activation_needs_a_reset() {
    let machine = Machine::new();
    lock(&machine.device).refuse = true;
    let msis = {
        machine.negotiate(VERSION_1);
        machine.enable_queue(0);
        machine.map_vectors(1)
    };
    machine.set_status(1 | 2 | 4 | 8);
    assert_eq!(machine.status(), 0x40 | 1 | 2 | 4 | 8);
    assert_eq!(msis[0].signals(), 1);
    assert!(machine.hypervisor.doorbell_addresses().is_empty());
    lock(&machine.device).refuse = false;
    machine.drive();
}
