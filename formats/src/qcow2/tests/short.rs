//! Files that end earlier than what they hold, and tables that point past their end.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use super::*;
use crate::qcow2::Header;
use crate::qcow2::entry::OFFSET_MASK;
use crate::qcow2::testing::{qemu_create, qemu_io};

/// Reads a big-endian number of a file.
fn number(path: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    let file = std::fs::File::open(path).unwrap();
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// Offset of the first L2 table.
fn first_l2_table(path: &Path) -> u64 {
    let header = Header::parse(&std::fs::read(path).unwrap()).unwrap();
    number(path, header.l1_table_offset) & OFFSET_MASK
}

#[test]
fn what_is_written_past_the_end_of_a_file_that_ends_in_a_cluster_is_read_again() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("extended_l2=on", &path, "1M");
    qemu_io(&["write -P 1 0 4k"], &path);
    let len = path.metadata().unwrap().len();
    assert!(!len.is_multiple_of(65536), "{len}");
    let disk = open(&ring, "qcow2", &image(&path)).unwrap();
    write(&ring, &*disk, 8192, &[2; 4096]);
    assert_eq!(read(&ring, &*disk, 8192, 4096), [2; 4096]);
    run(&ring, disk.close()).unwrap();
    check(&path);
    qemu_io(
        &["read -P 1 0 4k", "read -P 2 8k 4k", "read -P 0 4k 4k"],
        &path,
    );
}

#[test]
fn what_is_written_past_the_end_of_a_data_file_is_read_again() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let data = directory.path().join("a.raw");
    qemu_create(&format!("data_file={}", data.display()), &path, "1M");
    OpenOptions::new()
        .write(true)
        .open(&data)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let options = vec![("data_file", OptionValue::Path(data.clone()))];
    let disk = open(
        &ring,
        "qcow2",
        &Image {
            options,
            ..image(&path)
        },
    )
    .unwrap();
    write(&ring, &*disk, 2048, &[3; 8192]);
    write(&ring, &*disk, 65536, &[2; 4096]);
    assert_eq!(read(&ring, &*disk, 2048, 8192), [3; 8192]);
    assert_eq!(read(&ring, &*disk, 65536, 4096), [2; 4096]);
    run(&ring, disk.close()).unwrap();
    check(&path);
}

#[test]
fn zeroes_whose_cluster_is_said_to_be_past_the_end_of_the_file_are_not_written_there() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("", &path, "1M");
    qemu_io(&["write 0 64k"], &path);
    let far: u64 = 1 << 63 | 1 << 40 | 1;
    patch(&path, first_l2_table(&path), &far.to_be_bytes());
    let disk = open(&ring, "qcow2", &image(&path)).unwrap();
    let error = run(&ring, disk.write(0, segments(&[1; 512]))).unwrap_err();
    assert!(error.to_string().contains("past the end"), "{error}");
    drop(disk);
    assert!(path.metadata().unwrap().len() < 1 << 30);
}

#[test]
fn a_snapshot_whose_l1_table_is_at_the_end_of_all_numbers_is_refused() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("", &path, "1M");
    qemu_img("snapshot -c a", &path);
    let header = Header::parse(&std::fs::read(&path).unwrap()).unwrap();
    for offset in [u64::MAX, u64::MAX << 16, 1 << 63] {
        patch(&path, header.snapshots_offset, &offset.to_be_bytes());
        let ring = Ring::new(Default::default()).unwrap();
        assert!(open(&ring, "qcow2", &image(&path)).is_err());
    }
}

#[test]
fn an_l1_table_that_the_file_ends_in_is_as_long_as_the_header_says() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("", &path, "100G");
    let header = Header::parse(&std::fs::read(&path).unwrap()).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(header.l1_table_offset + 8).unwrap();
    let disk = open(&ring, "qcow2", &image(&path)).unwrap();
    write(&ring, &*disk, 99 << 30, &[1; 4096]);
    assert_eq!(read(&ring, &*disk, 99 << 30, 4096), [1; 4096]);
    run(&ring, disk.close()).unwrap();
    check(&path);
}
