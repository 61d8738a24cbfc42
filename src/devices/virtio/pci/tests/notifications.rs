//! Available buffer notifications: the doorbells.

use super::*;

fn kicks(machine: &Machine, queue: usize) -> u64 {
    let device = lock(&machine.device);
    let activation = device.activation.as_ref().unwrap();
    let kick = &activation.queues[queue].kick;
    // Reads of it block while it is 0.
    kick.write(1).unwrap();
    kick.read().unwrap() - 1
}

/// Section 4.1.4.4: one address a virtqueue.
#[test]
fn each_enabled_virtqueue_has_a_doorbell() {
    let machine = Machine::new();
    machine.negotiate(VERSION_1);
    machine.enable_queue(0);
    machine.enable_queue(1);
    assert!(machine.hypervisor.doorbell_addresses().is_empty());
    machine.set_status(1 | 2 | 4 | 8);
    let notify = machine.bar + NOTIFY * PAGE;
    let addresses = machine.hypervisor.doorbell_addresses();
    assert_eq!(addresses, [notify, notify + 4]);
}

/// Section 4.1.5.2: a notification that exits to us reaches the same virtqueue.
#[test]
fn a_write_to_queue_notify_kicks_the_virtqueue() {
    let machine = Machine::new();
    machine.drive();
    machine.write(NOTIFY, 4, &[1, 0]);
    assert_eq!((kicks(&machine, 0), kicks(&machine, 1)), (0, 1));
    machine.write(NOTIFY, 0, &[0, 0, 0, 0]);
    machine.write(NOTIFY, 0, &[0, 0]);
    assert_eq!((kicks(&machine, 0), kicks(&machine, 1)), (2, 0));
    for offset in [1, 2, 6, 8, 0xffc] {
        machine.write(NOTIFY, offset, &[0, 0]);
    }
    assert_eq!((kicks(&machine, 0), kicks(&machine, 1)), (0, 0));
    assert_eq!(machine.read(NOTIFY, 0), [0, 0]);
}

/// Section 3.1.1: the driver notifies after DRIVER_OK.
#[test]
fn a_notification_before_driver_ok_is_dropped() {
    let machine = Machine::new();
    machine.negotiate(VERSION_1);
    machine.enable_queue(0);
    machine.write(NOTIFY, 0, &[0, 0]);
    machine.set_status(1 | 2 | 4 | 8);
    assert_eq!(kicks(&machine, 0), 0);
}

/// A hypervisor that has no doorbell left does not stop the device: writes exit to us.
#[test]
fn a_doorbell_that_is_refused_takes_the_slow_way() {
    let machine = Machine::new();
    machine
        .hypervisor
        .refuse_doorbell
        .store(true, Ordering::SeqCst);
    machine.drive();
    assert!(machine.hypervisor.doorbell_addresses().is_empty());
    machine.write(NOTIFY, 4, &[1, 0]);
    assert_eq!(kicks(&machine, 1), 1);
    machine.set_status(0);
}

/// PCI 3.0 section 6.2.5: the doorbells are where the BAR is, and nowhere while it is off.
#[test]
fn doorbells_follow_the_bar() {
    let mut machine = Machine::new();
    machine.drive();
    let addresses = |machine: &Machine| machine.hypervisor.doorbell_addresses();
    let moved = WINDOW.start + 0x10_0000;
    machine.write_config(BAR0, &[0xff; 4]);
    assert!(addresses(&machine).is_empty(), "sizing");
    machine.write_config(BAR0, &(moved as u32).to_le_bytes());
    let notify = moved + NOTIFY * PAGE;
    assert_eq!(addresses(&machine), [notify, notify + 4]);
    machine.write(COMMON, common::DEVICE_STATUS, &[0]);
    assert!(machine.is_active(), "nothing answers at the old address");
    machine.bar = moved;
    assert_eq!(machine.status(), 1 | 2 | 4 | 8);

    machine.write_config(COMMAND, &[0]);
    assert!(addresses(&machine).is_empty());
    machine.write_config(COMMAND, &[0b110]);
    assert_eq!(addresses(&machine), [notify, notify + 4]);
    machine.write(NOTIFY, 0, &[0, 0]);
    assert_eq!(kicks(&machine, 0), 1);

    // Outside of the window the host bridge forwards nothing.
    machine.write_config(BAR0, &0x1000_0000u32.to_le_bytes());
    assert!(addresses(&machine).is_empty());
}

/// A device activated while its BAR is off gets its doorbells when it is switched on.
#[test]
fn doorbells_wait_for_the_bar() {
    let machine = Machine::new();
    machine.negotiate(VERSION_1);
    machine.enable_queue(1);
    machine.write_config(COMMAND, &[0]);
    let capability = machine.capability(0x09, Some(5));
    machine.write_config(capability + 8, &0x14u32.to_le_bytes());
    machine.write_config(capability + 12, &1u32.to_le_bytes());
    machine.write_config(capability + 16, &[1 | 2 | 4 | 8]);
    assert!(machine.is_active());
    assert!(machine.hypervisor.doorbell_addresses().is_empty());
    machine.write_config(COMMAND, &[0b10]);
    let address = machine.bar + NOTIFY * PAGE + 4;
    assert_eq!(machine.hypervisor.doorbell_addresses(), [address]);
}

/// Section 4.1.4.4: with more virtqueues than vectors each still has an address.
#[test]
fn a_hundred_virtqueues_have_a_hundred_doorbells() {
    let machine = Machine::with(device(1, &[4; 100]));
    machine.negotiate(VERSION_1);
    for queue in 0..100 {
        machine.set_u16(common::QUEUE_SELECT, queue);
        machine.set_u16(common::QUEUE_ENABLE, 1);
        assert_eq!(machine.common_u16(common::QUEUE_NOTIFY_OFF), queue);
    }
    machine.set_status(1 | 2 | 4 | 8);
    assert_eq!(machine.hypervisor.doorbell_addresses().len(), 100);
    machine.write(NOTIFY, 4 * 99, &[99, 0]);
    assert_eq!(kicks(&machine, 99), 1);
}
