//! Used buffer notifications and configuration changes.

use super::*;
use common::{CONFIG_GENERATION, CONFIG_MSIX_VECTOR, QUEUE_MSIX_VECTOR, QUEUE_SELECT};

/// Section 4.1.5.1.2.1: no event is mapped after reset; a mapping reads back.
#[test]
fn vectors_read_back_what_is_mapped() {
    let machine = Machine::new();
    machine.set_msix_control(0x8000);
    assert_eq!(machine.common_u16(CONFIG_MSIX_VECTOR), 0xffff);
    for queue in 0..2 {
        machine.set_u16(QUEUE_SELECT, queue);
        assert_eq!(machine.common_u16(QUEUE_MSIX_VECTOR), 0xffff);
        machine.set_u16(QUEUE_MSIX_VECTOR, queue);
        assert_eq!(machine.common_u16(QUEUE_MSIX_VECTOR), queue);
    }
    machine.set_u16(CONFIG_MSIX_VECTOR, 2);
    assert_eq!(machine.common_u16(CONFIG_MSIX_VECTOR), 2);
    machine.set_u16(CONFIG_MSIX_VECTOR, 0xffff);
    assert_eq!(machine.common_u16(CONFIG_MSIX_VECTOR), 0xffff);
}

/// Section 4.1.5.1.2.1: a mapping that fails reads back NO_VECTOR.
#[test]
fn a_mapping_that_fails_reads_back_no_vector() {
    let machine = Machine::new();
    for vector in [3, 64, 0x800, 0xfffe] {
        machine.set_u16(CONFIG_MSIX_VECTOR, vector);
        assert_eq!(machine.common_u16(CONFIG_MSIX_VECTOR), 0xffff);
        machine.set_u16(QUEUE_MSIX_VECTOR, vector);
        assert_eq!(machine.common_u16(QUEUE_MSIX_VECTOR), 0xffff);
    }
    machine.set_u16(QUEUE_MSIX_VECTOR, 1);
    machine.hypervisor.refuse_msi.store(true, Ordering::SeqCst);
    machine.set_u16(QUEUE_MSIX_VECTOR, 2);
    assert_eq!(machine.common_u16(QUEUE_MSIX_VECTOR), 0xffff);
    machine.set_u16(QUEUE_MSIX_VECTOR, 1);
    assert_eq!(machine.common_u16(QUEUE_MSIX_VECTOR), 1, "it has one");
}

/// Section 4.1.5.3.
#[test]
fn a_virtqueue_interrupts_with_its_vector() {
    let machine = Machine::new();
    machine.drive();
    let msis = machine.map_vectors(2);
    let signals = || [0, 1, 2].map(|index: usize| msis[index].signals());
    machine.interrupt().queue(0);
    assert_eq!(signals(), [0, 1, 0]);
    machine.interrupt().queue(1);
    machine.interrupt().queue(1);
    assert_eq!(signals(), [0, 0, 2]);
    machine.interrupt().queue(2);
    machine.interrupt().queue(0xffff);
    assert_eq!(signals(), [0, 0, 0]);
    assert_eq!(msis[2].route(), Some((0xfee0_1000, 0x42)));
}

/// A device may have given the eventfd of an interrupt away.
#[test]
fn an_active_device_is_told_when_its_interrupts_go_elsewhere() {
    let machine = Machine::new();
    let eventfd = || machine.interrupt().eventfd(0);
    let remapped = || lock(&machine.device).remapped;
    assert!(eventfd().is_none());
    machine.map_vectors(2);
    assert_eq!(remapped(), 0, "before DRIVER_OK it is not active");
    machine.drive();
    let msis = machine.map_vectors(2);
    let told = remapped();
    assert_eq!(told, 2, "one for each virtqueue");
    eventfd().unwrap().write(1).unwrap();
    assert_eq!(
        [0, 1, 2].map(|index: usize| msis[index].signals()),
        [0, 1, 0]
    );
    machine.set_u16(QUEUE_SELECT, 0);
    machine.set_u16(QUEUE_MSIX_VECTOR, 0xffff);
    assert!(eventfd().is_none());
    machine.set_u16(QUEUE_MSIX_VECTOR, 2);
    eventfd().unwrap().write(1).unwrap();
    assert_eq!(msis[2].signals(), 1);
    assert_eq!(remapped(), told + 2);
    machine.set_msix_control(0);
    assert!(eventfd().is_none());
    machine.set_msix_control(0x8000);
    assert_eq!(remapped(), told + 4);
    machine.set_msix_control(0xc000);
    assert_eq!(remapped(), told + 4, "a mask changes no way");
}

/// Section 4.1.5.1.2: several events may share a vector.
#[test]
fn events_may_share_a_vector() {
    let machine = Machine::new();
    let msis = machine.map_vectors(1);
    machine.set_u16(QUEUE_SELECT, 1);
    machine.set_u16(QUEUE_MSIX_VECTOR, 0);
    machine.interrupt().queue(1);
    machine.interrupt().config_changed();
    assert_eq!(msis[0].signals(), 2);
}

/// Section 4.1.5.3.1.
#[test]
fn an_event_without_vector_does_not_interrupt() {
    let machine = Machine::new();
    machine.drive();
    let msis = machine.map_vectors(2);
    machine.set_u16(CONFIG_MSIX_VECTOR, 0xffff);
    machine.set_u16(QUEUE_SELECT, 0);
    machine.set_u16(QUEUE_MSIX_VECTOR, 0xffff);
    machine.interrupt().queue(0);
    machine.interrupt().config_changed();
    machine.interrupt().needs_reset();
    assert!(msis.iter().all(|msi| msi.signals() == 0));
}

/// PCI 3.0 section 6.8.3.5, through the registers of the BAR.
#[test]
fn a_masked_interrupt_is_pending_and_comes_at_unmask() {
    let machine = Machine::new();
    let msis = machine.map_vectors(2);
    machine.write(MSIX_TABLE, 16 + 12, &1u32.to_le_bytes());
    machine.interrupt().queue(0);
    assert_eq!(msis[1].signals(), 0);
    assert_eq!(machine.read(MSIX_PENDING, 0), [0b010]);
    machine.write(MSIX_PENDING, 0, &[0; 4]);
    assert_eq!(machine.read(MSIX_PENDING, 0), [0b010]);
    machine.set_msix_control(0xc000);
    machine.write(MSIX_TABLE, 16 + 12, &0u32.to_le_bytes());
    machine.interrupt().config_changed();
    assert_eq!(machine.read(MSIX_PENDING, 0), [0b011]);
    machine.set_msix_control(0x8000);
    assert_eq!(machine.read(MSIX_PENDING, 0), [0]);
    assert_eq!((msis[0].signals(), msis[1].signals()), (1, 1));
    let mut entry = [0; 16];
    entry[..8].copy_from_slice(&0xfee0_1000u64.to_le_bytes());
    entry[8] = 0x41;
    assert_eq!(machine.read(MSIX_TABLE, 16), entry);
}

/// Section 4.1.4.5.1: ISR status tells a configuration change always, a virtqueue's interrupt
/// while MSI-X is off; a read resets it.
#[test]
fn isr_status_is_reset_by_a_read() {
    let machine = Machine::new();
    let isr = || machine.read::<1>(ISR, 0)[0];
    machine.interrupt().queue(0);
    assert_eq!(isr(), 0b01);
    assert_eq!(isr(), 0);
    machine.interrupt().config_changed();
    machine.interrupt().queue(1);
    assert_eq!(machine.read(ISR, 0), [0b11, 0, 0, 0]);
    assert_eq!(isr(), 0);
    machine.map_vectors(2);
    machine.interrupt().queue(0);
    assert_eq!(isr(), 0);
    machine.interrupt().config_changed();
    machine.write(ISR, 0, &[0]);
    assert_eq!(machine.read(ISR, 1), [0; 4]);
    assert_eq!(isr(), 0b10);
}

/// Section 4.1.4.3.1: the generation differs once the driver may have seen a change; 256 changes
/// do not look like none.
#[test]
fn a_configuration_change_raises_the_generation() {
    let machine = Machine::new();
    let generation = || machine.common_u8(CONFIG_GENERATION);
    let before = generation();
    machine.read::<4>(DEVICE, 0);
    assert_eq!(generation(), before);
    for _ in 0..256 {
        machine.interrupt().config_changed();
        assert_eq!(generation(), before.wrapping_add(1));
    }
    machine.read::<4>(DEVICE, 0);
    assert_eq!(generation(), before.wrapping_add(1));
    machine.interrupt().config_changed();
    machine.read::<4>(DEVICE, 0);
    assert_eq!(generation(), before.wrapping_add(2));
    for round in 0..=255u8 {
        machine.interrupt().config_changed();
        machine.read::<1>(DEVICE, 0);
        assert_eq!(generation(), before.wrapping_add(3).wrapping_add(round));
    }
}

/// Section 2.5: a driver that reads in two parts notices a change in between.
#[test]
fn a_torn_read_of_the_configuration_shows_in_the_generation() {
    let machine = Machine::new();
    let before = machine.common_u8(CONFIG_GENERATION);
    machine.read::<4>(DEVICE, 0);
    machine.interrupt().config_changed();
    machine.read::<4>(DEVICE, 4);
    assert_ne!(machine.common_u8(CONFIG_GENERATION), before);
}

/// Section 4.1.5.4.
#[test]
fn a_configuration_change_interrupts_with_its_vector() {
    let machine = Machine::new();
    let msis = machine.map_vectors(0);
    machine.interrupt().config_changed();
    assert_eq!(msis[0].signals(), 1);
}

/// Section 2.1.2: once DRIVER_OK is set, the driver is told.
#[test]
fn needing_a_reset_is_a_configuration_change() {
    let machine = Machine::new();
    machine.drive();
    let msis = machine.map_vectors(0);
    machine.interrupt().needs_reset();
    assert_eq!(machine.status(), 0x40 | 1 | 2 | 4 | 8);
    assert_eq!(msis[0].signals(), 1);
    assert_eq!(machine.read(ISR, 0), [0b10]);
    machine.interrupt().needs_reset();
    assert_eq!(msis[0].signals(), 0, "once is enough");
}

/// Section 2.1.2: before DRIVER_OK there is nobody to tell.
#[test]
fn needing_a_reset_before_driver_ok_does_not_interrupt() {
    let machine = Machine::new();
    let msis = machine.map_vectors(0);
    machine.negotiate(VERSION_1);
    machine.set_u16(CONFIG_MSIX_VECTOR, 0);
    machine.interrupt().needs_reset();
    assert_eq!(machine.status(), 0x40 | 1 | 2 | 8);
    assert_eq!(msis[0].signals(), 0);
}
