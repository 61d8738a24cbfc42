//! Disk image formats behind one asynchronous trait.
//!
//! [`Disk`] is an open image; a [`Format`] opens and creates images and registers itself with
//! [`inventory`]. All I/O goes through a [`Ring`], one for each thread that serves a disk. This
//! crate knows nothing of virtio, KVM or configuration files: it compiles and tests alone.

mod buffer;
mod disk;
mod ephemeral;
mod format;
mod host_file;
mod raw;
mod ring;
mod segments;
#[cfg(test)]
mod testing;

pub use buffer::Buffer;
pub use disk::{Disk, Limits, Pending};
pub use ephemeral::ephemeral;
pub use format::{
    Format, FormatOption, Image, OpenError, Opening, OptionKind, OptionValue, find, for_extension,
    formats, raw_for,
};
pub use host_file::{HostFile, Transfer, create_file, sniff};
#[cfg(any(test, feature = "faults"))]
pub use ring::{Attempt, Fault, What};
pub use ring::{Engine, File, Operation, Progress, Ring, Whole};
pub use segments::Segments;
