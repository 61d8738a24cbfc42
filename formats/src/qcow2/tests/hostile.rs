//! Hostile images, one kind of harm each: an error says what is wrong, and nothing is done.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::super::Header;
use super::super::entry::{COPIED, OFFSET_MASK};
use super::super::header::be64;
use super::*;
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
    let error = run(&ring, disk.flush()).unwrap_err().to_string();
    assert!(error.contains("holds a table"), "{error}");
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
