//! Disk image formats behind one asynchronous trait.
//!
//! [`Disk`] is an open image; a [`Format`] opens and creates images and registers itself with
//! [`inventory`]. All I/O goes through a [`Ring`], one for each thread that serves a disk. This
//! crate knows nothing of virtio, KVM or configuration files: it compiles and tests alone.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("disk.img");
//! use formats::{Buffer, Engine, Image, Ring, Segments};
//!
//! let image = Image {
//!     size: Some(1 << 20),
//!     format_written: false,
//!     ..Image::new(path)
//! };
//! let format = formats::find(formats::raw_for(image.sparse)).ok_or("no such format")?;
//! let ring = Ring::new(Engine::Auto)?;
//! let first_sector = ring.block_on(
//!     async {
//!         let disk = (format.open)(&ring, &image).await?;
//!         let memory = Segments::from_buffer(Buffer::zeroed(512, 512)?);
//!         disk.read(0, memory.clone()).await?;
//!         disk.close().await?;
//!         Ok::<_, Box<dyn std::error::Error>>(memory.into_buffer())
//!     },
//!     || {},
//! )?;
//! assert_eq!(first_sector.as_deref(), Some(&[0; 512][..]));
//! # Ok(())
//! # }
//! ```

mod buffer;
#[cfg(any(test, feature = "faults"))]
#[doc(hidden)]
pub mod conformance;
pub mod convert;
#[cfg(any(test, all(fuzzing, feature = "faults")))]
mod counting;
mod disk;
mod ephemeral;
mod format;
mod host_file;
pub mod qcow2;
#[cfg(any(test, feature = "faults"))]
mod random;
mod raw;
mod ring;
mod segments;
#[cfg(test)]
mod testing;

pub use buffer::Buffer;
#[cfg(all(fuzzing, feature = "faults"))]
#[doc(hidden)]
pub use counting::Counting;
pub use disk::{Disk, Extent, Limits, Pending};
pub use ephemeral::{ephemeral, open_ephemeral};
pub use format::{
    Format, FormatOption, Image, OpenError, Opening, OptionKind, OptionValue, find, for_extension,
    formats, raw_for,
};
pub use host_file::{HostFile, Transfer, create_file, sniff};
#[cfg(any(test, feature = "faults"))]
pub use ring::{Attempt, Effect, Fault, FileId, Recorder, Step, What};
pub use ring::{Engine, File, Operation, Progress, Ring, Whole};
pub use segments::Segments;

/// The guide to formats of one's own: its example is run as it stands there.
#[cfg(doctest)]
#[doc = include_str!("../../docs/write-a-format.md")]
struct Guide;
