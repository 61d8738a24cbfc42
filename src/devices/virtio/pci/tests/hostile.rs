//! A guest that does anything at all: no panic, no hang, and the device works after a reset.

use super::*;

/// A small generator of numbers, the same in each run (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Bytes that are often all zeros, all ones, or a small number.
    fn data(&mut self) -> Vec<u8> {
        let len = [1, 2, 4, 8, 3][self.below(5) as usize];
        let value = match self.below(4) {
            0 => 0,
            1 => u64::MAX,
            2 => self.below(300),
            _ => self.next(),
        };
        value.to_le_bytes()[..len].to_vec()
    }
}

impl Machine {
    /// One thing that a guest, or the device meanwhile, can do.
    fn act(&self, numbers: &mut Numbers) {
        let data = numbers.data();
        let page = numbers.below(9);
        // Mostly where there are registers.
        let offset = match numbers.below(8) {
            0 => numbers.below(PAGE),
            1 => PAGE - 1 - numbers.below(8),
            _ => numbers.below(0x40),
        };
        match numbers.below(20) {
            0..8 => self.write(page, offset, &data),
            8..11 => {
                self.read::<8>(page, offset);
                self.read::<1>(page, offset);
            }
            11 => self.set_status(numbers.next() as u8 & 0x8f),
            12 => self.write(COMMON, common::QUEUE_ENABLE, &[1, 0]),
            13 => {
                self.config(numbers.below(256) as u8);
                self.ports.read(4 + numbers.below(4), &mut [0; 2]);
            }
            14 => self.ports.write(numbers.below(8), &data),
            15 => self.write_config(numbers.below(256) as u8, &data),
            16 => {
                let capability = self.capability(0x09, Some(5));
                self.write_config(
                    capability + 8,
                    &(numbers.below(BAR_LEN) as u32).to_le_bytes(),
                );
                self.write_config(capability + 12, &[1 << numbers.below(4), 0, 0, 0]);
                self.write_config(capability + 16, &data);
                self.config(capability + 16);
            }
            17 => self.interrupt().queue(numbers.below(4) as u16),
            18 => match numbers.below(50) {
                0 => self.interrupt().needs_reset(),
                _ => self.interrupt().config_changed(),
            },
            _ => {
                // Firmware's state, or else hardly anything would be reached.
                self.write_config(BAR0, &(self.bar as u32).to_le_bytes());
                self.write_config(COMMAND, &[0b110, 0]);
                if numbers.below(4) == 0 {
                    self.negotiate(VERSION_1);
                    self.enable_queue(numbers.below(3) as u16);
                    self.set_status(4);
                }
            }
        }
    }

    /// After whatever happened, a driver that starts over finds a working device.
    fn assert_usable(&self) {
        self.write_config(BAR0, &(self.bar as u32).to_le_bytes());
        self.write_config(COMMAND, &[0b110, 0]);
        self.set_status(0);
        self.drive();
        self.set_msix_control(0);
        let msis = self.hypervisor.msis.lock().unwrap().clone();
        msis.iter().for_each(|msi| {
            msi.signals();
        });
        self.map_vectors(2);
        let signalled = |queue| {
            self.interrupt().queue(queue);
            let msis = self.hypervisor.msis.lock().unwrap();
            msis.iter().map(|msi| msi.signals()).sum::<u64>()
        };
        assert_eq!((signalled(0), signalled(1)), (1, 1));
    }
}

/// 100,000 accesses of all widths.
#[test]
fn random_accesses_never_panic() {
    let machine = Machine::new();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for step in 1..=100_000 {
        machine.act(&mut numbers);
        if step % 5_000 == 0 {
            machine.assert_usable();
        }
    }
    let activations = lock(&machine.device).activations;
    assert!(activations > 500, "only {activations} activations");
}

/// The same from several vCPUs, with the device's thread interrupting meanwhile.
#[test]
fn random_accesses_from_several_vcpus_never_hang() {
    let machine = Machine::new();
    std::thread::scope(|scope| {
        for seed in 1..=4 {
            let machine = &machine;
            scope.spawn(move || {
                let ports = ConfigPorts::new(machine.bus.clone());
                let vcpu = Machine {
                    hypervisor: machine.hypervisor.clone(),
                    device: machine.device.clone(),
                    bus: machine.bus.clone(),
                    ports,
                    window: Window::new(machine.bus.clone()),
                    bar: machine.bar,
                };
                let mut numbers = Numbers(0x1234_5678 * seed);
                for _ in 0..5_000 {
                    vcpu.act(&mut numbers);
                }
            });
        }
    });
    machine.assert_usable();
}
