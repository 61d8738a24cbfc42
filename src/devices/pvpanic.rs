//! pvpanic: the guest's kernel tells that it panicked (docs/specs/pvpanic.rst of QEMU, and
//! include/uapi/misc/pvpanic.h of Linux).

use crate::devices::BusDevice;
use crate::devices::throttle::Throttle;

/// The guest panicked.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and goes on in a crash kernel of its own.
const CRASH_LOADED: u8 = 1 << 1;

/// The event port, one byte.
pub struct PvPanic<F> {
    panicked: F,
    warnings: Throttle,
}

impl<F: Fn() + Send + Sync> PvPanic<F> {
    /// A port that calls `panicked` when the guest's kernel has panicked.
    pub fn new(panicked: F) -> Self {
        PvPanic {
            panicked,
            warnings: Throttle::default(),
        }
    }
}

impl<F: Fn() + Send + Sync> BusDevice for PvPanic<F> {
    /// Reading tells which events are understood.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(events) = data.first_mut() {
            *events = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        match data.first() {
            Some(event) if event & CRASH_LOADED != 0 => {
                if let Some(held_back) = self.warnings.pass() {
                    tracing::warn!(held_back, "the guest panicked and starts its crash kernel");
                }
            }
            Some(event) if event & PANICKED != 0 => (self.panicked)(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn a_panic_is_reported_and_a_crash_kernel_is_let_run() {
        let panics = AtomicU32::new(0);
        let device = PvPanic::new(|| {
            panics.fetch_add(1, Ordering::Relaxed);
        });
        let mut events = [0];
        device.read(0, &mut events);
        assert_eq!(events, [PANICKED | CRASH_LOADED]);
        device.write(0, &[CRASH_LOADED]);
        assert_eq!(panics.load(Ordering::Relaxed), 0);
        device.write(0, &[PANICKED]);
        assert_eq!(panics.load(Ordering::Relaxed), 1);
    }
}
