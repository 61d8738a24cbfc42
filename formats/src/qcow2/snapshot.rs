//! The table of internal snapshots (qcow2 specification, "Snapshots").

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::header::{MAX_L1_BYTES, be16, be32, be64};
use super::{Header, Refusal};

/// Length of an entry before its extra data, its id and its name.
const ENTRY: usize = 40;
/// The largest table that is believed: that of QEMU.
pub(super) const MAX_TABLE_BYTES: usize = 64 << 20;
/// How much of the table is read at first.
const FIRST_READ: u64 = 16 << 10;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Offset of the snapshot's L1 table.
    pub l1_table_offset: u64,
    /// Number of entries of the snapshot's L1 table.
    pub l1_size: u32,
    /// Its id, unique in the image.
    pub id: String,
    /// What its maker called it.
    pub name: String,
    /// When it was taken, since the beginning of 1970 in UTC.
    pub date: Duration,
    /// How long the guest had run when it was taken.
    pub vm_clock: Duration,
    /// Length in bytes of the VM's state, which lies in the snapshot past the end of the disk.
    pub vm_state_size: u64,
    /// Size of the disk in bytes; none if its maker did not write it down (version 2).
    pub disk_size: Option<u64>,
    /// Number of instructions that the guest had executed, if its maker counted them.
    pub icount: Option<u64>,
}

impl Snapshot {
    /// Refuses an L1 table that no image has.
    fn check(&self) -> Result<(), Refusal> {
        let len = u64::from(self.l1_size) * 8;
        if len > MAX_L1_BYTES {
            return Err(Refusal::new(format!(
                "the L1 table of its snapshot `{}` is said to have {len} bytes, expected at most \
                 {MAX_L1_BYTES}",
                self.name
            )));
        }
        Ok(())
    }

    /// An entry of the table, padded to 8 bytes, with all extra data that is known.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let secs = u32::try_from(self.date.as_secs()).unwrap_or(u32::MAX);
        let vm_clock = u64::try_from(self.vm_clock.as_nanos()).unwrap_or(u64::MAX);
        // Those who read no extra data know sizes of 32 bits.
        let short_size = u32::try_from(self.vm_state_size).unwrap_or(u32::MAX);
        let mut extra = [self.vm_state_size, self.disk_size.unwrap_or(0), u64::MAX];
        if let Some(icount) = self.icount {
            extra[2] = icount;
        }
        let mut bytes = Vec::new();
        bytes.extend(self.l1_table_offset.to_be_bytes());
        bytes.extend(self.l1_size.to_be_bytes());
        bytes.extend((self.id.len() as u16).to_be_bytes());
        bytes.extend((self.name.len() as u16).to_be_bytes());
        bytes.extend(secs.to_be_bytes());
        bytes.extend(self.date.subsec_nanos().to_be_bytes());
        bytes.extend(vm_clock.to_be_bytes());
        bytes.extend(short_size.to_be_bytes());
        bytes.extend((extra.len() as u32 * 8).to_be_bytes());
        bytes.extend(extra.map(u64::to_be_bytes).concat());
        bytes.extend(self.id.bytes().chain(self.name.bytes()));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

/// Why a table could not be read from some bytes.
enum Unread {
    /// There must be more of it.
    TooShort,
    /// It is none.
    Refused(Refusal),
}

/// Reads a table of `count` entries from the bytes that begin with it. Returns the snapshots,
/// and the length of the table.
///
/// Refused: a table that the bytes do not hold or that has more than 64 MiB, and an L1 table of
/// more than 32 MiB. Where the L1 tables lie is not checked.
pub fn parse(bytes: &[u8], count: u32) -> Result<(Vec<Snapshot>, usize), Refusal> {
    let (snapshots, len) = entries(bytes, count).map_err(|unread| match unread {
        Unread::TooShort => too_short(bytes.len() as u64, count),
        Unread::Refused(refusal) => refusal,
    })?;
    snapshots.iter().try_for_each(Snapshot::check)?;
    Ok((snapshots, len))
}

/// Reads the table of an image from its file, as [`parse`] does: no more of it than there is.
pub fn read(file: &File, header: &Header) -> io::Result<Result<(Vec<Snapshot>, usize), Refusal>> {
    let table = read_unchecked(file, header)?;
    Ok(table.and_then(|(snapshots, len)| {
        snapshots.iter().try_for_each(Snapshot::check)?;
        Ok((snapshots, len))
    }))
}

/// As [`read`], but believes every size of an L1 table.
pub(super) fn read_unchecked(
    file: &File,
    header: &Header,
) -> io::Result<Result<(Vec<Snapshot>, usize), Refusal>> {
    if header.nb_snapshots == 0 {
        return Ok(Ok((Vec::new(), 0)));
    }
    let there = file
        .metadata()?
        .len()
        .saturating_sub(header.snapshots_offset);
    let most = there.min(MAX_TABLE_BYTES as u64);
    let mut want = FIRST_READ;
    loop {
        let mut bytes = vec![0; want.min(most) as usize];
        file.read_exact_at(&mut bytes, header.snapshots_offset)?;
        match entries(&bytes, header.nb_snapshots) {
            Ok(table) => return Ok(Ok(table)),
            Err(Unread::Refused(refusal)) => return Ok(Err(refusal)),
            Err(Unread::TooShort) if want >= most => {
                return Ok(Err(too_short(there, header.nb_snapshots)));
            }
            Err(Unread::TooShort) => want *= 4,
        }
    }
}

fn too_short(there: u64, count: u32) -> Refusal {
    let why = match there > MAX_TABLE_BYTES as u64 {
        true => format!("has more than {MAX_TABLE_BYTES} bytes"),
        false => "does not end in the file".to_owned(),
    };
    Refusal::new(format!("its snapshot table of {count} entries {why}"))
}

fn entries(bytes: &[u8], count: u32) -> Result<(Vec<Snapshot>, usize), Unread> {
    let bytes = &bytes[..bytes.len().min(MAX_TABLE_BYTES)];
    let mut snapshots = Vec::new();
    let mut offset = 0;
    for _ in 0..count {
        let rest = bytes.get(offset..).ok_or(Unread::TooShort)?;
        let (snapshot, len) = entry(rest)?;
        snapshots.push(snapshot);
        // The padding of the last one need not be there.
        offset += len.next_multiple_of(8);
    }
    Ok((snapshots, offset))
}

/// What bytes say, with `?` for what is no text: never longer than the bytes, whoever made them.
fn text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        if !chunk.invalid().is_empty() {
            text.push('?');
        }
    }
    text
}

/// Where in the bytes of a table the entries lie, each with its padding.
pub(super) fn places(bytes: &[u8], count: u32) -> Result<Vec<Range<usize>>, Refusal> {
    let mut places = Vec::new();
    let mut start = 0;
    for _ in 0..count {
        let len = match bytes.get(start..).ok_or(Unread::TooShort).and_then(entry) {
            Ok((_, len)) => len,
            Err(Unread::Refused(refusal)) => return Err(refusal),
            Err(Unread::TooShort) => return Err(too_short(bytes.len() as u64, count)),
        };
        let end = start + len.next_multiple_of(8);
        places.push(start..end);
        start = end;
    }
    Ok(places)
}

/// Reads one entry. Returns its length too, without the padding.
fn entry(bytes: &[u8]) -> Result<(Snapshot, usize), Unread> {
    if bytes.len() < ENTRY {
        return Err(Unread::TooShort);
    }
    let extra_len = be32(bytes, 36) as usize;
    let id_len = usize::from(be16(bytes, 12));
    let name_len = usize::from(be16(bytes, 14));
    if extra_len > MAX_TABLE_BYTES {
        return Err(Unread::Refused(Refusal::new(format!(
            "an entry of its snapshot table is said to have {extra_len} bytes of extra data, \
             expected at most {MAX_TABLE_BYTES}"
        ))));
    }
    let (id_at, name_at) = (ENTRY + extra_len, ENTRY + extra_len + id_len);
    let end = name_at + name_len;
    let (Some(extra), Some(id), Some(name)) = (
        bytes.get(ENTRY..id_at),
        bytes.get(id_at..name_at),
        bytes.get(name_at..end),
    ) else {
        return Err(Unread::TooShort);
    };
    let extra = |offset| (extra.len() >= offset + 8).then(|| be64(extra, offset));
    let snapshot = Snapshot {
        l1_table_offset: be64(bytes, 0),
        l1_size: be32(bytes, 8),
        id: text(id),
        name: text(name),
        date: Duration::from_secs(be32(bytes, 16).into())
            + Duration::from_nanos(be32(bytes, 20).into()),
        vm_clock: Duration::from_nanos(be64(bytes, 24)),
        vm_state_size: extra(0).unwrap_or_else(|| be32(bytes, 32).into()),
        disk_size: extra(8),
        // All ones: not counted.
        icount: extra(16).filter(|icount| *icount != u64::MAX),
    };
    Ok((snapshot, end))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::testing::directory;

    fn sample(extra: &[u8], id: &[u8], name: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(0x50000u64.to_be_bytes());
        bytes.extend(3u32.to_be_bytes());
        bytes.extend((id.len() as u16).to_be_bytes());
        bytes.extend((name.len() as u16).to_be_bytes());
        bytes.extend(1_700_000_000u32.to_be_bytes());
        bytes.extend(5u32.to_be_bytes());
        bytes.extend(7_000_000_001u64.to_be_bytes());
        bytes.extend(9u32.to_be_bytes());
        bytes.extend((extra.len() as u32).to_be_bytes());
        bytes.extend([extra, id, name].concat());
        bytes
    }

    fn padded(mut entry: Vec<u8>) -> Vec<u8> {
        entry.resize(entry.len().next_multiple_of(8), 0);
        entry
    }

    #[test]
    fn an_entry_says_where_the_l1_table_is_and_when_it_was_taken() {
        let bytes = padded(sample(&[], b"1", b"before"));
        let (snapshots, len) = parse(&bytes, 1).unwrap();
        let want = Snapshot {
            l1_table_offset: 0x50000,
            l1_size: 3,
            id: "1".into(),
            name: "before".into(),
            date: Duration::new(1_700_000_000, 5),
            vm_clock: Duration::new(7, 1),
            vm_state_size: 9,
            disk_size: None,
            icount: None,
        };
        assert_eq!((snapshots, len), (vec![want], 48));
    }

    #[test]
    fn extra_data_holds_as_much_as_it_is_long_and_the_rest_is_skipped() {
        let mut extra = [1u64 << 40, 1 << 30, 77, 5, 6]
            .map(u64::to_be_bytes)
            .concat();
        for len in [0, 4, 8, 12, 16, 23, 24, 33, 40] {
            let bytes = padded(sample(&extra[..len], b"1", b"n"));
            let (snapshots, used) = parse(&bytes, 1).unwrap();
            let only = &snapshots[0];
            assert_eq!(only.vm_state_size, if len < 8 { 9 } else { 1 << 40 });
            assert_eq!(only.disk_size, (len >= 16).then_some(1 << 30));
            assert_eq!(only.icount, (len >= 24).then_some(77));
            assert_eq!((only.id.as_str(), only.name.as_str()), ("1", "n"));
            assert_eq!(used, bytes.len());
        }
        extra[16..24].fill(0xff);
        let (snapshots, _) = parse(&sample(&extra, b"1", b"n"), 1).unwrap();
        assert_eq!(snapshots[0].icount, None);
    }

    #[test]
    fn an_entry_that_is_written_reads_back() {
        for (name, icount) in [("before", None), ("1234567", Some(5))] {
            let snapshot = Snapshot {
                l1_table_offset: 0x50000,
                l1_size: 3,
                id: "12".into(),
                name: name.into(),
                date: Duration::new(1_700_000_000, 5),
                vm_clock: Duration::new(7, 1),
                vm_state_size: 1 << 40,
                disk_size: Some(1 << 30),
                icount,
            };
            let bytes = [snapshot.to_bytes(), snapshot.to_bytes()].concat();
            let places = places(&bytes, 2).unwrap();
            let half = bytes.len() / 2;
            assert_eq!(places, [0..half, half..bytes.len()]);
            let (read, len) = parse(&bytes, 2).unwrap();
            assert_eq!((read, len), (vec![snapshot.clone(), snapshot], bytes.len()));
        }
    }

    #[test]
    fn entries_are_padded_to_8_bytes() {
        let names: [&[u8]; 4] = [b"", b"a", b"1234567", b"12345678"];
        let mut bytes: Vec<u8> = names
            .iter()
            .flat_map(|name| padded(sample(&[0; 16], b"1", name)))
            .collect();
        let len = bytes.len();
        // What follows the table is none of it.
        bytes.extend([0xff; 100]);
        let (snapshots, used) = parse(&bytes, 4).unwrap();
        let found: Vec<&[u8]> = snapshots.iter().map(|it| it.name.as_bytes()).collect();
        assert_eq!((found.as_slice(), used), (&names[..], len));
    }

    #[test]
    fn a_table_that_does_not_end_in_the_file_is_refused() {
        let bytes = padded(sample(&[0; 24], b"1", b"name"));
        for len in 0..bytes.len() - 3 {
            let error = parse(&bytes[..len], 1).unwrap_err();
            assert!(error.message.contains("does not end in the file"));
        }
        let error = parse(&bytes, 65536).unwrap_err();
        assert_eq!(
            error.message,
            "its snapshot table of 65536 entries does not end in the file"
        );
    }

    #[test]
    fn absurd_lengths_are_refused_with_their_limit() {
        let mut bytes = padded(sample(&[], b"1", b"name"));
        bytes[8..12].copy_from_slice(&(4u32 << 20 | 1).to_be_bytes());
        let error = parse(&bytes, 1).unwrap_err();
        assert!(error.message.contains("expected at most 33554432"));
        bytes[36..40].fill(0xff);
        let error = parse(&bytes, 1).unwrap_err();
        assert!(error.message.contains("4294967295 bytes of extra data"));
    }

    #[test]
    fn the_table_that_qemu_wrote_is_read_from_the_file() {
        let directory = directory();
        let path = directory.path().join("a.qcow2");
        let qemu_img = |args: &[&str]| {
            let status = Command::new("qemu-img").args(args).arg(&path).status();
            assert!(status.unwrap().success(), "{args:?}");
        };
        let path_text = path.to_str().unwrap().to_owned();
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", &path_text, "3M"])
            .status();
        assert!(status.unwrap().success());
        // More than is read at first.
        let long = "n".repeat(255);
        for number in 0..60 {
            qemu_img(&["snapshot", "-c", &format!("{number}-{long}")]);
        }
        let file = File::open(&path).unwrap();
        let mut bytes = vec![0; 65536];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let header = Header::parse(&bytes).unwrap();
        let (snapshots, len) = read(&file, &header).unwrap().unwrap();
        assert_eq!(snapshots.len(), 60);
        assert!(len as u64 > FIRST_READ);
        for (number, snapshot) in snapshots.iter().enumerate() {
            assert_eq!(snapshot.id, (number + 1).to_string());
            assert!(snapshot.name.starts_with(&format!("{number}-nnn")));
            assert_eq!(snapshot.disk_size, Some(3 << 20));
            assert_eq!(snapshot.l1_size, 1);
            assert!(snapshot.date > Duration::from_secs(1_600_000_000));
        }
        let short = Header {
            nb_snapshots: 65536,
            ..header
        };
        let refused = read(&file, &short).unwrap().unwrap_err();
        assert!(refused.message.contains("does not end in the file"));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let bytes = padded(sample(&[0; 24], b"1", b"name"));
        for at in 0..bytes.len() {
            for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
                for len in [1, 2, 4, 8] {
                    let mut bytes = bytes.clone();
                    let end = (at + len).min(bytes.len());
                    bytes[at..end].fill(value);
                    let _ = parse(&bytes, 1);
                    let _ = parse(&bytes, u32::MAX);
                }
            }
        }
    }
}
