//! The first vCPU's registers as a boot protocol wants them.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::super::layout;
use super::{GuestMemory, PAGE, write};
use crate::Result;

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 64-bit mode, `rsi` is `boot_params` (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    Linux64 {
        /// Address of the first instruction.
        rip: u64,
    },
    /// 32-bit protected mode without paging, `ebx` is `hvm_start_info` (Xen's misc/pvh).
    Pvh {
        /// Address of the first instruction.
        rip: u64,
    },
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Selectors, and indices into the table below times eight: `__BOOT_CS` and `__BOOT_DS` of the
/// Linux boot protocol.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

impl Entry {
    /// Writes the tables that the registers point to.
    pub(super) fn prepare(self, memory: &GuestMemory) -> Result<()> {
        let [code, data, task] = self.segments();
        let table: Vec<u8> = [
            0,
            0,
            descriptor(&code),
            descriptor(&data),
            descriptor(&task),
        ]
        .iter()
        .flat_map(|d| d.to_le_bytes())
        .collect();
        write(memory, &table, layout::GDT)?;
        match self {
            Entry::Linux64 { .. } => write_page_tables(memory),
            Entry::Pvh { .. } => Ok(()),
        }
    }

    /// Code, data and task segment.
    fn segments(self) -> [kvm_segment; 3] {
        let long = matches!(self, Entry::Linux64 { .. });
        let flat = kvm_segment {
            limit: 0xffff_ffff,
            present: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let code = kvm_segment {
            selector: CODE,
            type_: 0xb,
            l: long.into(),
            db: (!long).into(),
            ..flat
        };
        let data = kvm_segment {
            selector: DATA,
            type_: 0x3,
            db: 1,
            ..flat
        };
        let task = kvm_segment {
            selector: TASK,
            type_: 0xb,
            limit: 0x67,
            present: 1,
            ..Default::default()
        };
        [code, data, task]
    }

    /// Segment and control registers, on top of those that KVM resets a vCPU to.
    pub(crate) fn special(self, reset: kvm_sregs) -> kvm_sregs {
        let [cs, data, tr] = self.segments();
        let sregs = kvm_sregs {
            cs,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr,
            gdt: kvm_dtable {
                base: layout::GDT,
                limit: 5 * 8 - 1,
                ..Default::default()
            },
            idt: kvm_dtable::default(),
            ..reset
        };
        match self {
            Entry::Linux64 { .. } => kvm_sregs {
                cr0: CR0_PE | CR0_ET | CR0_PG,
                cr3: layout::PAGE_TABLES,
                cr4: CR4_PAE,
                efer: EFER_LME | EFER_LMA,
                ..sregs
            },
            Entry::Pvh { .. } => kvm_sregs {
                cr0: CR0_PE | CR0_ET,
                cr4: 0,
                efer: 0,
                ..sregs
            },
        }
    }

    /// General registers; interrupts are off.
    pub(crate) fn general(self) -> kvm_regs {
        const RFLAGS_RESERVED: u64 = 1 << 1;
        let regs = kvm_regs {
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        match self {
            Entry::Linux64 { rip } => kvm_regs {
                rip,
                rsi: layout::BOOT_PARAMS,
                ..regs
            },
            Entry::Pvh { rip } => kvm_regs {
                rip,
                rbx: layout::PVH_START_INFO,
                ..regs
            },
        }
    }
}

/// A segment in the form of a descriptor table entry (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let base = segment.base;
    let access =
        u64::from(segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7);
    let flags = u64::from(segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3);
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// Maps the first 4 GiB to themselves in pages of 2 MiB.
fn write_page_tables(memory: &GuestMemory) -> Result<()> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const LARGE: u64 = 0x80;
    let (pml4, pdpt, directories) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + PAGE,
        layout::PAGE_TABLES + 2 * PAGE,
    );
    let entries = |table: u64, entries: &mut dyn Iterator<Item = u64>| {
        write(
            memory,
            &entries.flat_map(u64::to_le_bytes).collect::<Vec<u8>>(),
            table,
        )
    };
    entries(pml4, &mut [pdpt | PRESENT_WRITABLE].into_iter())?;
    entries(
        pdpt,
        &mut (0..4).map(|gib| (directories + gib * PAGE) | PRESENT_WRITABLE),
    )?;
    entries(
        directories,
        &mut (0..4 * 512).map(|page| page << 21 | LARGE | PRESENT_WRITABLE),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_64_bit_code_segment_encodes_as_the_manual_says() {
        let [code, data, _] = Entry::Linux64 { rip: 0 }.segments();
        assert_eq!(descriptor(&code), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn pvh_starts_in_protected_mode_without_paging() {
        let entry = Entry::Pvh { rip: 0x100_0000 };
        let sregs = entry.special(kvm_sregs::default());
        assert_eq!(
            (sregs.cr0 & CR0_PG, sregs.cr0 & CR0_PE, sregs.efer),
            (0, CR0_PE, 0)
        );
        assert_eq!((sregs.cs.db, sregs.cs.l), (1, 0));
        assert_eq!(entry.general().rbx, layout::PVH_START_INFO);
    }
}
