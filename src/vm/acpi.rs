//! The ACPI tables: a hardware-reduced machine (ACPI 6.5, 4.1) with a PCI bus, a serial port, a
//! power button and a panic notifier.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace as Window, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Method, Name,
    Notify, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::config::{ConsoleMode, Vm};
use crate::devices::power::{
    RESET_OFFSET, RESET_VALUE, S5, SLEEP_CONTROL_OFFSET, SLEEP_STATUS_OFFSET,
};
use crate::devices::{GuestMemory, serial};
use crate::{Error, Result};

const OEM_ID: [u8; 6] = *b"LAUNCH";
const TABLE_ID: [u8; 8] = *b"LAUNCHER";
const REVISION: u32 = 1;

/// What the tables describe.
pub(crate) struct Machine {
    /// Number of vCPUs.
    pub(crate) cpus: u32,
    /// Whether there is a serial port.
    pub(crate) serial: bool,
}

impl Machine {
    /// What the tables of a VM describe.
    pub(crate) fn of(config: &Vm) -> Machine {
        Machine {
            cpus: config.cpus,
            serial: config.console.mode != ConsoleMode::Off,
        }
    }
}

/// Writes the tables and returns the address of the root pointer.
pub(crate) fn write(memory: &GuestMemory, machine: &Machine) -> Result<u64> {
    let address = layout::ACPI.start;
    memory
        .write_slice(&tables(machine)?, GuestAddress(address))
        .map_err(|error| Error::failed(format!("cannot write the ACPI tables: {error}")))?;
    Ok(address)
}

/// The tables as they lie in memory from [`layout::ACPI`] on, the root pointer first.
pub(crate) fn tables(machine: &Machine) -> Result<Vec<u8>> {
    let mut all = vec![0; Rsdp::len()];
    let mut place = |table: Vec<u8>| {
        // Tables are aligned for readers that care; the standard does not ask for it.
        all.resize(all.len().next_multiple_of(16), 0);
        let address = layout::ACPI.start + all.len() as u64;
        all.extend(table);
        address
    };
    let dsdt = place(dsdt(machine));
    let fadt = place(fadt(dsdt));
    let madt = place(madt(machine.cpus));
    let mut xsdt = XSDT::new(OEM_ID, TABLE_ID, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt));
    all.splice(..Rsdp::len(), bytes(&Rsdp::new(OEM_ID, xsdt)));
    if all.len() as u64 > layout::ACPI.end - layout::ACPI.start {
        return Err(Error::failed(
            "the ACPI tables do not fit into the memory kept for them",
        ));
    }
    Ok(all)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed description (5.2.9): no legacy hardware, power off and reset through one byte port each.
fn fadt(dsdt: u64) -> Vec<u8> {
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_CLOCK: u16 = 1 << 5;
    let register = |offset: u64| {
        let port = u64::from(layout::POWER_PORT) + offset;
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
    };
    let mut fadt = FADTBuilder::new(OEM_ID, TABLE_ID, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Both set: no fixed-hardware buttons; the power button is a device.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = register(RESET_OFFSET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(SLEEP_CONTROL_OFFSET);
    fadt.sleep_status_reg = register(SLEEP_STATUS_OFFSET);
    bytes(&fadt.finalize())
}

/// Interrupt controllers (5.2.12): a local APIC for each vCPU, one I/O APIC.
fn madt(cpus: u32) -> Vec<u8> {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, TABLE_ID, REVISION, local);
    for id in 0..cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    bytes(&madt)
}

/// The devices (5.2.11.1), in ACPI's machine language.
fn dsdt(machine: &Machine) -> Vec<u8> {
    let mut aml = Vec::new();
    pci_bus(&mut aml);
    if machine.serial {
        serial_port(&mut aml);
    }
    power_button(&mut aml);
    panic_notifier(&mut aml);
    // \_S5: the sleep type to write for power off (7.4.2).
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&S5, &0_u8, &0_u8, &0_u8]),
    )
    .to_aml_bytes(&mut aml);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, TABLE_ID, REVISION);
    dsdt.append_slice(&aml);
    dsdt.as_slice().to_vec()
}

/// A device in `\_SB`.
fn device(aml: &mut Vec<u8>, name: &str, children: Vec<&dyn Aml>) {
    let device = Device::new(Path::new(name), children);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(aml);
}

/// An interrupt that this device raises alone, by an edge.
fn edge(irq: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, irq)
}

/// A byte range of I/O ports.
fn ports(first: u16, len: u8) -> IO {
    IO::new(first, first, 1, len)
}

/// The PCI host bridge: bus 0 with its configuration ports, I/O ports and memory window.
fn pci_bus(aml: &mut Vec<u8>) {
    let window = &layout::PCI_WINDOW;
    let memory = Window::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        window.start as u32,
        (window.end - 1) as u32,
        None,
    );
    let config = layout::PCI_CONFIG_PORT;
    device(
        aml,
        "PCI0",
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_ADR"), &0_u8),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Window::new_bus_number(0_u16, 0_u16),
                    &ports(config, 8),
                    &Window::new_io(0_u16, config - 1, None),
                    &Window::new_io(config + 8, 0xffff, None),
                    &memory,
                ]),
            ),
        ],
    );
}

fn serial_port(aml: &mut Vec<u8>) {
    device(
        aml,
        "COM1",
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &edge(layout::SERIAL_IRQ),
                    &ports(layout::SERIAL_PORT, serial::PORTS),
                ]),
            ),
        ],
    );
}

/// The power button (4.8.2.2.1.2) and the generic event device (5.6.9) that reports its press:
/// it is the only event of its interrupt, so that there is nothing to ask a register for.
fn power_button(aml: &mut Vec<u8>) {
    const PRESSED: u8 = 0x80;
    device(
        aml,
        "PWRB",
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
            &Name::new(Path::new("_UID"), &0_u8),
        ],
    );
    device(
        aml,
        "GED_",
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&edge(layout::POWER_BUTTON_IRQ)]),
            ),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &PRESSED)],
            ),
        ],
    );
}

/// pvpanic, under the name that QEMU gave it (docs/specs/pvpanic.rst there).
fn panic_notifier(aml: &mut Vec<u8>) {
    const PRESENT_ENABLED_SHOWN: u8 = 0xf;
    device(
        aml,
        "PEVT",
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(Path::new("_STA"), &PRESENT_ENABLED_SHOWN),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&ports(layout::PVPANIC_PORT, 1)]),
            ),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(table: &[u8]) -> u8 {
        table.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(memory: &GuestMemory, address: u64) -> u64 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut table = vec![0; len as usize];
        memory
            .read_slice(&mut table, GuestAddress(address))
            .unwrap();
        table
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_sums_to_zero() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let root = write(
            &memory,
            &Machine {
                cpus: 254,
                serial: true,
            },
        )
        .unwrap();
        let xsdt = table(&memory, u64_at(&memory, root + 24));
        assert_eq!((&xsdt[..4], sum(&xsdt)), (b"XSDT".as_slice(), 0));
        let entries: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(&memory, u64::from_le_bytes(entry.try_into().unwrap())))
            .collect();
        let [fadt, madt] = entries.as_slice() else {
            panic!("{} entries", entries.len())
        };
        assert_eq!((&fadt[..4], sum(fadt)), (b"FACP".as_slice(), 0));
        assert_eq!((&madt[..4], sum(madt)), (b"APIC".as_slice(), 0));
        assert_eq!(madt.len(), 44 + 254 * 8 + 12);
        let dsdt = table(
            &memory,
            u64::from_le_bytes(fadt[140..148].try_into().unwrap()),
        );
        assert_eq!((&dsdt[..4], sum(&dsdt)), (b"DSDT".as_slice(), 0));
    }

    #[test]
    fn without_a_console_there_is_no_serial_port() {
        let named = |serial| {
            dsdt(&Machine { cpus: 1, serial })
                .windows(4)
                .any(|w| w == b"COM1")
        };
        assert!(named(true) && !named(false));
    }
}
