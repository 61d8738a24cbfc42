//! The header of an image and its extensions (qcow2 specification, "Header" and "Header
//! extensions").

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::Refusal;

/// "QFI\xfb"
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Length of the header of version 2, and of the shortest one of version 3.
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
/// The header with its extensions and the name of the backing file are looked for in this many
/// bytes, or in the first cluster if that is smaller.
pub const MAX_HEADER: usize = 64 << 10;
/// Longest name of a backing file in bytes.
pub(super) const MAX_BACKING_NAME: usize = 1023;
/// The largest L1 table, refcount table and snapshot count that are believed: those of QEMU.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
pub(super) const MAX_SNAPSHOTS: u32 = 65536;

/// Bits of `incompatible_features`.
pub mod incompatible {
    /// Refcounts may be wrong: the image was not closed.
    pub const DIRTY: u64 = 1 << 0;
    /// The metadata was found to be damaged.
    pub const CORRUPT: u64 = 1 << 1;
    /// The guest's data is in a file of its own.
    pub const DATA_FILE: u64 = 1 << 2;
    /// `compression_type` is not zlib.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries are 16 bytes and describe subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All that are known.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Bits of `compatible_features`.
pub mod compatible {
    /// A writer may postpone refcounts while the dirty bit is set.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Bits of `autoclear_features`.
pub mod autoclear {
    /// The bitmaps extension is consistent with the image.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image of the disk at all times.
    pub const RAW_DATA_FILE: u64 = 1 << 1;
}

/// Types of header extensions.
pub(super) mod extension {
    pub(in super::super) const END: u32 = 0;
    pub(in super::super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(in super::super) const ENCRYPTION: u32 = 0x0537_be77;
    pub(in super::super) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(in super::super) const BITMAPS: u32 = 0x2385_2875;
    pub(in super::super) const DATA_FILE: u32 = 0x4441_5441;
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, RFC 1951, with a window of 4 KiB.
    #[default]
    Zlib,
    /// A zstd frame, RFC 8878.
    Zstd,
}

/// A header, all of whose fields have been checked against the specification and each other; not
/// against the file's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Name of the backing file as the image has it.
    pub backing_file: Option<OsString>,
    /// Name of the backing file's format, if the image has one.
    pub backing_format: Option<String>,
    /// Name of the external data file as the image has it.
    pub data_file: Option<OsString>,
    /// log2 of the cluster size: 9 to 21.
    pub cluster_bits: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Number of entries of the active L1 table.
    pub l1_size: u32,
    /// Offset of the active L1 table.
    pub l1_table_offset: u64,
    /// Offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Length of the refcount table in clusters.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub nb_snapshots: u32,
    /// Offset of the snapshot table.
    pub snapshots_offset: u64,
    /// Bits of [`incompatible`].
    pub incompatible_features: u64,
    /// Bits of [`compatible`].
    pub compatible_features: u64,
    /// Bits of [`autoclear`].
    pub autoclear_features: u64,
    /// log2 of the width of a refcount in bits: 0 to 6.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Where the persistent dirty bitmaps are, if there are any. They mean nothing unless
    /// [`autoclear::BITMAPS`] is set.
    pub bitmaps: Option<Bitmaps>,
}

/// The bitmaps extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// Number of bitmaps.
    pub count: u32,
    /// Offset of the bitmap directory.
    pub directory_offset: u64,
    /// Length of the bitmap directory in bytes.
    pub directory_len: u64,
}

/// The big-endian number at `offset`; 0 past the end.
pub(super) fn be16(bytes: &[u8], offset: usize) -> u16 {
    match bytes.get(offset..offset + 2) {
        Some(&[high, low]) => u16::from_be_bytes([high, low]),
        _ => 0,
    }
}

/// As [`be16`].
pub(super) fn be32(bytes: &[u8], offset: usize) -> u32 {
    let mut value = [0; 4];
    if let Some(found) = bytes.get(offset..offset + 4) {
        value.copy_from_slice(found);
    }
    u32::from_be_bytes(value)
}

/// As [`be16`].
pub(super) fn be64(bytes: &[u8], offset: usize) -> u64 {
    u64::from(be32(bytes, offset)) << 32 | u64::from(be32(bytes, offset + 4))
}

impl Header {
    /// Reads the header from the first bytes of a file: [`MAX_HEADER`] of them, or all if it is
    /// shorter.
    ///
    /// What the engine cannot do (encryption, unknown incompatible features) is refused here.
    pub fn parse(bytes: &[u8]) -> Result<Header, Refusal> {
        if bytes.len() < V2_LEN || be32(bytes, 0) != MAGIC {
            return Err(Refusal::new("it does not begin like a qcow2 image")
                .help("give the `format` that it has; `raw` if these bytes are the disk's own"));
        }
        let version = be32(bytes, 4);
        if !matches!(version, 2 | 3) {
            return Err(Refusal::new(format!(
                "its qcow2 version is {version}, expected 2 or 3"
            )));
        }
        let header_length = match version {
            2 => V2_LEN,
            _ => be32(bytes, 100) as usize,
        };
        let cluster_bits = be32(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Refusal::new(format!(
                "its `cluster_bits` is {cluster_bits}, expected 9 to 21"
            )));
        }
        let first = bytes.len().min(1 << cluster_bits);
        if version == 3 && !(V3_LEN..=first).contains(&header_length) || header_length % 8 != 0 {
            return Err(Refusal::new(format!(
                "its header length is {header_length}, expected a multiple of 8 from {V3_LEN} to \
                 the first cluster's end"
            )));
        }
        let bytes = &bytes[..first];
        let v3 = |offset| if version == 3 { be64(bytes, offset) } else { 0 };
        let mut header = Header {
            version,
            backing_file: backing_file(bytes)?,
            backing_format: None,
            data_file: None,
            cluster_bits,
            size: be64(bytes, 24),
            l1_size: be32(bytes, 36),
            l1_table_offset: be64(bytes, 40),
            refcount_table_offset: be64(bytes, 48),
            refcount_table_clusters: be32(bytes, 56),
            nb_snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible_features: v3(72),
            compatible_features: v3(80),
            autoclear_features: v3(88),
            refcount_order: if version == 3 { be32(bytes, 96) } else { 4 },
            compression: Compression::Zlib,
            bitmaps: None,
        };
        let compression_type = match header_length > V3_LEN {
            true => bytes.get(V3_LEN).copied().unwrap_or(0),
            false => 0,
        };
        header.check_features(be32(bytes, 32), compression_type)?;
        header.extensions(bytes, header_length)?;
        header.check_tables()?;
        Ok(header)
    }

    /// Checks the feature bits and what goes with them.
    fn check_features(&mut self, crypt_method: u32, compression_type: u8) -> Result<(), Refusal> {
        if crypt_method != 0 {
            let name = match crypt_method {
                1 => "AES".to_owned(),
                2 => "LUKS".to_owned(),
                other => format!("method {other}"),
            };
            return Err(encrypted(&name));
        }
        let unknown = self.incompatible_features & !incompatible::KNOWN;
        if unknown != 0 {
            return Err(Refusal::new(format!(
                "it needs features that this build does not know: incompatible bits {unknown:#x}"
            ))
            .help("convert it with the program that made it"));
        }
        let named = self.has(incompatible::COMPRESSION);
        self.compression = match (compression_type, named) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            _ => {
                return Err(Refusal::new(format!(
                    "its compression type is {compression_type}, and the feature bit for another \
                     one than 0 is {}",
                    if named { "set" } else { "not set" }
                )));
            }
        };
        if self.refcount_order > 6 {
            return Err(Refusal::new(format!(
                "its `refcount_order` is {}, expected 0 to 6",
                self.refcount_order
            )));
        }
        if self.has(incompatible::EXTENDED_L2) && self.cluster_bits < 14 {
            return Err(Refusal::new(format!(
                "its `cluster_bits` is {}, expected 14 or more with extended L2 entries",
                self.cluster_bits
            )));
        }
        Ok(())
    }

    /// Reads the extensions that follow the header.
    fn extensions(&mut self, bytes: &[u8], mut offset: usize) -> Result<(), Refusal> {
        // They end where the name of the backing file begins, if there is no marker.
        let end = match be64(bytes, 8) {
            0 => bytes.len(),
            name => usize::try_from(name).unwrap_or(usize::MAX).min(bytes.len()),
        };
        while offset + 8 <= end {
            let (kind, len) = (be32(bytes, offset), be32(bytes, offset + 4) as usize);
            if kind == extension::END {
                break;
            }
            offset += 8;
            let Some(data) = bytes[..end].get(offset..).and_then(|rest| rest.get(..len)) else {
                return Err(Refusal::new(format!(
                    "its header extension {kind:#x} of {len} bytes does not end in the first \
                     cluster"
                )));
            };
            match kind {
                extension::BACKING_FORMAT => {
                    self.backing_format = Some(String::from_utf8_lossy(data).into_owned());
                }
                extension::DATA_FILE => {
                    self.data_file = Some(OsString::from_vec(data.to_vec()));
                }
                extension::BITMAPS => {
                    self.bitmaps = Some(Bitmaps {
                        count: be32(data, 0),
                        directory_len: be64(data, 8),
                        directory_offset: be64(data, 16),
                    });
                }
                extension::ENCRYPTION => return Err(encrypted("LUKS")),
                _ => {}
            }
            offset += len.next_multiple_of(8);
        }
        Ok(())
    }

    /// Checks where the tables are said to lie, and how large they are said to be.
    fn check_tables(&self) -> Result<(), Refusal> {
        let table = |what: &str, offset: u64, len: u64, most: u64| {
            let aligned = offset.is_multiple_of(self.cluster_size());
            // A place in the header's own cluster is no place for a table.
            if len > 0 && (!aligned || offset == 0 || offset > i64::MAX as u64 - most) {
                return Err(Refusal::new(format!(
                    "its {what} is said to be at {offset:#x}, expected a later cluster's start"
                )));
            }
            if len > most {
                return Err(Refusal::new(format!(
                    "its {what} is said to have {len} bytes, expected at most {most}"
                )));
            }
            Ok(())
        };
        let l1_len = u64::from(self.l1_size) * 8;
        table("L1 table", self.l1_table_offset, l1_len, MAX_L1_BYTES)?;
        let refcount_table_len = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        table(
            "refcount table",
            self.refcount_table_offset,
            refcount_table_len,
            MAX_REFCOUNT_TABLE_BYTES,
        )?;
        if refcount_table_len == 0 {
            return Err(Refusal::new("it has no refcount table"));
        }
        if self.nb_snapshots > MAX_SNAPSHOTS {
            return Err(Refusal::new(format!(
                "it is said to have {} snapshots, expected at most {MAX_SNAPSHOTS}",
                self.nb_snapshots
            )));
        }
        let least = u64::from(self.nb_snapshots) * 40;
        table("snapshot table", self.snapshots_offset, least, least)?;
        if self.size > i64::MAX as u64 {
            return Err(Refusal::new(format!(
                "its size is said to be {} bytes, expected less than 2^63",
                self.size
            )));
        }
        let entries = self.l1_entries_for(self.size);
        if entries > u64::from(self.l1_size) {
            return Err(Refusal::new(format!(
                "its L1 table has {} entries, expected {entries} or more for {} bytes",
                self.l1_size, self.size
            )));
        }
        if self.has(incompatible::DATA_FILE) && self.nb_snapshots > 0 {
            return Err(Refusal::new(
                "it has internal snapshots and an external data file, which exclude each other",
            ));
        }
        Ok(())
    }

    /// Whether a bit of [`incompatible`] is set.
    pub fn has(&self, bit: u64) -> bool {
        self.incompatible_features & bit != 0
    }

    /// Cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of what one L2 table maps, in bytes.
    pub fn l2_coverage_bits(&self) -> u32 {
        let entry_bits = if self.has(incompatible::EXTENDED_L2) {
            4
        } else {
            3
        };
        2 * self.cluster_bits - entry_bits
    }

    /// How many L1 entries a disk of `size` bytes needs.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.l2_coverage_bits())
    }

    /// Writes the fields that change while an image is in use into the header's first bytes, as
    /// they were read: size, tables and feature bits.
    pub(super) fn patch(&self, bytes: &mut [u8]) {
        let mut put = |offset: usize, value: &[u8]| {
            if let Some(to) = bytes.get_mut(offset..offset + value.len()) {
                to.copy_from_slice(value);
            }
        };
        put(24, &self.size.to_be_bytes());
        put(36, &self.l1_size.to_be_bytes());
        put(40, &self.l1_table_offset.to_be_bytes());
        put(48, &self.refcount_table_offset.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(60, &self.nb_snapshots.to_be_bytes());
        put(64, &self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            put(72, &self.incompatible_features.to_be_bytes());
            put(88, &self.autoclear_features.to_be_bytes());
        }
    }
}

fn encrypted(how: &str) -> Refusal {
    Refusal::new(format!("it is encrypted ({how}), which is not supported"))
        .help("decrypt it with `qemu-img convert`, or encrypt inside the guest")
}

fn backing_file(bytes: &[u8]) -> Result<Option<OsString>, Refusal> {
    let (offset, len) = (be64(bytes, 8), be32(bytes, 16) as usize);
    if offset == 0 {
        return Ok(None);
    }
    let name = usize::try_from(offset)
        .ok()
        .and_then(|offset| bytes.get(offset..))
        .and_then(|rest| rest.get(..len))
        .filter(|_| len <= MAX_BACKING_NAME);
    match name {
        Some([]) => Ok(None),
        Some(name) => Ok(Some(OsString::from_vec(name.to_vec()))),
        None => Err(Refusal::new(format!(
            "the name of its backing file is said to be {len} bytes at {offset:#x}, expected at \
             most {MAX_BACKING_NAME} in the first cluster"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of version 3 as QEMU writes it, 64 KiB clusters, 1 MiB.
    fn sample() -> Vec<u8> {
        let mut bytes = vec![0; 65536];
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[7] = 3;
        bytes[23] = 16;
        bytes[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
        bytes[39] = 1;
        bytes[40..48].copy_from_slice(&0x30000u64.to_be_bytes());
        bytes[48..56].copy_from_slice(&0x10000u64.to_be_bytes());
        bytes[59] = 1;
        bytes[99] = 4;
        bytes[103] = 104;
        bytes
    }

    fn with(offset: usize, value: &[u8]) -> Result<Header, Refusal> {
        let mut bytes = sample();
        bytes[offset..][..value.len()].copy_from_slice(value);
        Header::parse(&bytes)
    }

    #[test]
    fn a_header_says_where_the_tables_are() {
        let header = Header::parse(&sample()).unwrap();
        assert_eq!(header.cluster_size(), 65536);
        assert_eq!(header.size, 1 << 20);
        assert_eq!((header.l1_size, header.l1_table_offset), (1, 0x30000));
        assert_eq!(header.refcount_table_offset, 0x10000);
        assert_eq!(header.refcount_order, 4);
        assert_eq!(header.l2_coverage_bits(), 29);
    }

    #[test]
    fn each_field_out_of_its_range_is_refused_with_its_name_and_limit() {
        for (offset, value, message) in [
            (0, &b"RAW!"[..], "does not begin like"),
            (7, &[4], "version is 4, expected 2 or 3"),
            (23, &[8], "`cluster_bits` is 8, expected 9 to 21"),
            (23, &[22], "`cluster_bits` is 22"),
            (24, &[0xff], "is said to be"),
            (35, &[1], "encrypted (AES)"),
            (35, &[2], "encrypted (LUKS)"),
            (36, &[0xff], "L1 table is said to have"),
            (39, &[0], "L1 table has 0 entries, expected 1 or more"),
            (46, &[1], "L1 table is said to be at 0x30100"),
            (45, &[0], "L1 table is said to be at 0x0"),
            (40, &[0xff], "L1 table is said to be at"),
            (59, &[0], "no refcount table"),
            (56, &[0xff], "refcount table is said to have"),
            (60, &[0xff], "snapshots, expected at most 65536"),
            (79, &[0x20], "incompatible bits 0x20"),
            (79, &[8], "compression type is 0"),
            (99, &[7], "`refcount_order` is 7, expected 0 to 6"),
            (103, &[103], "header length is 103"),
            (100, &[0xff], "header length is"),
            (
                104,
                &[0, 0, 0, 1, 0, 1, 0, 0],
                "header extension 0x1 of 65536 bytes",
            ),
            (
                8,
                &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 9],
                "backing file is said to be 9 bytes",
            ),
        ] {
            let error = with(offset, value).unwrap_err();
            assert!(error.message.contains(message), "{}", error.message);
        }
    }

    #[test]
    fn extensions_name_the_backing_format_and_the_data_file() {
        let mut bytes = sample();
        bytes[104..112].copy_from_slice(&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3]);
        bytes[112..115].copy_from_slice(b"raw");
        bytes[120..128].copy_from_slice(b"DATA\0\0\0\x05");
        bytes[128..133].copy_from_slice(b"a.raw");
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        assert_eq!(header.data_file.as_deref(), Some("a.raw".as_ref()));
    }

    #[test]
    fn an_image_of_version_2_has_refcounts_of_16_bits_and_no_features() {
        let mut bytes = sample();
        bytes[7] = 2;
        bytes[72..80].fill(0xff);
        bytes[72..80].copy_from_slice(&[0; 8]);
        bytes[99] = 0;
        let header = Header::parse(&bytes).unwrap();
        assert_eq!((header.version, header.refcount_order), (2, 4));
    }

    #[test]
    fn a_patched_header_reads_back() {
        let mut bytes = sample();
        let mut header = Header::parse(&bytes).unwrap();
        header.size = 3 << 30;
        header.l1_size = 6;
        header.l1_table_offset = 0x70000;
        header.incompatible_features = incompatible::CORRUPT;
        header.patch(&mut bytes);
        assert_eq!(Header::parse(&bytes).unwrap(), header);
    }

    #[test]
    fn no_prefix_and_no_byte_makes_it_panic() {
        let bytes = sample();
        for len in 0..200 {
            let _ = Header::parse(&bytes[..len]);
        }
        for at in 0..140 {
            for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
                let _ = with(at, &[value]);
                let _ = with(at, &[value; 8]);
            }
        }
    }
}
