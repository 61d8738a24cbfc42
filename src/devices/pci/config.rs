//! The configuration space of a PCI function (PCI 3.0 chapter 6): registers, the memory BAR, the
//! list of capabilities.

use std::ops::Range;

use crate::{Error, Result};

/// Length of the configuration space, in bytes.
pub const LEN: usize = 256;
/// Vendor ID, device ID.
const ID: usize = 0x00;
/// Command register (section 6.2.2).
pub const COMMAND: u8 = 0x04;
/// Command: the function answers at the addresses of its memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may access memory.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: the function does not use INTx.
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status register (section 6.2.3).
const STATUS: usize = 0x06;
/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// Revision ID, class code.
const CLASS: usize = 0x08;
/// Header type (section 6.2.1); bit 7 is set in a device of several functions.
pub const HEADER_TYPE: u8 = 0x0e;
/// Header type: there are functions beside function 0.
pub const MULTI_FUNCTION: u8 = 1 << 7;
/// The first base address register (section 6.2.5).
pub const BAR0: u8 = 0x10;
/// Subsystem vendor ID, subsystem ID.
const SUBSYSTEM: usize = 0x2c;
/// Offset of the first capability.
const CAPABILITIES: usize = 0x34;
/// Which interrupt line is used: a scratch register for the guest (section 6.2.4).
const INTERRUPT_LINE: usize = 0x3c;
/// The registers from here on depend on the device.
const HEADER_END: usize = 0x40;

/// What a function is: the read-only registers of the header (section 6.2.1).
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class, sub-class and programming interface, 24 bits.
    pub class: u32,
    /// Subsystem vendor ID; 0 where there is none.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A configuration space with a type 0 header, and at most one memory BAR, BAR 0.
///
/// Every register is bytes and a mask of the bits that the guest may write. The BAR's sizing
/// protocol (section 6.2.5.1) follows from its mask: bits below the size are zero for ever.
pub struct ConfigSpace {
    registers: [u8; LEN],
    writable: [u8; LEN],
    /// Size of BAR 0, 0 without.
    bar_size: u32,
    /// Where the next capability goes.
    end: usize,
    /// Where its offset goes.
    link: usize,
}

impl ConfigSpace {
    /// The configuration space of a function without BAR or capabilities. Its interrupt pin is 0:
    /// it has no INTx.
    pub fn new(identity: &Identity) -> Self {
        let mut config = ConfigSpace {
            registers: [0; LEN],
            writable: [0; LEN],
            bar_size: 0,
            end: HEADER_END,
            link: CAPABILITIES,
        };
        let id = u32::from(identity.device) << 16 | u32::from(identity.vendor);
        let class = identity.class << 8 | u32::from(identity.revision);
        let subsystem = u32::from(identity.subsystem) << 16 | u32::from(identity.subsystem_vendor);
        put(&mut config.registers, ID, &id.to_le_bytes());
        put(&mut config.registers, CLASS, &class.to_le_bytes());
        put(&mut config.registers, SUBSYSTEM, &subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        put(&mut config.writable, COMMAND.into(), &command.to_le_bytes());
        put(&mut config.writable, INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Makes BAR 0 a 32-bit, non-prefetchable memory BAR of `size` bytes: a power of two, 16 or
    /// more.
    pub fn memory_bar(mut self, size: u32) -> Self {
        debug_assert!(size.is_power_of_two() && size >= 16);
        self.bar_size = size;
        let mask = !(size - 1);
        put(&mut self.writable, BAR0.into(), &mask.to_le_bytes());
        self
    }

    /// Adds a capability (section 6.7) at the end of the list and returns its offset. `registers`
    /// begins with the capability ID and the link, which is filled in here; a set bit of
    /// `writable`, which may be shorter, makes its bit of `registers` writable.
    ///
    /// Fails if the configuration space is full.
    pub fn add_capability(&mut self, registers: &[u8], writable: &[u8]) -> Result<u8> {
        let offset = self.end;
        let end = offset + registers.len().next_multiple_of(4);
        if end > LEN {
            return Err(Error::failed(format!(
                "PCI capabilities end at byte {end} of the configuration space, expected at most {LEN}"
            )));
        }
        put(&mut self.registers, offset, registers);
        put(&mut self.writable, offset, writable);
        self.registers[offset + 1] = 0;
        self.registers[self.link] = offset as u8;
        self.registers[STATUS] |= STATUS_CAPABILITIES;
        self.link = offset + 1;
        self.end = end;
        Ok(offset as u8)
    }

    /// Reads `data.len()` registers from `offset` on; all ones past the end.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        for (byte, index) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.registers.get(index).copied().unwrap_or(0xff);
        }
    }

    /// Writes registers from `offset` on; bits that are not writable stay.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        let registers = self.registers.iter_mut().zip(self.writable);
        for ((register, mask), byte) in registers.skip(offset.into()).zip(data) {
            *register = *register & !mask | byte & mask;
        }
    }

    /// Sets registers from `offset` on, writable by the guest or not.
    pub fn set(&mut self, offset: u8, data: &[u8]) {
        put(&mut self.registers, offset.into(), data);
    }

    /// The 16-bit register at `offset`.
    pub fn u16(&self, offset: u8) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// The 32-bit register at `offset`.
    pub fn u32(&self, offset: u8) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// The addresses at which BAR 0 answers: none while the command register says so, nor
    /// outside of `window`, which is all that the host bridge forwards.
    pub fn decoded(&self, window: &Range<u64>) -> Option<Range<u64>> {
        let start = u64::from(self.u32(BAR0));
        let end = start + u64::from(self.bar_size);
        let decoded = self.bar_size != 0
            && self.u16(COMMAND) & COMMAND_MEMORY != 0
            && window.start <= start
            && end <= window.end;
        decoded.then_some(start..end)
    }
}

/// Copies `data` to `offset`; what would lie past the end is left out.
fn put(registers: &mut [u8; LEN], offset: usize, data: &[u8]) {
    for (register, byte) in registers.iter_mut().skip(offset).zip(data) {
        *register = *byte;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Range<u64> = 0xc000_0000..0xd000_0000;

    fn config() -> ConfigSpace {
        ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af5,
            subsystem: 0x1043,
        })
        .memory_bar(0x8000)
    }

    /// PCI 3.0 section 6.2.1.
    #[test]
    fn the_header_identifies_the_function() {
        let config = config();
        assert_eq!(config.u32(0x00), 0x1042_1af4);
        assert_eq!(config.u32(0x08), 0x0180_0001);
        assert_eq!(config.u32(0x2c), 0x1043_1af5);
        assert_eq!(config.u32(0x0c), 0);
        assert_eq!(config.u32(0x3c), 0, "interrupt pin 0");
    }

    /// PCI 3.0 section 6.1: writes to read-only and reserved registers are dropped.
    #[test]
    fn read_only_registers_ignore_writes() {
        let mut config = config();
        let before = config.registers;
        for offset in (0..=255).filter(|offset| !(0x10..0x14).contains(offset)) {
            config.write(offset, &[0xff]);
        }
        for (offset, (register, before)) in config.registers.iter().zip(before).enumerate() {
            let writable = match offset {
                0x04 => 0b110,
                0x05 => 0b100,
                0x3c => 0xff,
                _ => 0,
            };
            assert_eq!(*register, before | writable, "offset {offset:#x}");
        }
    }

    /// PCI 3.0 section 6.2.5.1.
    #[test]
    fn a_bar_written_with_ones_reads_back_its_size() {
        let mut config = config();
        config.write(BAR0, &0xc000_8000u32.to_le_bytes());
        assert_eq!(config.u32(BAR0), 0xc000_8000);
        config.write(BAR0, &[0xff; 4]);
        assert_eq!(config.u32(BAR0), 0xffff_8000);
        for bar in 1..6 {
            config.write(BAR0 + 4 * bar, &[0xff; 4]);
            assert_eq!(config.u32(BAR0 + 4 * bar), 0, "BAR {bar} does not exist");
        }
        config.write(0x30, &[0xff; 4]);
        assert_eq!(config.u32(0x30), 0, "there is no expansion ROM");
    }

    /// PCI 3.0 section 6.2.2.
    #[test]
    fn a_bar_answers_while_memory_space_is_on_and_inside_the_window() {
        let mut config = config();
        config.write(BAR0, &0xc000_8000u32.to_le_bytes());
        assert_eq!(config.decoded(&WINDOW), None);
        config.write(COMMAND, &[0b10]);
        assert_eq!(config.decoded(&WINDOW), Some(0xc000_8000..0xc001_0000));
        config.write(BAR0, &0xcfff_8000u32.to_le_bytes());
        assert_eq!(config.decoded(&WINDOW), Some(0xcfff_8000..0xd000_0000));
        for outside in [0u32, 0xbfff_8000, 0xd000_0000, 0xffff_8000] {
            config.write(BAR0, &outside.to_le_bytes());
            assert_eq!(config.decoded(&WINDOW), None, "{outside:#x}");
        }
        config.write(BAR0, &0xc000_8000u32.to_le_bytes());
        config.write(COMMAND, &[0b100]);
        assert_eq!(config.decoded(&WINDOW), None);
    }

    /// PCI 3.0 section 6.7.
    #[test]
    fn capabilities_form_a_list() {
        let mut config = config();
        assert_eq!(config.u16(0x06), 0);
        let first = config
            .add_capability(&[0x11, 0xee, 1, 2, 3], &[0, 0, 0, 0xf0])
            .unwrap();
        let second = config.add_capability(&[0x09, 0xee, 4, 5], &[]).unwrap();
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(config.u16(0x06), 1 << 4);
        assert_eq!(config.u32(0x34), 0x40);
        assert_eq!(config.u32(0x40), 0x0201_4811);
        assert_eq!(config.u32(0x48), 0x0504_0009);
        config.write(0x40, &[0xff; 12]);
        assert_eq!(config.u32(0x40), 0xf201_4811);
        assert_eq!(config.u32(0x44), 3);
        assert_eq!(config.u32(0x48), 0x0504_0009);
    }

    #[test]
    fn a_capability_that_does_not_fit_is_an_error() {
        let mut config = config();
        config.add_capability(&[9; 0xc0 - 4], &[]).unwrap();
        let error = config.add_capability(&[9; 5], &[]).unwrap_err();
        assert!(error.to_string().contains("at most 256"), "{error}");
        assert_eq!(config.add_capability(&[9; 4], &[]).unwrap(), 0xfc);
    }

    #[test]
    fn an_access_past_the_end_reads_ones_and_writes_nothing() {
        let mut config = config();
        let mut data = [0; 4];
        config.read(0xfe, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
        config.write(0xfe, &[0xff; 4]);
        config.read(0xfe, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
    }
}
