//! Features and device status.

use super::*;
use common::{
    DEVICE_FEATURE, DEVICE_FEATURE_SELECT, DEVICE_STATUS, DRIVER_FEATURE, DRIVER_FEATURE_SELECT,
};

/// Section 4.1.4.3.1: zero for any window without features.
#[test]
fn device_feature_shows_the_selected_window() {
    let machine = Machine::new();
    let shown = |select| {
        machine.set_u32(DEVICE_FEATURE_SELECT, select);
        assert_eq!(machine.common_u32(DEVICE_FEATURE_SELECT), select);
        machine.common_u32(DEVICE_FEATURE)
    };
    assert_eq!(shown(0), OFFERED as u32);
    assert_eq!(shown(1), (OFFERED >> 32) as u32);
    for select in [2, 3, 4, 31, 32, u32::MAX] {
        assert_eq!(shown(select), 0);
    }
    machine.set_u32(DEVICE_FEATURE, 0);
    assert_eq!(machine.common_u32(DEVICE_FEATURE), 0, "read-only");
    assert_eq!(shown(0), OFFERED as u32);
}

/// Section 4.1.4.3.1.
#[test]
fn driver_feature_shows_what_the_driver_wrote() {
    let machine = Machine::new();
    machine.accept(VERSION_1 | 1 << 3);
    machine.set_u32(DRIVER_FEATURE_SELECT, 0);
    assert_eq!(machine.common_u32(DRIVER_FEATURE), 1 << 3);
    machine.set_u32(DRIVER_FEATURE_SELECT, 1);
    assert_eq!(machine.common_u32(DRIVER_FEATURE), 1);
    machine.set_u32(DRIVER_FEATURE_SELECT, 7);
    machine.set_u32(DRIVER_FEATURE, 1);
    assert_eq!(machine.common_u32(DRIVER_FEATURE), 0);
}

/// Section 6: VIRTIO_F_RING_RESET and others change the transport, which does not have them.
#[test]
fn features_of_other_transports_are_not_offered() {
    let device = device(2, &[16]);
    lock(&device).features = u64::MAX;
    let machine = Machine::with(device);
    machine.set_u32(DEVICE_FEATURE_SELECT, 1);
    let offered = machine.common_u32(DEVICE_FEATURE);
    for bit in [34, 37, 38, 39, 40, 41] {
        assert_eq!(offered >> (bit - 32) & 1, 0, "bit {bit}");
    }
    assert_eq!(offered & 1, 1, "VIRTIO_F_VERSION_1");
}

/// Section 2.2.2.
#[test]
fn features_ok_sticks_for_a_subset_of_what_is_offered() {
    let machine = Machine::new();
    for features in [VERSION_1, VERSION_1 | EVENT_IDX, OFFERED] {
        assert_eq!(machine.negotiate(features), 1 | 2 | 8);
    }
}

/// Section 2.2.2.
#[test]
fn features_ok_does_not_stick_for_a_bit_that_was_not_offered() {
    let machine = Machine::new();
    assert_eq!(machine.negotiate(VERSION_1 | 1 << 4), 1 | 2);
    assert_eq!(machine.negotiate(VERSION_1 | 1 << 40), 1 | 2);
    machine.set_status(0);
    machine.accept(VERSION_1);
    machine.set_u32(DRIVER_FEATURE_SELECT, 2);
    machine.set_u32(DRIVER_FEATURE, 1);
    machine.set_status(1 | 2 | 8);
    assert_eq!(machine.status(), 1 | 2, "bit 64");
    machine.set_u32(DRIVER_FEATURE, 0);
    machine.set_status(1 | 2 | 8);
    assert_eq!(machine.status(), 1 | 2 | 8);
}

/// Section 3.1.1 step 5: the device learns what was negotiated before it is activated.
#[test]
fn the_device_is_told_what_was_negotiated() {
    let machine = Machine::new();
    machine.negotiate(EVENT_IDX);
    assert!(lock(&machine.device).negotiated.is_empty());
    machine.negotiate(VERSION_1 | 1 << 3);
    machine.set_status(1 | 2 | 8);
    assert_eq!(lock(&machine.device).negotiated, [VERSION_1 | 1 << 3]);
    machine.set_status(0);
    machine.accept(VERSION_1);
    machine.set_status(1 | 2 | 4 | 8);
    assert!(machine.is_active(), "both bits in one write");
    assert_eq!(lock(&machine.device).negotiated[1..], [VERSION_1]);
}

/// Section 6.2: without VIRTIO_F_VERSION_1 this would be a legacy driver.
#[test]
fn features_ok_needs_version_1() {
    let machine = Machine::new();
    assert_eq!(machine.negotiate(EVENT_IDX), 1 | 2);
}

/// Section 3.1.1 step 5.
#[test]
fn features_are_frozen_after_features_ok() {
    let machine = Machine::new();
    machine.negotiate(VERSION_1);
    machine.accept(OFFERED);
    machine.set_u32(DRIVER_FEATURE_SELECT, 0);
    assert_eq!(machine.common_u32(DRIVER_FEATURE), 0);
    machine.set_status(1 | 2 | 4 | 8);
    let device = lock(&machine.device);
    assert_eq!(device.activation.as_ref().unwrap().features, VERSION_1);
}

/// Section 2.1.1: the driver does not clear bits; reserved ones and DEVICE_NEEDS_RESET are not
/// the driver's.
#[test]
fn status_bits_are_only_added() {
    let machine = Machine::new();
    machine.set_status(1);
    machine.set_status(2);
    assert_eq!(machine.status(), 1 | 2);
    machine.set_status(0x70);
    assert_eq!(machine.status(), 1 | 2);
    machine.set_status(0x80);
    assert_eq!(machine.status(), 0x83);
}

/// Section 3.1.1: the driver needs an agreement before it sets DRIVER_OK.
#[test]
fn driver_ok_without_features_ok_needs_a_reset() {
    let machine = Machine::new();
    machine.set_status(1 | 2);
    machine.set_status(1 | 2 | 4);
    assert_eq!(machine.status(), 0x40 | 1 | 2);
    assert!(!machine.is_active());
    assert_eq!(machine.negotiate(VERSION_1), 1 | 2 | 8);
}

/// Section 2.1.1: after FAILED the driver resets the device before it tries again.
#[test]
fn a_failed_driver_starts_over_with_a_reset() {
    let machine = Machine::new();
    machine.negotiate(VERSION_1);
    machine.set_status(1 | 2 | 8 | 128);
    machine.set_status(1 | 2 | 4 | 8 | 128);
    assert_eq!(machine.status(), 1 | 2 | 8 | 128);
    assert!(!machine.is_active());
    machine.drive();
    assert!(machine.is_active());
}

/// Section 2.1.2: after DEVICE_NEEDS_RESET nothing but a reset helps.
#[test]
fn a_device_that_needs_a_reset_is_not_activated() {
    let machine = Machine::new();
    machine.negotiate(VERSION_1);
    machine.interrupt().needs_reset();
    machine.set_status(1 | 2 | 4 | 8);
    assert_eq!(machine.status(), 0x40 | 1 | 2 | 8);
    assert!(!machine.is_active());
}

/// Section 4.1.4.3: device_status is a byte; a wider write is none to it.
#[test]
fn a_wide_write_to_the_status_is_dropped() {
    let machine = Machine::new();
    machine.set_status(1);
    machine.write(COMMON, DEVICE_STATUS, &[0, 0]);
    machine.write(COMMON, DEVICE_STATUS, &[0; 4]);
    machine.write(COMMON, 0x10, &[0; 8]);
    assert_eq!(machine.status(), 1);
    assert_eq!(machine.resets(), 0);
}

/// Section 2.5: the configuration space is read and written before FEATURES_OK too; past its end
/// it reads as zero.
#[test]
fn the_device_configuration_is_the_devices() {
    let machine = Machine::new();
    assert_eq!(machine.read(DEVICE, 2), [2, 3, 4, 5]);
    assert_eq!(machine.read(DEVICE, 15), [15, 0]);
    assert_eq!(machine.read(DEVICE, 0xfff), [0; 4]);
    assert_eq!(machine.read(DEVICE, 8), [8, 9, 10, 11, 12, 13, 14, 15]);
    machine.write(DEVICE, 3, &[0xaa]);
    assert_eq!(lock(&machine.device).config[2..5], [2, 0xaa, 4]);
}
