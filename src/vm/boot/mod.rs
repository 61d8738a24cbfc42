//! Loading a kernel: bzImage by the Linux boot protocol's 64-bit entry, ELF by PVH.

mod cmdline;
mod files;
pub(crate) mod image;
mod linux;
mod pvh;
mod state;

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

pub(crate) use cmdline::{disk_name, generate as cmdline};
pub(crate) use files::BootFiles;
use files::{BootFile, Part};
pub(crate) use state::Entry;

use super::layout::{self, HIGH_RAM, HOLE_START, LOW_RAM_END};
use crate::devices::GuestMemory;
use crate::devices::power::{RESET_OFFSET, RESET_VALUE};
use crate::{Error, Result};

const PAGE: u64 = 4096;

/// What the kernel is told besides its own file.
pub(crate) struct Parameters<'a> {
    /// Size of RAM in bytes.
    pub(crate) memory_size: u64,
    /// The whole command line.
    pub(crate) cmdline: &'a str,
    /// Where the ACPI tables' root pointer lies.
    pub(crate) rsdp: u64,
}

/// Loads the kernel and its initrd, and returns where and how the first vCPU enters.
pub(crate) fn load(
    memory: &GuestMemory,
    files: &BootFiles,
    parameters: &Parameters<'_>,
) -> Result<Entry> {
    write(memory, &reset_code(), layout::RESET_VECTOR)?;
    let (kernel, initrd) = (&files.kernel, files.initrd.as_ref());
    match kind(kernel)? {
        Kind::BzImage => linux::load(memory, kernel, initrd, parameters),
        Kind::Elf => pvh::load(memory, kernel, initrd, parameters),
    }
}

/// Whether there is something to load at the initrd's path.
pub(crate) fn check_initrd(path: &Path) -> Result<()> {
    BootFile::open(Part::Initrd, path)?.filled().map(drop)
}

/// All there is of a BIOS: at its reset vector, a write to the reset register in real mode. A
/// Linux that finds hardware-reduced ACPI and no EFI resets by a jump there.
fn reset_code() -> [u8; 9] {
    let [low, high] = (layout::POWER_PORT + RESET_OFFSET as u16).to_le_bytes();
    [
        0xba,
        low,
        high, // mov dx, PORT
        0xb0,
        RESET_VALUE, // mov al, VALUE
        0xee,        // out dx, al
        0xf4,        // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ]
}

/// What a kernel file is, by its magic numbers.
enum Kind {
    BzImage,
    Elf,
}

/// Tells by its start what a kernel is.
fn kind(kernel: &BootFile) -> Result<Kind> {
    // The boot sector's end and the magic of the setup header (Documentation/arch/x86/boot.rst).
    const MAGIC_OFFSET: usize = 0x202;
    let mut start = Vec::with_capacity(MAGIC_OFFSET + 4);
    (&kernel.file)
        .take(MAGIC_OFFSET as u64 + 4)
        .read_to_end(&mut start)
        .and_then(|_| (&kernel.file).seek(SeekFrom::Start(0)))
        .map_err(|error| kernel.bad(&format!("cannot be read: {error}")))?;
    if start.starts_with(b"\x7fELF") {
        Ok(Kind::Elf)
    } else if start.get(MAGIC_OFFSET..) == Some(b"HdrS") {
        Ok(Kind::BzImage)
    } else {
        let what = match start.get(..4) {
            None => "is no kernel: it is too short",
            Some(b"\x1f\x8b\x08\x00" | b"\x1f\x8b\x08\x08") => "is a gzip file, not a kernel",
            Some(_) => "is no kernel: it is neither a bzImage nor an ELF file",
        };
        Err(kernel
            .bad(what)
            .help("give a bzImage (a distribution's /boot/vmlinuz-…) or an ELF vmlinux"))
    }
}

/// Where RAM below the hole ends.
fn low_ram_end(memory_size: u64) -> u64 {
    memory_size.min(HOLE_START)
}

/// RAM as the guest may use it, as (start, length): not the first MiB's upper part.
fn usable_ram(memory_size: u64) -> Vec<(u64, u64)> {
    let mut usable = vec![(0, LOW_RAM_END)];
    for (start, len) in super::memory::ranges(memory_size) {
        let from = start.max(HIGH_RAM);
        usable.push((from, (start + len).saturating_sub(from)));
    }
    usable
}

/// The error for memory that does not hold what must go into it.
fn memory_too_small(memory_size: u64, needed: u64, what: &str) -> Error {
    const MIB: u64 = 1 << 20;
    Error::usage(format!(
        "`memory` is {} MiB, {what} needs at least {} MiB",
        memory_size / MIB,
        needed.div_ceil(MIB)
    ))
    .help(format!(
        "write memory = \"{}MiB\" or more",
        needed.div_ceil(MIB).next_multiple_of(64)
    ))
    .about("memory")
}

/// An initrd in guest memory.
struct Initrd {
    address: u64,
    size: u64,
}

/// Loads the initrd as high as it may go, above the kernel that needs everything below
/// `kernel_end`.
fn load_initrd(
    memory: &GuestMemory,
    initrd: &BootFile,
    kernel_end: u64,
    address_max: u64,
    memory_size: u64,
) -> Result<Initrd> {
    let size = initrd.filled()?;
    let top = low_ram_end(memory_size).min(address_max.saturating_add(1));
    let address = top.checked_sub(size).map(|address| address / PAGE * PAGE);
    let address = address
        .filter(|&address| address >= kernel_end)
        .ok_or_else(|| {
            let needed = kernel_end.saturating_add(size.next_multiple_of(PAGE));
            // More memory does not help where it is not memory that lacks.
            let limit = HOLE_START.min(address_max.saturating_add(1));
            match needed > limit {
                true => initrd
                    .bad(&format!(
                        "is {} MiB, this kernel takes at most {} MiB",
                        size.div_ceil(1 << 20),
                        limit.saturating_sub(kernel_end) >> 20
                    ))
                    .help("leave out of it what a disk can hold"),
                false => memory_too_small(memory_size, needed, "the kernel with its initrd"),
            }
        })?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut &initrd.file, size as usize)
        .map_err(|error| initrd.failed(&error))?;
    Ok(Initrd { address, size })
}

/// Writes the command line with its NUL. `limit` is the longest that the kernel takes.
fn write_cmdline(memory: &GuestMemory, cmdline: &str, limit: usize) -> Result<()> {
    // Whatever a header says: behind it lie the tables of the first MiB.
    let limit = limit.min((LOW_RAM_END - layout::CMDLINE) as usize - 1);
    if cmdline.len() > limit {
        return Err(Error::usage(format!(
            "the kernel command line is {} bytes, this kernel takes at most {limit}",
            cmdline.len()
        ))
        .help("shorten `cmdline`")
        .about("boot.cmdline"));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(memory, &bytes, layout::CMDLINE)
}

/// Writes bytes at a place that the layout keeps free in any memory that we accept.
fn write(memory: &GuestMemory, bytes: &[u8], address: u64) -> Result<()> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|error| {
            Error::failed(format!(
                "cannot write guest memory at {address:#x}: {error}"
            ))
        })
}

#[cfg(test)]
pub(super) mod tests;
