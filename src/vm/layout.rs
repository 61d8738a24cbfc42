//! The guest's physical address space and its I/O ports: every constant of it, in one place.
//!
//! ```text
//! 0x0000_0000  RAM: GDT, page tables, boot_params, command line
//! 0x0009_fc00  reserved; the ACPI tables lie at 0xe_0000
//! 0x0010_0000  RAM: kernel, then what the guest likes; initrd at its top
//! 0xc000_0000  PCI memory window, then the I/O APIC, local APICs and KVM's own pages
//! 0x1_0000_0000  RAM that did not fit below
//! ```

use std::ops::Range;

/// Where RAM below 4 GiB ends at the latest: the hole for devices begins here.
pub(crate) const HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
pub(crate) const HOLE_END: u64 = 0x1_0000_0000;

/// Global descriptor table of the boot state.
pub(crate) const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH boot protocol, with its memory map and module list behind it.
pub(crate) const PVH_START_INFO: u64 = 0x6000;
/// `boot_params` of the Linux boot protocol (one page).
pub(crate) const BOOT_PARAMS: u64 = 0x7000;
/// Page tables of the 64-bit entry: PML4, PDPT and four page directories, a page each.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// End of the low RAM that the guest may use; firmware keeps its data from here to 1 MiB.
pub(crate) const LOW_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables. RSDP scans look in this range too.
pub(crate) const ACPI: Range<u64> = 0xe_0000..RESET_VECTOR;
/// Where a kernel jumps in real mode, as to a BIOS, when it knows no better way to reset.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;
/// Where RAM goes on after the first MiB's reserved part.
pub(crate) const HIGH_RAM: u64 = 0x10_0000;

/// Memory window of the PCI bus.
pub(crate) const PCI_WINDOW: Range<u64> = HOLE_START..0xfc00_0000;
/// I/O APIC, as KVM places it (arch/x86/include/asm/kvm_host.h).
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
/// Local APICs (Intel SDM volume 3, 10.4.1).
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page that KVM needs on some Intel hosts (KVM_SET_IDENTITY_MAP_ADDR).
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on some Intel hosts (KVM_SET_TSS_ADDR).
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// First serial port (COM1).
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of COM1.
pub(crate) const SERIAL_IRQ: u32 = 4;
/// Keyboard controller's command port: a guest that knows no ACPI resets through it.
pub(crate) const KEYBOARD_CONTROLLER_PORT: u16 = 0x64;
/// pvpanic, at the port that QEMU gives it.
pub(crate) const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control, sleep status and reset registers.
pub(crate) const POWER_PORT: u16 = 0x600;
/// Interrupt of the ACPI generic event device: the power button.
pub(crate) const POWER_BUTTON_IRQ: u32 = 5;
/// Address and data ports of PCI configuration mechanism #1.
pub(crate) const PCI_CONFIG_PORT: u16 = 0xcf8;
