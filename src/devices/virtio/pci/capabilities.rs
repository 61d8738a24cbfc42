//! How a driver finds its way: the PCI identity, the layout of the BAR, the capabilities that
//! describe it (sections 4.1.2 and 4.1.4).

use super::common;
use crate::devices::pci::config::{ConfigSpace, Identity};
use crate::devices::pci::msix::{self, Msix};
use crate::{Error, Result};

/// Size of the BAR, in bytes.
pub(super) const BAR_LEN: u64 = 0x8000;
/// Every structure of the BAR has a page to itself, so that a hypervisor could map or trap each.
pub(super) const PAGE: u64 = 0x1000;
/// Page of the common configuration.
pub(super) const COMMON: u64 = 0;
/// Page of the ISR status.
pub(super) const ISR: u64 = 1;
/// Page of the device-specific configuration.
pub(super) const DEVICE: u64 = 2;
/// Page of the Queue Notify addresses.
pub(super) const NOTIFY: u64 = 3;
/// Page of the MSI-X table.
pub(super) const MSIX_TABLE: u64 = 4;
/// Page of the MSI-X pending bits.
pub(super) const MSIX_PENDING: u64 = 5;
/// Bytes from one queue's Queue Notify address to the next.
pub(super) const NOTIFY_OFF_MULTIPLIER: u64 = 4;
/// Most virtqueues whose Queue Notify addresses fit into their page.
pub(super) const MAX_QUEUES: usize = (PAGE / NOTIFY_OFF_MULTIPLIER) as usize;
/// Most MSI-X vectors of a device. More queues than that share vectors.
pub(super) const MAX_VECTORS: u16 = 65;

const _: () = assert!(MAX_VECTORS as u64 * msix::ENTRY_LEN <= PAGE);

/// Vendor ID of virtio devices (section 4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device ID of device type 0.
const FIRST_DEVICE: u16 = 0x1040;
/// The last device type with a device ID of its own.
const LAST_TYPE: u16 = 0x3f;
/// Capability ID: vendor-specific.
const VENDOR_SPECIFIC: u8 = 0x09;

const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// `struct virtio_pci_cap` in bytes (section 4.1.4), with what follows it for one structure.
fn capability(cfg_type: u8, page: u64, len: u64, extra: &[u8]) -> Vec<u8> {
    let cap_len = 16 + extra.len() as u8;
    let mut registers = vec![VENDOR_SPECIFIC, 0, cap_len, cfg_type, 0, 0, 0, 0];
    registers.extend(((page * PAGE) as u32).to_le_bytes());
    registers.extend((len as u32).to_le_bytes());
    registers.extend(extra);
    registers
}

/// Offsets of the capabilities that are more than a description.
pub(super) struct Offsets {
    /// MSI-X.
    pub(super) msix: u8,
    /// VIRTIO_PCI_CAP_PCI_CFG.
    pub(super) pci_cfg: u8,
}

/// The configuration space of a virtio device.
///
/// Fails if there is no device ID for `device_type`.
pub(super) fn config_space(
    device_type: u32,
    queues: usize,
    msix: &Msix,
) -> Result<(ConfigSpace, Offsets)> {
    let device = u16::try_from(device_type)
        .ok()
        .filter(|device_type| (1..=LAST_TYPE).contains(device_type))
        .map(|device_type| FIRST_DEVICE + device_type)
        .ok_or_else(|| {
            Error::failed(format!(
                "virtio device type {device_type} has no PCI device ID, expected 1 to {LAST_TYPE}"
            ))
        })?;
    let mut config = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device,
        revision: 1,
        class: match device_type {
            2 => 0x01_80_00,
            4 => 0x00_ff_00,
            _ => 0xff_00_00,
        },
        subsystem_vendor: VENDOR,
        subsystem: device,
    })
    .memory_bar(BAR_LEN as u32);

    let (registers, writable) =
        msix.capability((MSIX_TABLE * PAGE) as u32, (MSIX_PENDING * PAGE) as u32);
    let msix = config.add_capability(&registers, &writable)?;
    let multiplier = (NOTIFY_OFF_MULTIPLIER as u32).to_le_bytes();
    let notify_len = NOTIFY_OFF_MULTIPLIER * queues.max(1) as u64;
    for registers in [
        capability(COMMON_CFG, COMMON, common::LEN, &[]),
        capability(NOTIFY_CFG, NOTIFY, notify_len, &multiplier),
        capability(ISR_CFG, ISR, 1, &[]),
        // The device knows how long its configuration is; the rest of the page is padding.
        capability(DEVICE_CFG, DEVICE, PAGE, &[]),
    ] {
        config.add_capability(&registers, &[])?;
    }
    let registers = capability(PCI_CFG, 0, 0, &[0; 4]);
    let mut writable = [0; 20];
    writable[4] = 0xff;
    writable[8..].fill(0xff);
    let pci_cfg = config.add_capability(&registers, &writable)?;
    Ok((config, Offsets { msix, pci_cfg }))
}

/// Offset of `pci_cfg_data` in VIRTIO_PCI_CAP_PCI_CFG.
const PCI_CFG_DATA: u8 = 16;

impl Offsets {
    /// Where the MSI-X message control register is.
    pub(super) fn msix_control(&self) -> u8 {
        self.msix + msix::CONTROL
    }

    /// Whether `len` registers from `offset` on include the MSI-X message control register.
    pub(super) fn touches_msix_control(&self, offset: u8, len: usize) -> bool {
        touches(self.msix_control(), 2, offset, len)
    }

    /// Where `pci_cfg_data` is.
    pub(super) fn pci_cfg_data(&self) -> u8 {
        self.pci_cfg + PCI_CFG_DATA
    }

    /// Whether `len` registers from `offset` on include some of `pci_cfg_data`.
    pub(super) fn touches_pci_cfg_data(&self, offset: u8, len: usize) -> bool {
        touches(self.pci_cfg_data(), 4, offset, len)
    }

    /// The access to the BAR that `pci_cfg_data` stands for: its offset and length (section
    /// 4.1.4.9). None if the driver set up one that it must not make.
    pub(super) fn pci_cfg_window(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let mut bar = [0];
        config.read(self.pci_cfg + 4, &mut bar);
        let offset = config.u32(self.pci_cfg + 8);
        let len = config.u32(self.pci_cfg + 12);
        let allowed = bar == [0]
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len)
            && u64::from(offset) < BAR_LEN;
        allowed.then_some((offset.into(), len as usize))
    }
}

fn touches(register: u8, register_len: usize, offset: u8, len: usize) -> bool {
    let (register, offset) = (usize::from(register), usize::from(offset));
    offset < register + register_len && register < offset + len
}
