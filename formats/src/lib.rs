//! Disk image formats behind one asynchronous trait.
//!
//! [`Disk`] is an open image; a [`Format`] opens and creates images and registers itself with
//! [`inventory`]. All I/O goes through a [`Ring`], one for each thread that serves a disk. This
//! crate knows nothing of virtio, KVM or configuration files: it compiles and tests alone.

mod disk;
mod format;
mod ring;
mod segments;

pub use disk::{Disk, Limits, Pending};
pub use format::{
    Format, FormatOption, Image, OpenError, Opening, OptionKind, OptionValue, find, formats,
};
pub use ring::Ring;
pub use segments::Segments;
