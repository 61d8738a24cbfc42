//! The first cluster of a new image: header, extensions, name of the backing file.

use std::os::unix::ffi::OsStrExt;

use super::super::Compression;
use super::super::header::{MAGIC, autoclear, compatible, extension, incompatible};
use super::CreateOptions;
use super::layout::Layout;

/// Length of the header of version 3 with the compression type, padded.
const V3_LEN: u32 = 112;
/// The bits that others may meet in an image of ours, by their types: incompatible, compatible,
/// autoclear.
const FEATURE_NAMES: &[(u8, u8, &str)] = &[
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];
/// Length of a name with its type and bit.
const FEATURE_LEN: usize = 48;

/// The bits of `incompatible_features` that the options mean.
pub(super) fn incompatible_features(options: &CreateOptions) -> u64 {
    let mut bits = 0;
    if options.data_file.is_some() {
        bits |= incompatible::DATA_FILE;
    }
    if options.compression != Compression::Zlib {
        bits |= incompatible::COMPRESSION;
    }
    if options.extended_l2 {
        bits |= incompatible::EXTENDED_L2;
    }
    bits
}

/// The header's bytes; `None` if they do not fit into the first cluster.
pub(super) fn header(options: &CreateOptions, layout: &Layout) -> Option<Vec<u8>> {
    let backing = options.backing.as_ref();
    let mut extensions = Vec::new();
    if let Some(backing) = backing {
        let name = backing.format.as_bytes();
        extend(&mut extensions, extension::BACKING_FORMAT, name);
    }
    if let Some(file) = &options.data_file {
        extend(&mut extensions, extension::DATA_FILE, file.name.as_bytes());
    }
    let name = backing.map_or(&[][..], |backing| backing.name.as_bytes());
    let fixed_len = if options.version == 3 { V3_LEN } else { 72 } as usize;
    let room = |extensions: &Vec<u8>| {
        let end = fixed_len + extensions.len() + 8 + name.len();
        end <= 1 << options.cluster_bits
    };
    if options.version == 3 {
        let without = extensions.len();
        let names: Vec<u8> = FEATURE_NAMES.iter().flat_map(feature_name).collect();
        extend(&mut extensions, extension::FEATURE_NAMES, &names);
        // It is only for error messages of others: the first to go where there is no room.
        if !room(&extensions) {
            extensions.truncate(without);
        }
    }
    if !room(&extensions) {
        return None;
    }
    extend(&mut extensions, extension::END, &[]);
    let name_offset = match name {
        [] => 0,
        _ => fixed_len + extensions.len(),
    };
    let mut header = fixed(options, layout, name_offset as u64, name.len() as u32);
    header.extend(extensions);
    header.extend(name);
    Some(header)
}

fn fixed(options: &CreateOptions, layout: &Layout, name_offset: u64, name_len: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(MAGIC.to_be_bytes());
    bytes.extend(options.version.to_be_bytes());
    bytes.extend(name_offset.to_be_bytes());
    bytes.extend(name_len.to_be_bytes());
    bytes.extend(options.cluster_bits.to_be_bytes());
    bytes.extend(options.size.to_be_bytes());
    // Not encrypted.
    bytes.extend(0u32.to_be_bytes());
    bytes.extend((layout.l1_entries as u32).to_be_bytes());
    bytes.extend(layout.l1_offset().to_be_bytes());
    bytes.extend(layout.refcount_table_offset().to_be_bytes());
    bytes.extend((layout.refcount_table as u32).to_be_bytes());
    // No snapshots, nowhere.
    bytes.extend(0u32.to_be_bytes());
    bytes.extend(0u64.to_be_bytes());
    if options.version == 3 {
        let raw = options.data_file.as_ref().is_some_and(|file| file.raw);
        let set = |bit: u64, wanted: bool| if wanted { bit } else { 0 };
        let lazy = set(compatible::LAZY_REFCOUNTS, options.lazy_refcounts);
        bytes.extend(incompatible_features(options).to_be_bytes());
        bytes.extend(lazy.to_be_bytes());
        bytes.extend(set(autoclear::RAW_DATA_FILE, raw).to_be_bytes());
        bytes.extend(options.refcount_order.to_be_bytes());
        bytes.extend(V3_LEN.to_be_bytes());
        let compression = match options.compression {
            Compression::Zlib => 0,
            Compression::Zstd => 1,
        };
        bytes.extend([compression, 0, 0, 0, 0, 0, 0, 0]);
    }
    bytes
}

/// Appends an extension, padded.
fn extend(to: &mut Vec<u8>, kind: u32, data: &[u8]) {
    to.extend(kind.to_be_bytes());
    to.extend((data.len() as u32).to_be_bytes());
    to.extend(data);
    to.resize(to.len().next_multiple_of(8), 0);
}

fn feature_name(&(kind, bit, name): &(u8, u8, &str)) -> Vec<u8> {
    let mut bytes = vec![kind, bit];
    bytes.extend(name.as_bytes());
    bytes.resize(FEATURE_LEN, 0);
    bytes
}
