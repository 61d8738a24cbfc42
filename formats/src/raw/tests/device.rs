//! Host block devices: loop devices, which only root may have.

use std::fmt::Display;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::testing::{Loop, bytes, directory, image, open, refused, run, segments};
use crate::{Engine, Image, OpenError, Ring};

/// A block device of 1 MiB, and the file behind it.
fn device(sector_size: u32) -> Option<(tempfile::TempDir, PathBuf, Loop)> {
    let directory = directory();
    let file = directory.path().join("behind");
    fs::write(&file, [1; 1 << 20]).unwrap();
    let device = Loop::new(&file, sector_size)?;
    Some((directory, file, device))
}

fn ring() -> Ring {
    Ring::new(Engine::Auto).unwrap()
}

/// Opens a device that was let go of. A child that another test starts has it, too, until it is
/// another program.
fn once_free<T, E: Display>(open: impl Fn() -> Result<T, E>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match open() {
            Ok(opened) => return opened,
            Err(error) if Instant::now() > deadline => panic!("not free: {error}"),
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

#[test]
fn a_block_device_is_a_disk_of_its_size() {
    let Some((_directory, file, device)) = device(512) else {
        return;
    };
    let ring = ring();
    for o_direct in [false, true] {
        let image = Image {
            o_direct,
            ..image(&device.0)
        };
        let disk = once_free(|| open(&ring, "sparse-raw", &image));
        assert_eq!(disk.size(), 1 << 20);
        assert!(disk.limits().discard_granularity >= 512);
        run(&ring, disk.write(512, segments(&[7; 1024]))).unwrap();
        run(&ring, disk.flush()).unwrap();
        assert_eq!(fs::read(&file).unwrap()[512..1536], [7; 1024]);
        for unmap in [false, true] {
            run(&ring, disk.write_zeroes(1024, 8192, unmap)).unwrap();
            let memory = segments(&[9; 8704]);
            run(&ring, disk.read(512, memory.clone())).unwrap();
            let want = [&[7; 512][..], &[0; 8192]].concat();
            assert_eq!(bytes(&memory), want);
        }
        run(&ring, disk.close()).unwrap();
    }
}

#[test]
fn a_discard_reaches_what_is_behind_a_block_device() {
    let Some((_directory, file, device)) = device(512) else {
        return;
    };
    let ring = ring();
    let disk = open(&ring, "sparse-raw", &image(&device.0)).unwrap();
    let before = fs::metadata(&file).unwrap().blocks();
    run(&ring, disk.discard(0, 1 << 19)).unwrap();
    assert!(fs::metadata(&file).unwrap().blocks() <= before - 1024);
}

#[test]
fn large_sectors_are_no_matter_but_to_o_direct() {
    let Some((_directory, file, device)) = device(4096) else {
        return;
    };
    let small = image(&device.0);
    let direct = Image {
        o_direct: true,
        ..small.clone()
    };
    let error = refused("sparse-raw", &direct);
    let help = error.help.as_deref();
    assert_eq!(help, Some("set `block_size = 4096`, or `o_direct = false`"));
    let ring = ring();
    let disk = open(&ring, "sparse-raw", &small).unwrap();
    for (at, unmap) in [(512, false), (8704, true)] {
        run(&ring, disk.write_zeroes(at, 512, unmap)).unwrap();
    }
    run(&ring, disk.discard(20480 + 512, 512)).unwrap();
    run(&ring, disk.close()).unwrap();
    let mut want = vec![1; 1 << 20];
    want[512..1024].fill(0);
    want[8704..9216].fill(0);
    assert!(fs::read(&file).unwrap() == want);
}

#[test]
fn a_resize_takes_notice_of_the_size_that_a_block_device_has_by_now() {
    let Some((_directory, file, device)) = device(512) else {
        return;
    };
    let ring = ring();
    let disk = open(&ring, "sparse-raw", &image(&device.0)).unwrap();
    assert!(run(&ring, disk.resize(2 << 20)).is_err());
    assert_eq!(disk.size(), 1 << 20);
    fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(2 << 20)
        .unwrap();
    let noticed = Command::new("losetup")
        .arg("-c")
        .arg(&device.0)
        .status()
        .unwrap();
    assert!(noticed.success());
    run(&ring, disk.resize(2 << 20)).unwrap();
    assert_eq!(disk.size(), 2 << 20);
    drop(disk);
    let larger = Image {
        size: Some(4 << 20),
        ..image(&device.0)
    };
    let error = once_free(|| match refused("sparse-raw", &larger) {
        in_use if in_use.key == OpenError::HOST => Err(in_use),
        error => Ok(error),
    });
    assert_eq!(error.key, "size");
}

#[test]
fn a_block_device_in_use_is_refused() {
    let Some((_directory, _file, device)) = device(512) else {
        return;
    };
    let ring = ring();
    let first = open(&ring, "raw", &image(&device.0)).unwrap();
    let error = refused("raw", &image(&device.0));
    let holder = format!("is being written by process {} ", std::process::id());
    assert!(error.message.contains(&holder), "{error}");
    drop(first);
    // The host itself takes a device like this when it mounts it.
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = fs::File::options();
    options.read(true).custom_flags(libc::O_EXCL);
    let host = once_free(|| options.open(&device.0));
    let error = refused("raw", &image(&device.0));
    assert!(
        error.message.ends_with(": Device or resource busy"),
        "{error}"
    );
    assert!(error.help.unwrap().starts_with("unmount it first"));
    drop(host);
    once_free(|| open(&ring, "raw", &image(&device.0)));
}
