//! Power off, reset and the power button, as the ACPI tables describe them.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::devices::BusDevice;
use crate::devices::throttle::Throttle;

/// Sleep control register (ACPI 6.5, 4.8.3.7), from the base of the registers.
pub const SLEEP_CONTROL_OFFSET: u64 = 0;
/// Sleep status register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_STATUS_OFFSET: u64 = 1;
/// Reset register (ACPI 6.5, 4.8.3.6).
pub const RESET_OFFSET: u64 = 2;
/// Number of registers, a byte each.
pub const REGISTERS: u64 = 3;

/// What to write to the reset register.
pub const RESET_VALUE: u8 = 0x1;
/// Sleep type of the soft-off state.
pub const S5: u8 = 5;

/// Who is told that the guest ended itself.
pub trait PowerEvents: Send + Sync {
    /// The guest powers the machine off.
    fn power_off(&self);
    /// The guest resets the machine.
    fn reset(&self);
}

/// The ACPI sleep and reset registers.
pub struct PowerRegisters {
    events: Arc<dyn PowerEvents>,
    warnings: Throttle,
}

impl PowerRegisters {
    /// Registers that report to `events`.
    pub fn new(events: Arc<dyn PowerEvents>) -> Self {
        PowerRegisters {
            events,
            warnings: Throttle::default(),
        }
    }
}

impl BusDevice for PowerRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Nothing woke the machine up: WAK_STS is clear, and the rest is write-only.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const SLEEP_ENABLE: u8 = 1 << 5;
        let sleep_type = |value: u8| value >> 2 & 0x7;
        match (offset, data) {
            (SLEEP_CONTROL_OFFSET, &[value, ..]) if value & SLEEP_ENABLE != 0 => {
                match sleep_type(value) {
                    S5 => self.events.power_off(),
                    other => {
                        if let Some(held_back) = self.warnings.pass() {
                            tracing::warn!(
                                held_back,
                                "guest asks for sleep type {other}, which it was not offered"
                            );
                        }
                    }
                }
            }
            (RESET_OFFSET, &[RESET_VALUE, ..]) => self.events.reset(),
            _ => {}
        }
    }
}

/// The keyboard controller's command port: all there is of it is the pulse of the reset line,
/// for guests that know no ACPI (`reboot=k`).
pub struct KeyboardController {
    events: Arc<dyn PowerEvents>,
}

impl KeyboardController {
    /// A port that reports to `events`.
    pub fn new(events: Arc<dyn PowerEvents>) -> Self {
        KeyboardController { events }
    }
}

impl BusDevice for KeyboardController {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Status: the input buffer is empty, so the guest may send its command.
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        const PULSE_RESET: u8 = 0xfe;
        if data.first() == Some(&PULSE_RESET) {
            self.events.reset();
        }
    }
}

/// The power button: one press is one edge of the generic event device's interrupt.
pub struct PowerButton {
    interrupt: EventFd,
}

impl PowerButton {
    /// A button that signals `interrupt`.
    pub fn new(interrupt: EventFd) -> Self {
        PowerButton { interrupt }
    }

    /// Presses it. What follows is the guest's business.
    pub fn press(&self) -> io::Result<()> {
        self.interrupt.write(1)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Record(Mutex<Vec<&'static str>>);

    impl PowerEvents for Record {
        fn power_off(&self) {
            self.0.lock().unwrap().push("off");
        }
        fn reset(&self) {
            self.0.lock().unwrap().push("reset");
        }
    }

    fn after(writes: &[(u64, u8)]) -> Vec<&'static str> {
        let record = Arc::new(Record::default());
        let registers = PowerRegisters::new(Arc::clone(&record) as Arc<dyn PowerEvents>);
        for (offset, value) in writes {
            registers.write(*offset, &[*value]);
        }
        record.0.lock().unwrap().clone()
    }

    #[test]
    fn sleep_type_5_with_the_enable_bit_powers_off() {
        assert_eq!(after(&[(SLEEP_CONTROL_OFFSET, 5 << 2 | 1 << 5)]), ["off"]);
    }

    #[test]
    fn without_the_enable_bit_or_with_another_type_nothing_happens() {
        let other = [
            (SLEEP_CONTROL_OFFSET, 5 << 2),
            (SLEEP_CONTROL_OFFSET, 3 << 2 | 1 << 5),
        ];
        assert!(after(&other).is_empty());
    }

    #[test]
    fn only_the_reset_value_resets() {
        assert_eq!(
            after(&[(RESET_OFFSET, 0), (RESET_OFFSET, RESET_VALUE)]),
            ["reset"]
        );
    }

    #[test]
    fn the_keyboard_controller_resets_by_its_pulse_command() {
        let record = Arc::new(Record::default());
        let port = KeyboardController::new(Arc::clone(&record) as Arc<dyn PowerEvents>);
        port.write(0, &[0xed]);
        port.write(0, &[0xfe]);
        assert_eq!(*record.0.lock().unwrap(), ["reset"]);
    }
}
