//! Hostile images, one kind of harm each: an error says what is wrong, and nothing is done.

use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::super::Header;
use super::super::entry::{COPIED, OFFSET_MASK};
use super::super::header::be64;
use super::*;
use crate::counting::Held;
use crate::testing::refused;

/// Creates an image of 1 MiB whose first cluster holds data.
fn small(path: &Path) {
    let ring = Ring::new(Default::default()).unwrap();
    let disk = open(&ring, "qcow2", &new_image(path, MIB, &[])).unwrap();
    write(&ring, &*disk, 0, &[7; 512]);
    run(&ring, disk.close()).unwrap();
}

fn put(path: &Path, offset: u64, value: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&value.to_be_bytes(), offset).unwrap();
}

/// Offset of the first L2 table.
fn l2_table(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    let header = Header::parse(&bytes).unwrap();
    be64(&bytes, header.l1_table_offset as usize) & OFFSET_MASK
}

/// An entry may point to where the copy of its own table comes to lie.
#[test]
fn a_discard_never_frees_a_cluster_that_holds_a_table() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    small(&path);
    qemu_img("snapshot -c s", &path);
    let end = std::fs::metadata(&path)
        .unwrap()
        .len()
        .next_multiple_of(65536);
    put(&path, l2_table(&path) + 8, end | COPIED);
    let ring = Ring::new(Default::default()).unwrap();
    let disk = open(&ring, "qcow2", &image(&path)).unwrap();
    run(&ring, disk.discard(65536, 65536)).unwrap();
    // What was written is durable; that the cluster cannot be freed only then turns out.
    run(&ring, disk.flush()).unwrap();
    let refused = run(&ring, disk.write(0, segments(&[0; 512]))).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(read(&ring, &*disk, 0, 512), [7; 512]);
    run(&ring, disk.close()).unwrap();
    let table = l2_table(&path);
    assert_eq!(table, end);
    assert_ne!(be64(&std::fs::read(&path).unwrap(), table as usize), 0);
}

/// Unlike those of L1 and L2 tables, entries of the refcount table have no flags.
#[test]
fn a_refcount_block_far_away_is_refused() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    small(&path);
    let bytes = std::fs::read(&path).unwrap();
    let at = Header::parse(&bytes).unwrap().refcount_table_offset;
    put(&path, at, be64(&bytes, at as usize) | COPIED);
    let found = refused("qcow2", &image(&path)).message;
    assert!(found.contains("refcount block at 0x80000000000"), "{found}");
}

/// Writes a header of version 3 for clusters of 512 bytes: so many entries of the L1 table and
/// clusters of the refcount table, and what lies where.
fn header(l1: (u64, u32), refcount_table: (u64, u32), snapshots: (u64, u32)) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    bytes[23] = 9;
    bytes[24..32].copy_from_slice(&(u64::from(l1.1) << 15).to_be_bytes());
    bytes[36..40].copy_from_slice(&l1.1.to_be_bytes());
    bytes[40..48].copy_from_slice(&l1.0.to_be_bytes());
    bytes[48..56].copy_from_slice(&refcount_table.0.to_be_bytes());
    bytes[56..60].copy_from_slice(&refcount_table.1.to_be_bytes());
    bytes[60..64].copy_from_slice(&snapshots.1.to_be_bytes());
    bytes[64..72].copy_from_slice(&snapshots.0.to_be_bytes());
    bytes[99] = 4;
    bytes[103] = 112;
    bytes
}

/// Opens an image; returns how many bytes of memory that took.
fn memory_to_open(path: &Path) -> u64 {
    let image = Image {
        ro: true,
        ..image(path)
    };
    let ring = Ring::new(Default::default()).unwrap();
    let held = Held::now();
    drop(open(&ring, "qcow2", &image).unwrap());
    held.peak()
}

/// Names are any bytes; they take no more memory for being no text.
#[test]
fn the_largest_snapshot_table_fits_into_256_mib_of_memory() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let file = std::fs::File::create(&path).unwrap();
    let snapshots = 64 << 10;
    let header = header((1024, 1), (512, 1), (snapshots, 1000));
    file.write_all_at(&header, 0).unwrap();
    let mut entry = vec![0xff; 65000 + 40];
    entry[..40].fill(0);
    entry[14..16].copy_from_slice(&65000u16.to_be_bytes());
    file.write_all_at(&entry.repeat(1000), snapshots).unwrap();
    let bytes = memory_to_open(&path);
    assert!((64 << 20..160 << 20).contains(&bytes), "{bytes}");
}
