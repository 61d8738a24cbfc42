//! Ephemeral disks, one behaviour each.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::*;
use crate::Engine;
use crate::testing::{bytes, directory, image, run, segments};

/// An image of `content` that was last written an hour ago; the directory is to be kept.
fn base(content: &[u8]) -> (tempfile::TempDir, PathBuf, SystemTime) {
    let directory = directory();
    let path = directory.path().join("a.img");
    fs::write(&path, content).unwrap();
    let hour_ago = SystemTime::now() - Duration::from_secs(3600);
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(hour_ago).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    (directory, path, modified)
}

fn open(ring: &Ring, image: &Image) -> Result<Box<dyn Disk>, OpenError> {
    let format = crate::find(crate::raw_for(image.sparse)).unwrap();
    run(ring, open_ephemeral(format, ring, image))
}

fn refused(image: &Image) -> OpenError {
    let ring = Ring::new(Engine::Auto).unwrap();
    open(&ring, image).err().expect("should have been refused")
}

fn read(ring: &Ring, disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
    let memory = segments(&vec![9; len]);
    run(ring, disk.read(offset, memory.clone())).unwrap();
    bytes(&memory)
}

#[test]
fn the_image_keeps_its_bytes_size_and_times_whatever_is_done_to_the_disk() {
    for (sparse, o_direct) in [(true, false), (false, false), (true, true)] {
        let ring = Ring::new(Engine::Auto).unwrap();
        let (_directory, path, modified) = base(&[1; 65536]);
        let image = Image {
            sparse,
            o_direct,
            block_size: 4096,
            size: Some(1 << 20),
            ..image(&path)
        };
        let disk = open(&ring, &image).unwrap();
        run(&ring, disk.write(4096, segments(&[2; 4096]))).unwrap();
        run(&ring, disk.write_zeroes(8192, 4096, true)).unwrap();
        run(&ring, disk.discard(16384, 4096)).unwrap();
        run(&ring, disk.flush()).unwrap();
        run(&ring, disk.resize(2 << 20)).unwrap();
        assert_eq!(read(&ring, &*disk, 4096, 4096), [2; 4096]);
        run(&ring, disk.close()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [1; 65536]);
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), modified);
        let again = open(&ring, &image).unwrap();
        assert_eq!(read(&ring, &*again, 4096, 4096), [1; 4096]);
    }
}

#[test]
fn the_changes_have_no_name() {
    let ring = Ring::new(Engine::Auto).unwrap();
    let (directory, path, _) = base(&[1; 4096]);
    let disk = open(&ring, &image(&path)).unwrap();
    run(&ring, disk.write(0, segments(&[2; 4096]))).unwrap();
    let names: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[test]
fn ephemeral_disks_share_an_image_that_nobody_writes() {
    let ring = Ring::new(Engine::Auto).unwrap();
    let (_directory, path, _) = base(&[1; 4096]);
    let first = open(&ring, &image(&path)).unwrap();
    let second = open(&ring, &image(&path)).unwrap();
    run(&ring, first.write(0, segments(&[2; 4096]))).unwrap();
    assert_eq!(read(&ring, &*second, 0, 4096), [1; 4096]);
    let writer = crate::find("sparse-raw").unwrap();
    let refused = run(&ring, (writer.open)(&ring, &image(&path)));
    assert_eq!(refused.err().unwrap().key, OpenError::HOST);
}

#[test]
fn a_larger_size_is_the_disk_s_alone_and_a_smaller_one_is_refused() {
    let ring = Ring::new(Engine::Auto).unwrap();
    let (_directory, path, _) = base(&[1; 4096]);
    let sized = |size| Image {
        size: Some(size),
        ..image(&path)
    };
    // So large that a mark for each of its blocks would not fit into memory.
    let large = 1 << 42;
    let disk = open(&ring, &sized(large)).unwrap();
    assert_eq!(disk.size(), large);
    assert_eq!(read(&ring, &*disk, 2048, 4096)[..2048], [1; 2048]);
    assert_eq!(read(&ring, &*disk, large - 512, 512), [0; 512]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
    let error = refused(&sized(512));
    assert_eq!(error.key, "size");
    assert!(
        error.message.starts_with("`size` is 512 bytes, but"),
        "{error}"
    );
    let error = refused(&sized(i64::MAX as u64 / 512 * 512));
    assert!(error.message.starts_with("an ephemeral disk of"), "{error}");
}

#[test]
fn what_was_cut_off_does_not_come_back_from_the_image() {
    let ring = Ring::new(Engine::Auto).unwrap();
    let (_directory, path, _) = base(&[1; 8192]);
    let disk = open(&ring, &image(&path)).unwrap();
    run(&ring, disk.resize(4096)).unwrap();
    run(&ring, disk.resize(12288)).unwrap();
    let want = [&[1; 4096][..], &[0; 8192]].concat();
    assert_eq!(read(&ring, &*disk, 0, 12288), want);
}

#[test]
fn an_image_that_does_not_exist_is_not_created() {
    let directory = directory();
    let path = directory.path().join("a.img");
    let error = refused(&Image {
        size: Some(1 << 20),
        ..image(&path)
    });
    assert_eq!(error.key, "path");
    assert!(
        error.message.ends_with("No such file or directory"),
        "{error}"
    );
    assert!(!path.exists());
}

#[test]
fn what_is_written_is_volatile_flushed_or_not() {
    let ring = Ring::new(Engine::Auto).unwrap();
    let (_directory, path, _) = base(&[1; 65536]);
    let disk = open(&ring, &image(&path)).unwrap();
    run(&ring, disk.write(4096, segments(&[2; 4096]))).unwrap();
    run(&ring, disk.flush()).unwrap();
    assert!(disk.volatile());
}
