//! Which images are let in: those that the crate proved right with.

use formats::OpenError;
use formats::qcow2::Header;
use formats::qcow2::header::incompatible;

/// Cluster sizes, as log2.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 12..=20;

/// Refuses what a header says; the message is about "it", the image. `ro`: it is only read.
pub(crate) fn check(header: &Header, ro: bool) -> Result<(), OpenError> {
    let refused = |message: String| Err(beyond(message));
    if header.has(incompatible::CORRUPT) {
        return Err(OpenError {
            help: Some("repair it first: `qemu-img check -r all`".into()),
            ..beyond("it is marked corrupt".into())
        });
    }
    if header.has(incompatible::DIRTY) {
        return Err(OpenError {
            help: Some("repair it first: `qemu-img check -r leaks`".into()),
            ..beyond("it is marked dirty: it was not closed, and its refcounts may be wrong".into())
        });
    }
    if header.has(incompatible::DATA_FILE) {
        return refused("it has an external data file".into());
    }
    if header.has(incompatible::EXTENDED_L2) {
        return refused("it has extended L2 entries".into());
    }
    if header.has(incompatible::COMPRESSION) {
        return refused("its compression type is zstd".into());
    }
    // The parser knows no others today. What it learns is not known here by that.
    if header.incompatible_features != 0 {
        return refused(format!(
            "its incompatible bits are {:#x}",
            header.incompatible_features
        ));
    }
    if !CLUSTER_BITS.contains(&header.cluster_bits) {
        return refused(format!(
            "its cluster size is {} bytes, expected 4 KiB to 1 MiB",
            header.cluster_size()
        ));
    }
    if matches!(header.refcount_order, 1 | 2) {
        // The crate shifts them by as many bits as it should entries.
        return refused(format!(
            "its refcounts have {} bits, expected 1, or 8 or more",
            1 << header.refcount_order
        ));
    }
    if header.nb_snapshots > 0 {
        return refused(format!("it has {} internal snapshots", header.nb_snapshots));
    }
    if header.version < 3 && header.backing_file.is_some() {
        return refused("its version is 2, and it has a backing file, expected version 3".into());
    }
    if header.size == 0 {
        return refused("its size is 0".into());
    }
    if !ro && header.autoclear_features != 0 {
        return refused(format!(
            "its autoclear bits are {:#x}, as with persistent bitmaps, which are not kept up",
            header.autoclear_features
        ));
    }
    match (&header.backing_file, header.backing_format.as_deref()) {
        (None, _) | (Some(_), Some("qcow2")) => Ok(()),
        (Some(_), None) => Err(OpenError {
            help: Some("write it into the image: `qemu-img rebase -u -b FILE -F qcow2`".into()),
            ..beyond("it does not say what format its backing file has, expected qcow2".into())
        }),
        (Some(_), Some(other)) => refused(format!(
            "its backing file has the format {other:?}, expected qcow2"
        )),
    }
}

/// The error for an image that this engine cannot do; its key is `format`.
pub(crate) fn beyond(message: String) -> OpenError {
    OpenError {
        message: format!("{message}; this engine cannot do that"),
        help: Some("set `format = \"qcow2\"`".into()),
        key: "format",
    }
}
