//! Partition tables: GPT (UEFI specification 2.10, section 5.3) and MBR (5.2.1), with the logical
//! partitions of the latter; read as Linux reads them, whose numbers `root=/dev/vdXN` has.

use std::io;

use crc::{CRC_32_ISO_HDLC, Crc};

use super::window::Window;

/// A file system's place.
#[derive(Clone)]
pub(super) struct Volume {
    /// Number of the partition; `None` if it is the whole disk.
    pub(super) number: Option<u32>,
    /// Whether the table says that it is a root file system.
    pub(super) root: bool,
    pub(super) window: Window,
}

/// Why there are no volumes.
#[derive(Debug)]
pub(super) enum TableError {
    /// What is wrong with the table, and maybe what to do about it.
    Damaged(String, Option<String>),
    Unreadable(io::Error),
}

impl From<io::Error> for TableError {
    fn from(error: io::Error) -> Self {
        TableError::Unreadable(error)
    }
}

const GPT_SIGNATURE: &[u8; 8] = b"EFI PART";
/// Type of the one partition of an MBR that says: this disk has a GPT.
const PROTECTIVE: u8 = 0xee;
/// Types of partitions that hold logical ones.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// "Root partition (x86-64)" of the UAPI group's discoverable partitions, as its bytes lie on disk.
const ROOT_X86_64: [u8; 16] = [
    0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09,
];
/// A GPT has 128 entries of 128 bytes; one of a megabyte is damaged.
const GPT_MOST: u64 = 1 << 20;
/// A chain of logical partitions longer than this is taken for a loop.
const LOGICAL_MOST: u32 = 128;

/// The partitions of a disk, or the whole of it if it has no table. `sector`: its logical block
/// size, which is what tables count in.
pub(super) fn volumes(disk: &Window, sector: u64) -> Result<Vec<Volume>, TableError> {
    let boot_sector = disk.bytes(0)?;
    let entries = mbr_entries(&boot_sector);
    if entries.iter().any(|entry| entry.kind == PROTECTIVE) {
        return gpt(disk, sector);
    }
    let begins = |entry: &MbrEntry| entry.used() && entry.start * sector < disk.len();
    // Boot code may be there without a table: then the flags are no flags.
    if entries.iter().all(|entry| entry.flag & 0x7f == 0) && entries.iter().any(begins) {
        return mbr(disk, sector, &entries);
    }
    Ok(vec![Volume {
        number: None,
        root: false,
        window: disk.clone(),
    }])
}

fn gpt(disk: &Window, sector: u64) -> Result<Vec<Volume>, TableError> {
    let damaged = |what: &str| TableError::Damaged(format!("its GPT {what}"), None);
    let header: [u8; 512] = disk.bytes(sector)?;
    if &header[..8] != GPT_SIGNATURE {
        for other in [512, 1024, 2048, 4096] {
            if &disk.bytes::<8>(other)? == GPT_SIGNATURE {
                return Err(TableError::Damaged(
                    format!("its GPT counts in sectors of {other} bytes, the disk in {sector}"),
                    Some(format!("write `block_size = {other}` for that disk")),
                ));
            }
        }
        return Err(damaged("has no header"));
    }
    let crc = Crc::<u32>::new(&CRC_32_ISO_HDLC);
    let header_size = u32_at(&header, 12) as usize;
    if !(92..=header.len()).contains(&header_size) {
        return Err(damaged(&format!("has a header of {header_size} bytes")));
    }
    let mut summed = header;
    summed[16..20].fill(0);
    if crc.checksum(&summed[..header_size]) != u32_at(&header, 16) {
        return Err(damaged("has a header whose checksum is wrong"));
    }
    let (count, size) = (u32_at(&header, 80), u32_at(&header, 84));
    let len = u64::from(count) * u64::from(size);
    if size < 128 || len > GPT_MOST {
        return Err(damaged(&format!("has {count} entries of {size} bytes")));
    }
    let mut table = vec![0; len as usize];
    let offset = u64_at(&header, 72).checked_mul(sector);
    let offset =
        offset.filter(|offset| offset.checked_add(len).is_some_and(|end| end <= disk.len()));
    disk.read(
        offset.ok_or_else(|| damaged("lies behind the disk's end"))?,
        &mut table,
    )?;
    if crc.checksum(&table) != u32_at(&header, 88) {
        return Err(damaged("has entries whose checksum is wrong"));
    }
    let volume = |(number, entry): (u32, &[u8])| {
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let sectors = last.checked_sub(first)?.checked_add(1)?;
        let window = disk.part(first.checked_mul(sector)?, sectors.checked_mul(sector)?)?;
        let kind = &entry[..16];
        (kind != [0; 16]).then(|| Volume {
            number: Some(number),
            root: kind == ROOT_X86_64,
            window,
        })
    };
    let entries = table.chunks_exact(size as usize);
    Ok((1..).zip(entries).filter_map(volume).collect())
}

#[derive(Clone, Copy, Default)]
struct MbrEntry {
    flag: u8,
    kind: u8,
    /// First sector.
    start: u64,
    /// Number of sectors.
    count: u64,
}

impl MbrEntry {
    fn used(&self) -> bool {
        self.kind != 0 && self.start > 0 && self.count > 0
    }

    fn extended(&self) -> bool {
        self.used() && EXTENDED.contains(&self.kind)
    }

    /// The bytes of the disk that it stands for, counted from sector `base`.
    fn window(&self, disk: &Window, base: u64, sector: u64) -> Option<Window> {
        disk.part((base + self.start) * sector, self.count * sector)
    }
}

/// The four entries; all empty if the sector has no table.
fn mbr_entries(sector: &[u8; 512]) -> [MbrEntry; 4] {
    if sector[510..] != [0x55, 0xaa] {
        return [MbrEntry::default(); 4];
    }
    [446, 462, 478, 494].map(|at| MbrEntry {
        flag: sector[at],
        kind: sector[at + 4],
        start: u32_at(sector, at + 8).into(),
        count: u32_at(sector, at + 12).into(),
    })
}

fn mbr(disk: &Window, sector: u64, primary: &[MbrEntry; 4]) -> Result<Vec<Volume>, TableError> {
    let volume = |number, window| Volume {
        number: Some(number),
        root: false,
        window,
    };
    let mut volumes = Vec::new();
    let mut logical = 5;
    for (number, entry) in (1..).zip(primary).filter(|(_, entry)| entry.used()) {
        if !entry.extended() {
            let window = entry.window(disk, 0, sector);
            volumes.extend(window.map(|window| volume(number, window)));
            continue;
        }
        // A list: each table has one partition, and the place of the next table.
        let mut at = entry.start;
        for links in 0.. {
            if links == LOGICAL_MOST {
                let what = "its list of logical partitions has no end".to_owned();
                return Err(TableError::Damaged(what, None));
            }
            let entries = mbr_entries(&disk.bytes(at * sector)?);
            let data = entries.iter().find(|it| it.used() && !it.extended());
            if let Some(data) = data {
                let window = data.window(disk, at, sector);
                volumes.extend(window.map(|window| volume(logical, window)));
                logical += 1;
            }
            match entries.iter().find(|it| it.extended()) {
                Some(next) => at = entry.start + next.start,
                None => break,
            }
        }
    }
    volumes.sort_by_key(|volume| volume.number);
    Ok(volumes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}
