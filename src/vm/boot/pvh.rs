//! ELF vmlinux: the PVH boot protocol (Xen's misc/pvh and include/xen/interface/hvm/start_info.h
//! of the kernel).

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{KernelLoader, elf};
use vm_memory::{ByteValued, GuestAddress};

use super::{
    BootFile, Entry, GuestMemory, Parameters, layout, load_initrd, low_ram_end, memory_too_small,
    usable_ram, write, write_cmdline,
};
use crate::Result;

/// `magic` of `hvm_start_info`.
const START_MAGIC: u32 = 0x336e_c578;
/// Type of RAM in the memory map, and of what is not to be touched.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h, with its NUL.
const CMDLINE_SIZE: usize = 2048;

pub(super) fn load(
    memory: &GuestMemory,
    kernel: &BootFile,
    initrd: Option<&BootFile>,
    parameters: &Parameters<'_>,
) -> Result<Entry> {
    let memory_size = parameters.memory_size;
    let loaded = Elf::load(
        memory,
        None,
        &mut &kernel.file,
        Some(GuestAddress(layout::HIGH_RAM)),
    );
    let loaded = loaded.map_err(|error| match error {
        linux_loader::loader::Error::Elf(elf::Error::ReadKernelImage) => kernel
            .bad("does not fit into guest memory, or is cut short")
            .help("raise `memory`, or check the file"),
        error => kernel.bad(&format!("cannot be loaded: {error}")),
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(kernel
            .bad("has no PVH entry point")
            .help("build the kernel with CONFIG_PVH=y, or give its bzImage"));
    };
    if loaded.kernel_end > low_ram_end(memory_size) {
        return Err(memory_too_small(
            memory_size,
            loaded.kernel_end,
            "the kernel",
        ));
    }

    write_cmdline(memory, parameters.cmdline, CMDLINE_SIZE - 1)?;
    let mut start_info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: parameters.rsdp,
        ..Default::default()
    };
    let mut tables = Vec::new();
    let tables_address = layout::PVH_START_INFO + size_of::<hvm_start_info>() as u64;
    if let Some(initrd) = initrd {
        let initrd = load_initrd(memory, initrd, loaded.kernel_end, u64::MAX, memory_size)?;
        start_info.nr_modules = 1;
        start_info.modlist_paddr = tables_address;
        let module = hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size,
            ..Default::default()
        };
        tables.extend_from_slice(module.as_slice());
    }
    start_info.memmap_paddr = tables_address + tables.len() as u64;
    let firmware = (layout::LOW_RAM_END, layout::HIGH_RAM - layout::LOW_RAM_END);
    let ram = usable_ram(memory_size)
        .into_iter()
        .map(|range| (range, RAM));
    for ((addr, size), type_) in ram
        .chain([(firmware, RESERVED)])
        .filter(|((_, len), _)| *len > 0)
    {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_,
            ..Default::default()
        };
        tables.extend_from_slice(entry.as_slice());
        start_info.memmap_entries += 1;
    }
    write(memory, start_info.as_slice(), layout::PVH_START_INFO)?;
    write(memory, &tables, tables_address)?;

    let entry = Entry::Pvh { rip: entry.0 };
    entry.prepare(memory)?;
    Ok(entry)
}
