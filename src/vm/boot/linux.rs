//! bzImage: the Linux boot protocol with its 64-bit entry
//! (Documentation/arch/x86/boot.rst and zero-page.rst of the kernel).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress};

use super::{
    BootFile, Entry, GuestMemory, Parameters, layout, load_initrd, low_ram_end, memory_too_small,
    usable_ram, write, write_cmdline,
};
use crate::Result;

/// The 64-bit entry point lies this far behind the load address.
const ENTRY_64_OFFSET: u64 = 0x200;
/// `xloadflags`: the kernel has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `type_of_loader` of a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

pub(super) fn load(
    memory: &GuestMemory,
    kernel: &BootFile,
    initrd: Option<&BootFile>,
    parameters: &Parameters<'_>,
) -> Result<Entry> {
    let memory_size = parameters.memory_size;
    let size = kernel.size()?;
    let ram_end = low_ram_end(memory_size);
    if layout::HIGH_RAM + size > ram_end {
        return Err(memory_too_small(
            memory_size,
            layout::HIGH_RAM + size,
            "the kernel",
        ));
    }
    let loaded = BzImage::load(
        memory,
        None,
        &mut &kernel.file,
        Some(GuestAddress(layout::HIGH_RAM)),
    )
    .map_err(|error| kernel.bad(&format!("cannot be loaded: {error}")))?;
    let Some(mut header) = loaded.setup_header else {
        return Err(kernel.bad("has no setup header"));
    };
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(kernel
            .bad("has no 64-bit entry point")
            .help("give an x86_64 kernel of version 3.8 or later"));
    }

    // The kernel unpacks itself at its preferred address or where it was loaded, whichever is
    // higher, and needs `init_size` bytes from there.
    let unpacked = header.pref_address.max(loaded.kernel_load.0);
    let kernel_end = unpacked
        .saturating_add(header.init_size.into())
        .max(loaded.kernel_end);
    if kernel_end > ram_end {
        return Err(memory_too_small(memory_size, kernel_end, "the kernel"));
    }

    write_cmdline(memory, parameters.cmdline, header.cmdline_size as usize)?;
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = layout::CMDLINE as u32;
    if let Some(initrd) = initrd {
        let initrd = load_initrd(
            memory,
            initrd,
            kernel_end,
            header.initrd_addr_max.into(),
            memory_size,
        )?;
        // Below the hole, so that both fit into 32 bits.
        header.ramdisk_image = initrd.address as u32;
        header.ramdisk_size = initrd.size as u32;
    }

    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: parameters.rsdp,
        ..Default::default()
    };
    let ram = usable_ram(memory_size)
        .into_iter()
        .map(|range| (range, E820_RAM));
    let firmware = (layout::LOW_RAM_END, layout::HIGH_RAM - layout::LOW_RAM_END);
    let map = ram
        .chain([(firmware, E820_RESERVED)])
        .filter(|((_, len), _)| *len > 0);
    let mut entries = 0;
    for (slot, ((addr, size), type_)) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr,
            size,
            r#type: type_,
        };
        entries += 1;
    }
    params.e820_entries = entries;
    write(memory, params.as_slice(), layout::BOOT_PARAMS)?;

    let entry = Entry::Linux64 {
        rip: loaded.kernel_load.0 + ENTRY_64_OFFSET,
    };
    entry.prepare(memory)?;
    Ok(entry)
}
