//! What a volume holds: an ext4 file system, opened to be read, or something else, by its name.

use std::error::Error;
use std::io;

use crc::{CRC_32_ISCSI, Crc};
use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::window::Window;

/// What a volume holds.
pub(super) enum Contents {
    Ext4(Ext4),
    /// An ext4 file system that is damaged, or has features that its reader lacks.
    Unusable(Ext4Error),
    /// Something else.
    Other(&'static str),
    Unknown,
}

/// Magic numbers: where they are, what they are, whose they are.
const KINDS: [(u64, &[u8], &str); 14] = [
    (0, b"XFSB", "XFS"),
    (65600, b"_BHRfS_M", "Btrfs"),
    (0, b"LUKS\xba\xbe", "encrypted (LUKS)"),
    (512, b"LABELONE", "LVM"),
    (0, b"hsqs", "SquashFS"),
    (1024, &[0xe2, 0xe1, 0xf5, 0xe0], "EROFS"),
    (1024, &[0x10, 0x20, 0xf5, 0xf2], "F2FS"),
    (32769, b"CD001", "ISO 9660"),
    (3, b"NTFS", "NTFS"),
    (82, b"FAT32", "FAT"),
    (54, b"FAT1", "FAT"),
    (4086, b"SWAPSPACE2", "swap space"),
    (24, &[0xc6, 0x85, 0x73, 0xf6], "bcachefs"),
    (4120, &[0xc6, 0x85, 0x73, 0xf6], "bcachefs"),
];

/// Where the superblock lies, and its size.
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_SIZE: usize = 1024;
const MAGIC: usize = 0x38;
const INCOMPATIBLE: usize = 0x60;
const RO_COMPATIBLE: usize = 0x64;
const CHECKSUM: usize = 0x3fc;
const NEEDS_RECOVERY: u32 = 0x4;
const IS_64BIT: u32 = 0x80;
const METADATA_CHECKSUMS: u32 = 0x400;

impl Contents {
    /// Looks at a volume.
    pub(super) fn of(volume: &Window) -> io::Result<Contents> {
        let superblock: [u8; SUPERBLOCK_SIZE] = volume.bytes(SUPERBLOCK)?;
        if superblock[MAGIC..MAGIC + 2] == [0x53, 0xef] {
            return open(volume, superblock);
        }
        for (offset, magic, name) in KINDS {
            let there: [u8; 16] = volume.bytes(offset)?;
            if there.starts_with(magic) {
                return Ok(Contents::Other(name));
            }
        }
        Ok(Contents::Unknown)
    }
}

fn open(volume: &Window, superblock: [u8; SUPERBLOCK_SIZE]) -> io::Result<Contents> {
    if let Err(wrong) = plausible(volume, &superblock) {
        return Ok(Contents::Unusable(Ext4Error::Io(wrong.into())));
    }
    let load = |superblock| {
        let volume = Volume {
            window: volume.clone(),
            superblock,
        };
        Ext4::load(Box::new(volume))
    };
    let error = match load(superblock) {
        Ok(ext4) => return Ok(Contents::Ext4(ext4)),
        Err(error) => error,
    };
    // A guest that was ended by force leaves its journal to be replayed. A journal that cannot be
    // is left alone: what it has not brought to its place yet is seconds old.
    let journal = u32_at(&superblock, INCOMPATIBLE) & NEEDS_RECOVERY != 0;
    match load(recovered(superblock)) {
        Ok(ext4) if journal => {
            tracing::warn!("the journal of the file system is passed over: {error}");
            Ok(Contents::Ext4(ext4))
        }
        _ => Ok(Contents::Unusable(error)),
    }
}

/// What the reader takes on trust: sizes that it allocates memory by.
fn plausible(volume: &Window, superblock: &[u8; SUPERBLOCK_SIZE]) -> Result<(), String> {
    /// Of 128 MiB each, as a rule: this is 128 TiB.
    const GROUPS_MOST: u64 = 1 << 20;
    let log_block_size = u32_at(superblock, 0x18);
    if log_block_size > 6 {
        return Err(format!("its block size is 1 KiB << {log_block_size}"));
    }
    let mut blocks = u64::from(u32_at(superblock, 0x4));
    if u32_at(superblock, INCOMPATIBLE) & IS_64BIT != 0 {
        blocks |= u64::from(u32_at(superblock, 0x150)) << 32;
    }
    let size = blocks.checked_mul(1024 << log_block_size);
    if size.is_none_or(|size| size > volume.len()) {
        return Err(format!(
            "it has {blocks} blocks of {} bytes, more than the {} bytes that it lies in",
            1024 << log_block_size,
            volume.len()
        ));
    }
    let per_group = u64::from(u32_at(superblock, 0x20));
    if per_group == 0 || blocks / per_group > GROUPS_MOST {
        return Err(format!("its block groups have {per_group} blocks each"));
    }
    let inode_size = u16::from_le_bytes([superblock[0x58], superblock[0x59]]);
    if inode_size < 128 {
        return Err(format!("its inodes have {inode_size} bytes"));
    }
    Ok(())
}

/// The superblock of the same file system without a journal to replay.
fn recovered(mut superblock: [u8; SUPERBLOCK_SIZE]) -> [u8; SUPERBLOCK_SIZE] {
    let features = u32_at(&superblock, INCOMPATIBLE) & !NEEDS_RECOVERY;
    superblock[INCOMPATIBLE..INCOMPATIBLE + 4].copy_from_slice(&features.to_le_bytes());
    if u32_at(&superblock, RO_COMPATIBLE) & METADATA_CHECKSUMS != 0 {
        // Without the inversion at the end that this checksum has elsewhere.
        let sum = !Crc::<u32>::new(&CRC_32_ISCSI).checksum(&superblock[..CHECKSUM]);
        superblock[CHECKSUM..].copy_from_slice(&sum.to_le_bytes());
    }
    superblock
}

/// A volume as the reader of its file system sees it: the superblock is the one that was checked.
struct Volume {
    window: Window,
    superblock: [u8; SUPERBLOCK_SIZE],
}

impl Ext4Read for Volume {
    fn read(
        &mut self,
        start: u64,
        to: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        if start == SUPERBLOCK && to.len() == SUPERBLOCK_SIZE {
            to.copy_from_slice(&self.superblock);
            return Ok(());
        }
        Ok(self.window.read(start, to)?)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}
