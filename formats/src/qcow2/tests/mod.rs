//! The engine as a user of the trait sees it, and as `qemu-img` judges it.

use std::path::Path;
use std::rc::Rc;

use super::testing::qemu_img;
use crate::testing::{bytes, directory, engines, image, open, run, segments};
use crate::{Disk, Image, OptionValue, Ring};

mod backing;
mod faults;
mod flush;
mod growth;
mod hostile;
mod races;
mod short;
mod space;

const MIB: u64 = 1 << 20;

/// Neither damaged nor leaking.
fn check(path: &Path) {
    qemu_img("check", path);
}

fn new_image(path: &Path, size: u64, options: &[(&'static str, OptionValue)]) -> Image {
    Image {
        size: Some(size),
        options: options.to_vec(),
        ..image(path)
    }
}

fn read(ring: &Ring, disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
    let memory = segments(&vec![0xee; len]);
    run(ring, disk.read(offset, memory.clone())).unwrap();
    bytes(&memory)
}

fn write(ring: &Ring, disk: &dyn Disk, offset: u64, content: &[u8]) {
    run(ring, disk.write(offset, segments(content))).unwrap();
}

#[test]
fn what_is_written_is_read_again_also_after_closing() {
    for engine in engines() {
        let ring = Ring::new(engine).unwrap();
        let directory = directory();
        let path = directory.path().join("a.qcow2");
        let disk = open(&ring, "qcow2", &new_image(&path, 64 * MIB, &[])).unwrap();
        write(&ring, &*disk, 0, &[1; 512]);
        write(&ring, &*disk, 5 * MIB + 512, &[2; 200_704]);
        assert_eq!(read(&ring, &*disk, 0, 1024), [[1; 512], [0; 512]].concat());
        run(&ring, disk.flush()).unwrap();
        run(&ring, disk.close()).unwrap();
        check(&path);
        let disk = open(&ring, "qcow2", &image(&path)).unwrap();
        assert_eq!(disk.size(), 64 * MIB);
        assert_eq!(read(&ring, &*disk, 5 * MIB, 512), [0; 512]);
        assert_eq!(read(&ring, &*disk, 5 * MIB + 512, 200_704), [2; 200_704]);
        assert_eq!(read(&ring, &*disk, 5 * MIB + 201_216, 512), [0; 512]);
        run(&ring, disk.discard(0, 64 * MIB)).unwrap();
        assert_eq!(read(&ring, &*disk, 0, 512), [0; 512]);
        run(&ring, disk.resize(3 << 40)).unwrap();
        write(&ring, &*disk, (3 << 40) - 512, &[9; 512]);
        run(&ring, disk.close()).unwrap();
        check(&path);
    }
}

#[test]
fn writes_to_one_cluster_at_once_are_all_kept() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let disk = Rc::new(open(&ring, "qcow2", &new_image(&path, 4 * MIB, &[])).unwrap());
    run(&ring, async {
        for at in 0..128 {
            let disk = Rc::clone(&disk);
            ring.spawn(async move {
                disk.write(at * 512, segments(&[at as u8; 512]))
                    .await
                    .unwrap();
            });
        }
        while Rc::strong_count(&disk) > 1 {
            ring.yield_now().await;
        }
    });
    for at in 0..128 {
        assert_eq!(read(&ring, &**disk, at * 512, 512), [at as u8; 512]);
    }
    run(&ring, Rc::into_inner(disk).unwrap().close()).unwrap();
    check(&path);
}

#[test]
fn with_o_direct_the_file_has_whole_pages_before_anything_is_in_flight() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let small = [("cluster_size", OptionValue::Number(4096))];
    let disk = open(&ring, "qcow2", &new_image(&path, MIB, &small)).unwrap();
    run(&ring, disk.close()).unwrap();
    let before = std::fs::metadata(&path)
        .unwrap()
        .len()
        .next_multiple_of(4096)
        + 512;
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(before).unwrap();
    let direct = Image {
        o_direct: true,
        block_size: 4096,
        ..image(&path)
    };
    match open(&ring, "qcow2", &direct) {
        Ok(disk) => {
            let len = std::fs::metadata(&path).unwrap().len();
            assert!(len > before && len.is_multiple_of(4096), "{len}");
            write(&ring, &*disk, 0, &[1; 4096]);
            run(&ring, disk.close()).unwrap();
        }
        // Where O_DIRECT takes whole blocks only, so must the file have.
        Err(error) => assert!(["path", "o_direct"].contains(&error.key), "{error}"),
    }
    check(&path);
}
