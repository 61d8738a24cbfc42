//! Whether something boots, as far as that can be told without a guest.

use std::path::Path;

use formats::{Engine, Format, Image};

use super::boot::{self, BootFiles, Parameters};
use super::layout;
use super::memory::{self, Sharing};
use crate::Result;
use crate::devices::virtio::blk::{Blk, BlkOptions};

/// Loads a kernel, and an initrd, into this much memory (bytes) that no guest sees.
///
/// # Errors
///
/// Why it does not boot; about `memory` if that is too small for it.
pub fn check_kernel(kernel: &Path, initrd: Option<&Path>, memory: u64) -> Result<()> {
    loads(&BootFiles::open(kernel, initrd)?, memory, "")
}

/// As [`check_kernel`], the kernel and the initrd of a disk's file system. The image is only read,
/// and not locked.
///
/// # Errors
///
/// As [`check_kernel`]; the image cannot be opened, or has no kernel.
pub fn check_disk(
    image: &Image,
    format: &'static Format,
    memory: u64,
    engine: Engine,
) -> Result<()> {
    let disk = Blk::open(read_only(image.clone(), format, engine))?;
    let files = boot::image::read_alone(&disk.handle(), &image.path)?;
    loads(&files, memory, "")
}

/// The kernel parameter that names the root file system of the disk `index`, if that is in a
/// partition of it.
///
/// # Errors
///
/// The image cannot be opened or read.
pub fn root_parameter(
    image: &Image,
    format: &'static Format,
    index: usize,
    engine: Engine,
) -> Result<Option<String>> {
    let disk = Blk::open(read_only(image.clone(), format, engine))?;
    let partition = boot::image::root_of(&disk.handle(), &image.path)?;
    let name = boot::disk_name(index);
    Ok(partition.map(|number| format!("root=/dev/{name}{number}")))
}

/// An image that is only read, whoever has it.
pub(super) fn read_only(image: Image, format: &'static Format, engine: Engine) -> BlkOptions {
    BlkOptions {
        image: Image {
            ro: true,
            lock: false,
            size: None,
            ..image
        },
        format,
        ephemeral: false,
        id: None,
        queues: 1,
        engine,
        poll: None,
        cpus: Vec::new(),
    }
}

/// Loads what is booted as for a start.
pub(super) fn loads(files: &BootFiles, memory: u64, cmdline: &str) -> Result<()> {
    // Nothing is loaded above the hole, and the mapping stays.
    let memory_size = memory.min(layout::HOLE_START);
    let memory = memory::allocate(memory_size, Sharing::Private)?;
    let parameters = Parameters {
        memory_size,
        cmdline,
        rsdp: layout::ACPI.start,
    };
    let loaded = boot::load(&memory, files, &parameters).map(drop);
    memory::clear(&memory)?;
    loaded
}
