//! qcow2 images, versions 2 and 3, as QEMU's `docs/interop/qcow2` specifies them.

#[allow(dead_code)]
mod compressed;
mod create;
#[allow(dead_code)]
mod entry;
#[allow(dead_code)]
pub mod header;
#[allow(dead_code)]
mod refcount;
pub mod snapshot;
#[cfg(test)]
mod testing;

use std::fmt;

pub use create::{Backing, CreateOptions, DataFile, OPTIONS, Preallocation, create};
pub use header::{Compression, Header};
pub use snapshot::Snapshot;

/// Why an image is not used: what is wrong with it, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Lower case; begins with "it" or "its", the image.
    pub message: String,
    /// What to do, if there is something to say.
    pub help: Option<String>,
}

impl Refusal {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Refusal {
            message: message.into(),
            help: None,
        }
    }

    pub(crate) fn help(self, help: impl Into<String>) -> Self {
        Refusal {
            help: Some(help.into()),
            ..self
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}
