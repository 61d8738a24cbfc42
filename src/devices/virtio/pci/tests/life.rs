//! Reset, shutdown, the next machine.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::*;
use common::{
    CONFIG_MSIX_VECTOR, DEVICE_FEATURE_SELECT, DRIVER_FEATURE, QUEUE_ENABLE, QUEUE_MSIX_VECTOR,
    QUEUE_SELECT, QUEUE_SIZE,
};

/// Section 2.4.1: the device stops, then the status reads 0, and everything is as at the start.
#[test]
fn a_reset_puts_everything_back() {
    let machine = Machine::new();
    let registers = || machine.read::<56>(COMMON, 0);
    let before = registers();
    machine.drive();
    let msis = machine.map_vectors(2);
    machine.set_u32(DEVICE_FEATURE_SELECT, 1);
    machine.write(MSIX_TABLE, 16 + 12, &1u32.to_le_bytes());
    machine.interrupt().queue(0);
    machine.interrupt().needs_reset();
    msis[0].signals();
    let resets = machine.resets();
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
    assert_eq!(machine.resets(), resets + 1);
    assert!(!machine.is_active());
    assert!(machine.hypervisor.doorbell_addresses().is_empty());
    assert_eq!(registers(), before);
    for queue in 0..2 {
        machine.set_u16(QUEUE_SELECT, queue);
        assert_eq!(machine.common_u16(QUEUE_ENABLE), 0);
        assert_eq!(
            machine.common_u16(QUEUE_SIZE),
            [256, 128][usize::from(queue)]
        );
        assert_eq!(machine.common_u16(QUEUE_MSIX_VECTOR), 0xffff);
        assert_eq!(machine.read(COMMON, 0x20), [0; 24]);
    }
    assert_eq!(machine.common_u16(CONFIG_MSIX_VECTOR), 0xffff);
    assert_eq!(machine.common_u32(DRIVER_FEATURE), 0);
    assert_eq!(machine.read(ISR, 0), [0]);
    assert_eq!(machine.read(MSIX_PENDING, 0), [0]);
    machine.interrupt().config_changed();
    assert!(msis.iter().all(|msi| msi.signals() == 0));
}

/// Section 2.4: also a device that was never activated is reset.
#[test]
fn a_reset_reaches_a_device_that_was_not_activated() {
    let machine = Machine::new();
    machine.set_status(0);
    assert_eq!(machine.resets(), 1);
}

#[test]
fn a_device_is_activated_again_after_a_reset() {
    let machine = Machine::new();
    for round in 1..=3 {
        machine.drive();
        assert_eq!(lock(&machine.device).activations, round);
        assert_eq!(machine.hypervisor.doorbell_addresses().len(), 2);
    }
}

/// DRIVER_OK written again is no second activation.
#[test]
fn a_device_is_activated_once() {
    let machine = Machine::new();
    machine.drive();
    machine.set_status(4);
    machine.set_status(1 | 2 | 4 | 8);
    assert_eq!(lock(&machine.device).activations, 1);
}

/// A reset waits for the device's thread, which may be about to interrupt the driver.
#[test]
fn a_device_interrupts_while_its_reset_waits_for_it() {
    let machine = Machine::new();
    machine.drive();
    let msis = machine.map_vectors(2);
    let interrupt = machine.interrupt();
    let (stop, stopped) = mpsc::channel();
    let (done, is_done) = mpsc::channel();
    let thread = thread::spawn(move || {
        stopped.recv().unwrap();
        interrupt.queue(0);
        interrupt.config_changed();
        interrupt.needs_reset();
        done.send(()).unwrap();
    });
    lock(&machine.device).on_reset = Box::new(move || {
        stop.send(()).unwrap();
        is_done.recv_timeout(Duration::from_secs(20)).unwrap();
    });
    machine.set_status(0);
    thread.join().unwrap();
    assert_eq!(machine.status(), 0);
    assert_eq!((msis[0].signals(), msis[1].signals()), (2, 1));
    lock(&machine.device).on_reset = Box::new(|| {});
}

/// A masked vector makes a signal take the table's lock: that is not held over a reset either.
#[test]
fn a_device_interrupts_a_masked_vector_while_its_reset_waits_for_it() {
    let machine = Machine::new();
    machine.drive();
    machine.map_vectors(2);
    machine.set_msix_control(0xc000);
    let interrupt = machine.interrupt();
    lock(&machine.device).on_reset = Box::new(move || {
        let interrupt = interrupt.clone();
        let (done, is_done) = mpsc::channel();
        thread::spawn(move || {
            interrupt.queue(1);
            done.send(()).unwrap();
        });
        is_done.recv_timeout(Duration::from_secs(20)).unwrap();
    });
    machine.set_status(0);
    assert_eq!(machine.read(MSIX_PENDING, 0), [0]);
    lock(&machine.device).on_reset = Box::new(|| {});
}

/// While one device's reset waits, the others answer.
#[test]
fn a_reset_does_not_hold_up_other_devices() {
    let hypervisor = Arc::new(FakeHypervisor::default());
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
    let memory = Arc::new(memory);
    let slow = device(2, &[16]);
    let mut bus = PciBus::new(WINDOW, 2);
    for device in [slow.clone(), device(2, &[16])] {
        let transport = VirtioPci::new(device, memory.clone(), hypervisor.clone());
        bus.add(Arc::new(transport.unwrap())).unwrap();
    }
    let window = Arc::new(Window::new(Arc::new(bus)));
    let other = window.clone();
    lock(&slow).on_reset = Box::new(move || {
        let (done, is_done) = mpsc::channel();
        let other = other.clone();
        thread::spawn(move || {
            other.write(BAR_LEN + common::DEVICE_STATUS, &[1]);
            done.send(()).unwrap();
        });
        is_done.recv_timeout(Duration::from_secs(20)).unwrap();
    });
    window.write(common::DEVICE_STATUS, &[0]);
    let mut status = [0];
    window.read(BAR_LEN + common::DEVICE_STATUS, &mut status);
    assert_eq!(status, [1]);
    lock(&slow).on_reset = Box::new(|| {});
}

/// Section 2.4 for the end of a machine: nothing is left of it, and it has no effect any more.
#[test]
fn a_shutdown_takes_the_device_out() {
    let machine = Machine::new();
    machine.drive();
    let msis = machine.map_vectors(2);
    machine.bus.shutdown();
    assert!(!machine.is_active());
    assert!(machine.hypervisor.doorbell_addresses().is_empty());
    assert!(msis.iter().all(|msi| msi.route().is_none()));
    let resets = machine.resets();
    machine.set_status(0);
    machine.set_status(1 | 2);
    machine.write(DEVICE, 0, &[0xee]);
    assert_eq!(machine.read(DEVICE, 1), [0]);
    assert_eq!(machine.status(), 0);
    assert_eq!(lock(&machine.device).config[0], 0);
    machine.interrupt().queue(0);
    machine.interrupt().config_changed();
    machine.interrupt().needs_reset();
    machine.bus.shutdown();
    assert_eq!(machine.resets(), resets, "one reset, one shutdown");
}

/// After a guest reboot the same device is plugged into the next machine; the last one's end
/// comes later.
#[test]
fn a_device_goes_from_machine_to_machine() {
    let device = device(2, &[256, 128]);
    let first = Machine::with(device.clone());
    first.drive();
    first.bus.shutdown();
    let second = Machine::with(device.clone());
    second.drive();
    let msis = second.map_vectors(2);
    let resets = second.resets();
    drop(first);
    assert!(second.is_active());
    assert_eq!(second.resets(), resets);
    second.interrupt().queue(0);
    assert_eq!(msis[1].signals(), 1);
}

/// A transport that is dropped leaves nothing behind: neither doorbells nor the hypervisor.
#[test]
fn a_drop_is_a_shutdown() {
    let device = device(2, &[256, 128]);
    let machine = Machine::with(device.clone());
    machine.drive();
    machine.map_vectors(2);
    let hypervisor = machine.hypervisor.clone();
    drop(machine);
    assert!(lock(&device).activation.is_none());
    assert!(hypervisor.doorbell_addresses().is_empty());
    assert_eq!(Arc::strong_count(&hypervisor), 1);
}

/// A device that panicked, and poisoned its lock, is still reset and shut down.
#[test]
fn a_poisoned_device_is_shut_down() {
    let machine = Machine::new();
    machine.drive();
    thread::scope(|scope| {
        let holder = scope.spawn(|| {
            let _guard = machine.device.lock();
            panic!("on purpose");
        });
        assert!(holder.join().is_err());
    });
    assert!(machine.device.is_poisoned());
    machine.bus.shutdown();
    assert!(!machine.is_active());
}
