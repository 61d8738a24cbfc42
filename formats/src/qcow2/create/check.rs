//! What a new image cannot be, and which options exclude each other.

use super::super::Compression;
use super::super::header::MAX_BACKING_NAME;
use super::{CreateOptions, Preallocation};
use crate::OpenError;

/// The least cluster size with extended L2 entries: subclusters have 512 bytes or more.
const EXTENDED_L2_BITS: u32 = 14;

fn refused(key: &'static str, message: String, help: impl Into<Option<String>>) -> OpenError {
    OpenError {
        message,
        help: help.into(),
        key,
    }
}

impl CreateOptions {
    /// Checks each option, and all of them together, against the specification, as
    /// [`create`](super::create) does before it writes anything.
    pub fn check(&self) -> Result<(), OpenError> {
        self.check_numbers()?;
        self.check_version()?;
        self.check_files()
    }

    fn check_numbers(&self) -> Result<(), OpenError> {
        if !matches!(self.version, 2 | 3) {
            let message = format!("`version` is {}, expected 2 or 3", self.version);
            return Err(refused("version", message, None));
        }
        if !(9..=21).contains(&self.cluster_bits) {
            let message = format!(
                "`cluster_size` is 2^{} bytes, expected 512 bytes to 2MiB",
                self.cluster_bits
            );
            return Err(refused("cluster_size", message, None));
        }
        if self.refcount_order > 6 {
            let message = format!(
                "`refcount_bits` is 2^{}, expected 64 or less",
                self.refcount_order
            );
            return Err(refused("refcount_bits", message, None));
        }
        if !self.size.is_multiple_of(512) {
            let message = format!("`size` is {}, expected a multiple of 512", self.size);
            return Err(refused("size", message, None));
        }
        if self.size > i64::MAX as u64 {
            let message = format!("`size` is {}, expected less than 2^63", self.size);
            return Err(refused("size", message, None));
        }
        if self.extended_l2 && self.cluster_bits < EXTENDED_L2_BITS {
            let message = format!(
                "`cluster_size` is {}, expected 16KiB or more with `extended_l2`",
                1u64 << self.cluster_bits
            );
            return Err(refused("cluster_size", message, None));
        }
        Ok(())
    }

    /// What version 2 does not have.
    fn check_version(&self) -> Result<(), OpenError> {
        if self.version > 2 {
            return Ok(());
        }
        let found = [
            (
                self.refcount_order != 4,
                "refcount_bits",
                "other than 16 needs",
            ),
            (self.extended_l2, "extended_l2", "needs"),
            (self.lazy_refcounts, "lazy_refcounts", "needs"),
            (
                self.compression != Compression::Zlib,
                "compression_type",
                "other than \"zlib\" needs",
            ),
            (self.data_file.is_some(), "data_file", "needs"),
        ];
        match found.into_iter().find(|(wanted, ..)| *wanted) {
            None => Ok(()),
            Some((_, key, needs)) => {
                let message = format!("`{key}` {needs} `version = 3`, but `version` is 2");
                Err(refused(key, message, "leave `version` out".to_owned()))
            }
        }
    }

    fn check_files(&self) -> Result<(), OpenError> {
        if let Some(backing) = &self.backing {
            let len = backing.name.len();
            if !(1..=MAX_BACKING_NAME).contains(&len) {
                let message = format!(
                    "the name of the `backing` file has {len} bytes, expected 1 to \
                     {MAX_BACKING_NAME}"
                );
                return Err(refused("backing", message, None));
            }
            if self.preallocation != Preallocation::Off && !self.extended_l2 {
                let message = "`preallocation` hides the `backing` file but with `extended_l2`";
                let help = "set `extended_l2 = true`, or `preallocation = \"off\"`".to_owned();
                return Err(refused("preallocation", message.into(), help));
            }
            if self.data_file.as_ref().is_some_and(|file| file.raw) {
                let message = "`data_file_raw` is true, but an image with a `backing` file is not \
                               all in its data file";
                let help = "leave one of the two out".to_owned();
                return Err(refused("data_file_raw", message.into(), help));
            }
        }
        match &self.data_file {
            Some(file) if file.name.is_empty() => {
                let message = "`data_file` is empty, expected the name of a file".to_owned();
                Err(refused("data_file", message, None))
            }
            _ => Ok(()),
        }
    }
}

/// The header's first cluster is too small for all that is to be in it.
pub(super) fn no_room(options: &CreateOptions) -> OpenError {
    let (key, what) = match (&options.backing, &options.data_file) {
        (Some(_), Some(_)) => ("backing", "`backing` and `data_file`"),
        (None, Some(_)) => ("data_file", "`data_file`"),
        _ => ("backing", "`backing`"),
    };
    let message = format!(
        "`cluster_size` is {}: the names of {what} do not fit into the first cluster",
        1u64 << options.cluster_bits
    );
    let help = "choose a larger `cluster_size`, or shorter names".to_owned();
    refused(key, message, help)
}
