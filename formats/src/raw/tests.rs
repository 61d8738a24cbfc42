//! Raw images, one behaviour each.

mod device;
mod model;

use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::rc::Rc;

use super::*;
use crate::testing::{bytes, directory, engines, image, in_tmpfs, open, refused, run, segments};
use crate::{Engine, Fault, What};

/// Opens an image of `content`; the directory is to be kept.
fn disk(ring: &Ring, format: &str, content: &[u8]) -> (tempfile::TempDir, Box<dyn Disk>) {
    let directory = directory();
    let path = directory.path().join("a.img");
    fs::write(&path, content).unwrap();
    let disk = open(ring, format, &image(&path)).unwrap();
    (directory, disk)
}

fn ring() -> Ring {
    Ring::new(Engine::Auto).unwrap()
}

/// Bytes that are allocated on the host.
fn allocated(directory: &tempfile::TempDir) -> u64 {
    fs::metadata(directory.path().join("a.img"))
        .unwrap()
        .blocks()
        * 512
}

#[test]
fn names_and_extensions_lead_to_the_raw_formats() {
    for extension in ["img", "raw", "IMG"] {
        assert_eq!(crate::for_extension(extension).unwrap().name, "raw");
    }
    assert!(crate::for_extension("sparse-raw").is_none());
    for (sparse, name) in [(true, "sparse-raw"), (false, "raw")] {
        assert_eq!(crate::raw_for(sparse), name);
        assert_eq!(crate::find(name).unwrap().name, name);
    }
    let names: Vec<_> = crate::formats().unwrap().iter().map(|f| f.name).collect();
    assert!(names.is_sorted() && names.contains(&"raw") && names.contains(&"sparse-raw"));
}

#[test]
fn a_raw_image_is_fully_allocated_when_it_is_opened() {
    let ring = ring();
    let content = [&[3; 4096][..], &[0; 1 << 20]].concat();
    let (directory, disk) = disk(&ring, "raw", &content);
    drop(disk);
    let path = directory.path().join("a.img");
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    assert!(allocated(&directory) < 8 << 20);
    let told = Rc::new(RefCell::new(Vec::new()));
    let hook = Rc::clone(&told);
    ring.on_progress(move |progress| {
        hook.borrow_mut()
            .push((progress.path.to_owned(), progress.done, progress.total));
    });
    let _disk = open(&ring, "raw", &image(&path)).unwrap();
    assert!(allocated(&directory) >= 8 << 20);
    assert_eq!(*told.borrow(), [(path.clone(), 8 << 20, 8 << 20)]);
    assert_eq!(fs::read(&path).unwrap()[..content.len()], content);
}

#[test]
fn a_raw_image_has_no_discard_and_stays_allocated() {
    let ring = ring();
    let (directory, disk) = disk(&ring, "raw", &[1; 1 << 20]);
    assert_eq!(disk.limits().discard_granularity, 0);
    let error = run(&ring, disk.discard(0, 4096)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    run(&ring, disk.write_zeroes(0, 1 << 19, true)).unwrap();
    assert!(allocated(&directory) >= 1 << 20);
    run(&ring, disk.resize(2 << 20)).unwrap();
    assert!(allocated(&directory) >= 2 << 20);
    run(&ring, disk.resize(4096)).unwrap();
    assert_eq!(disk.size(), 4096);
}

#[test]
fn what_is_discarded_or_unmapped_is_freed_on_the_host_and_reads_as_zeroes() {
    let ring = ring();
    let (directory, disk) = disk(&ring, "sparse-raw", &[1; 1 << 20]);
    let block = u64::from(disk.limits().discard_granularity);
    assert!(block >= 512);
    let before = allocated(&directory);
    run(&ring, disk.discard(0, 1 << 18)).unwrap();
    assert!(allocated(&directory) <= before - (1 << 18));
    run(&ring, disk.write_zeroes(1 << 18, 1 << 18, true)).unwrap();
    assert!(allocated(&directory) <= before - (1 << 19));
    let memory = segments(&[9; 1 << 20]);
    run(&ring, disk.read(0, memory.clone())).unwrap();
    let read = bytes(&memory);
    assert!(read[..1 << 19].iter().all(|byte| *byte == 0));
    assert!(read[1 << 19..].iter().all(|byte| *byte == 1));
}

#[test]
fn zeroes_are_written_where_the_host_cannot_make_them() {
    for format in ["raw", "sparse-raw"] {
        let ring = ring();
        let (_directory, disk) = disk(&ring, format, &[1; 3 << 20]);
        let asked = Rc::new(Cell::new(0));
        let count = Rc::clone(&asked);
        ring.inject(move |attempt| {
            let refused = attempt.what == crate::What::Fallocate;
            count.set(count.get() + u32::from(refused));
            refused.then_some(crate::Fault::Errno(libc::EOPNOTSUPP))
        });
        for _ in 0..3 {
            run(&ring, disk.write_zeroes(512, (2 << 20) + 512, true)).unwrap();
        }
        assert!(asked.get() <= 2, "a host that cannot is not asked again");
        let memory = segments(&[9; 3 << 20]);
        run(&ring, disk.read(0, memory.clone())).unwrap();
        let mut want = vec![1; 3 << 20];
        want[512..][..(2 << 20) + 512].fill(0);
        assert!(bytes(&memory) == want);
    }
}

#[test]
fn size_creates_grows_or_refuses() {
    let directory = directory();
    let path = directory.path().join("a.img");
    let sized = |size| Image {
        size: Some(size),
        ..image(&path)
    };
    let ring = ring();
    for format in ["sparse-raw", "raw"] {
        let _ = fs::remove_file(&path);
        let missing = refused(format, &image(&path));
        assert!(missing.help.unwrap().contains("add `size`"));
        for size in [1 << 20, 1 << 20, 3 << 20] {
            let disk = open(&ring, format, &sized(size)).unwrap();
            assert_eq!(disk.size(), size);
            assert_eq!(fs::metadata(&path).unwrap().len(), size);
        }
        let larger = refused(format, &sized(1 << 20));
        assert_eq!(larger.key, "size");
        assert!(
            larger.message.starts_with("`size` is 1MiB, but"),
            "{larger}"
        );
        assert!(larger.message.ends_with("has 3MiB"), "{larger}");
        assert_eq!(fs::metadata(&path).unwrap().len(), 3 << 20);
        let read_only = refused(
            format,
            &Image {
                ro: true,
                ..sized(4 << 20)
            },
        );
        assert_eq!(read_only.key, "size");
        let blocks = refused(format, &sized(1000));
        assert_eq!(
            blocks.message,
            "`size` is 1000, expected a multiple of `block_size`, 512"
        );
    }
}

#[test]
fn an_image_that_is_no_multiple_of_the_block_size_is_refused_and_can_be_grown() {
    let directory = directory();
    let path = directory.path().join("a.img");
    fs::write(&path, [1; 1000]).unwrap();
    let error = refused("sparse-raw", &image(&path));
    assert_eq!(error.key, "block_size");
    assert_eq!(
        error.help.as_deref(),
        Some("add `size = 1024` to grow it to whole blocks")
    );
    for o_direct in [false, true] {
        let grown = Image {
            size: Some(4096),
            o_direct,
            ..image(&path)
        };
        drop(open(&ring(), "raw", &grown).unwrap());
        assert_eq!(
            fs::read(&path).unwrap(),
            [&[1; 1000][..], &[0; 3096]].concat()
        );
        fs::write(&path, [1; 1000]).unwrap();
    }
}

#[test]
fn content_of_another_format_is_refused_unless_the_format_is_written_out() {
    let directory = directory();
    let path = directory.path().join("a.img");
    fs::write(&path, [&b"QFI\xfb"[..], &[0; 508]].concat()).unwrap();
    for o_direct in [false, true] {
        let image = Image {
            o_direct,
            ..image(&path)
        };
        for format in ["raw", "sparse-raw"] {
            let error = refused(format, &image);
            assert_eq!(error.key, "format");
            assert!(
                error.message.contains("begins like a qcow2 image"),
                "{error}"
            );
            assert!(error.help.unwrap().contains("add `format = \"raw\"` if"));
            let written = Image {
                format_written: true,
                ..image.clone()
            };
            open(&ring(), format, &written).unwrap();
        }
    }
}

#[test]
fn a_read_only_image_is_left_as_it_is() {
    let directory = directory();
    let path = directory.path().join("a.img");
    fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let ring = ring();
    let ro = Image {
        ro: true,
        ..image(&path)
    };
    let disk = open(&ring, "raw", &ro).unwrap();
    assert_eq!(allocated(&directory), 0);
    let limits = disk.limits();
    assert!(!limits.resize && !limits.write_zeroes && limits.discard_granularity == 0);
    run(&ring, disk.flush()).unwrap();
    assert!(run(&ring, disk.write(0, segments(&[1; 512]))).is_err());
    run(&ring, disk.close()).unwrap();
}

#[test]
fn a_failed_allocation_leaves_size_and_content_and_no_new_file() {
    let directory = directory();
    let path = directory.path().join("a.img");
    let ring = ring();
    let full = || {
        ring.inject(|attempt| {
            let fails = attempt.what == crate::What::Fallocate;
            fails.then_some(crate::Fault::Errno(libc::ENOSPC))
        });
    };
    let sized = Image {
        size: Some(1 << 20),
        ..image(&path)
    };
    full();
    let error = open(&ring, "raw", &sized).err().unwrap();
    assert_eq!(error.key, OpenError::HOST);
    assert!(
        error.message.starts_with("cannot allocate 1MiB for `"),
        "{error}"
    );
    assert!(
        error.message.ends_with(": No space left on device"),
        "{error}"
    );
    assert!(!path.exists());
    fs::write(&path, [7; 512]).unwrap();
    assert!(open(&ring, "raw", &sized).is_err());
    assert_eq!(fs::read(&path).unwrap(), [7; 512]);
    ring.inject(|_| None);
    let disk = open(&ring, "raw", &sized).unwrap();
    full();
    assert!(run(&ring, disk.resize(2 << 20)).is_err());
    assert_eq!(disk.size(), 1 << 20);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
    assert!(run(&ring, disk.resize(1000)).is_err());
}

#[test]
fn a_host_fault_is_the_result_of_the_request_and_the_disk_goes_on() {
    for engine in engines() {
        let ring = Ring::new(engine).unwrap();
        for errno in [libc::EIO, libc::ENOSPC] {
            let (_directory, disk) = disk(&ring, "sparse-raw", &[1; 1 << 20]);
            ring.inject(move |_| Some(crate::Fault::Errno(errno)));
            let memory = segments(&[2; 4096]);
            let results = run(&ring, async {
                [
                    disk.read(0, memory.clone()).await,
                    disk.write(0, memory.clone()).await,
                    disk.discard(0, 4096).await,
                    disk.write_zeroes(0, 4096, false).await,
                    disk.write_zeroes(0, 4096, true).await,
                ]
            });
            for result in results {
                assert_eq!(result.unwrap_err().raw_os_error(), Some(errno));
            }
            ring.inject(|_| None);
            run(&ring, disk.read(0, memory.clone())).unwrap();
            assert_eq!(bytes(&memory), [1; 4096]);
            run(&ring, disk.flush()).unwrap();
        }
    }
}

#[test]
fn no_flush_succeeds_after_one_that_failed() {
    for engine in engines() {
        for format in ["raw", "sparse-raw"] {
            let ring = Ring::new(engine).unwrap();
            let (_directory, disk) = disk(&ring, format, &[1; 1 << 20]);
            run(&ring, disk.write(0, segments(&[2; 4096]))).unwrap();
            ring.inject(|attempt| {
                let sync = attempt.what == crate::What::Sync;
                sync.then_some(crate::Fault::Errno(libc::EIO))
            });
            run(&ring, disk.flush()).unwrap_err();
            // The kernel has forgotten all about it.
            ring.inject(|_| None);
            run(&ring, disk.write(0, segments(&[3; 4096]))).unwrap();
            run(&ring, disk.flush()).unwrap_err();
            let memory = segments(&[0; 4096]);
            run(&ring, disk.read(0, memory.clone())).unwrap();
            assert_eq!(bytes(&memory), [3; 4096]);
            run(&ring, disk.close()).unwrap_err();
        }
    }
}

#[test]
fn an_encrypted_disk_is_a_raw_disk() {
    let directory = directory();
    let path = directory.path().join("a.img");
    fs::write(&path, [&b"LUKS\xba\xbe"[..], &[0; 506]].concat()).unwrap();
    open(&ring(), "raw", &image(&path)).unwrap();
}

#[test]
fn a_full_host_fails_writes_until_space_is_freed() {
    let name = "raw::tests::a_full_host_fails_writes_until_space_is_freed";
    let Some(mounted) = in_tmpfs(name, "1m") else {
        return;
    };
    let path = mounted.join("a.img");
    let sized = Image {
        size: Some(4 << 20),
        ..image(&path)
    };
    // It does not fit: nothing is there afterwards, and nothing is taken.
    let error = refused("raw", &sized);
    assert!(
        error.message.ends_with(": No space left on device"),
        "{error}"
    );
    assert!(!path.exists());
    fs::File::create(&path).unwrap().set_len(4096).unwrap();
    assert_eq!(refused("raw", &sized).key, OpenError::HOST);
    assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
    for engine in engines() {
        let ring = Ring::new(engine).unwrap();
        let disk = open(&ring, "sparse-raw", &sized).unwrap();
        let write = |at: u64| run(&ring, disk.write(at << 16, segments(&[1; 1 << 16])));
        let written = (0..64).take_while(|at| write(*at).is_ok()).count() as u64;
        assert!((8..=16).contains(&written), "{written}");
        for _ in 0..3 {
            let error = write(written).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        }
        write(0).unwrap();
        run(&ring, disk.flush()).unwrap();
        run(&ring, disk.discard(0, 1 << 17)).unwrap();
        write(written).unwrap();
        run(&ring, disk.discard(0, 4 << 20)).unwrap();
    }
}

#[test]
fn qemu_img_finds_what_was_written() {
    let directory = directory();
    let ring = ring();
    for format in ["raw", "sparse-raw"] {
        let (a, b) = (
            directory.path().join("a.img"),
            directory.path().join("b.qcow2"),
        );
        let _ = fs::remove_file(&a);
        let sized = Image {
            size: Some(1 << 20),
            ..image(&a)
        };
        let disk = open(&ring, format, &sized).unwrap();
        run(&ring, disk.write(4096, segments(&[0x5a; 65536]))).unwrap();
        run(&ring, disk.write_zeroes(8192, 4096, true)).unwrap();
        run(&ring, disk.close()).unwrap();
        let tool = |name: &str, args: &[&str]| {
            let output = Command::new(name).args(args).output();
            let output = output.expect("the package qemu-utils is needed");
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{text}");
            text
        };
        let (a, b) = (a.to_str().unwrap(), b.to_str().unwrap());
        tool("qemu-img", &["create", "-q", "-f", "qcow2", b, "1M"]);
        let writes = ["write -P 0x5a 4096 65536", "write -z 8192 4096"];
        for write in writes {
            tool("qemu-io", &["-f", "qcow2", "-c", write, b]);
        }
        let same = tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", a, b]);
        assert_eq!(same, "Images are identical.\n");
    }
}

#[test]
fn a_growth_that_the_host_refuses_leaves_size_and_space_as_they_were() {
    for refused in [What::Fallocate, What::Call] {
        let ring = ring();
        let (directory, disk) = disk(&ring, "raw", &[1; 1 << 20]);
        let before = allocated(&directory);
        ring.inject(move |attempt| (attempt.what == refused).then_some(Fault::Errno(libc::EFBIG)));
        let error = run(&ring, disk.resize(4 << 20)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG), "{refused:?}");
        assert_eq!(disk.size(), 1 << 20);
        ring.inject(|_| None);
        assert_eq!(allocated(&directory), before, "{refused:?}");
        run(&ring, disk.resize(4 << 20)).unwrap();
        assert!(allocated(&directory) >= 4 << 20);
    }
}
