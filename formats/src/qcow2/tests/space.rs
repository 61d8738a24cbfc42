//! Clusters that run out, and those that are on their way to being free.

use std::cell::Cell;

use super::*;
use crate::qcow2::testing::{qemu_check, qemu_create};
use crate::{Fault, What};

const CLUSTER: u64 = 65536;

/// Creates an image of the smallest clusters.
fn create_small(path: &Path, size: &str) {
    qemu_create("cluster_size=512,refcount_bits=64", path, size);
}

/// Opens an image with hardly any memory for its tables.
fn open_small(ring: &Ring, path: &Path) -> Box<dyn Disk> {
    let options = vec![("cache_size", OptionValue::Number(1024))];
    let image = Image {
        options,
        ..image(path)
    };
    open(ring, "qcow2", &image).unwrap()
}

/// Opens an image whose file grows no more, and writes until it is full; returns how many
/// clusters there are.
fn open_full(ring: &Ring, path: &Path) -> (Rc<Box<dyn Disk>>, u64) {
    let disk = open(ring, "qcow2", &new_image(path, 64 * MIB, &[])).unwrap();
    write(ring, &*disk, 0, &[1; CLUSTER as usize]);
    ring.inject(|attempt| (attempt.what == What::Call).then_some(Fault::Errno(libc::ENOSPC)));
    for at in 1.. {
        let memory = segments(&[1; CLUSTER as usize]);
        if let Err(error) = run(ring, disk.write(at * CLUSTER, memory)) {
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
            assert!(at > 100, "{at}");
            return (Rc::new(disk), at);
        }
    }
    unreachable!()
}

#[test]
fn where_the_file_cannot_grow_a_write_waits_for_clusters_that_requests_in_flight_may_use() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let (disk, count) = open_full(&ring, &path);
    let memory = segments(&[0; CLUSTER as usize]);
    let late = disk.read(0, memory.clone());
    run(&ring, disk.discard(0, CLUSTER)).unwrap();
    run(&ring, disk.flush()).unwrap();
    let written = Rc::new(Cell::new(false));
    run(&ring, async {
        let (writer, done) = (Rc::clone(&disk), Rc::clone(&written));
        ring.spawn(async move {
            let memory = segments(&[2; CLUSTER as usize]);
            writer.write(count * CLUSTER, memory).await.unwrap();
            done.set(true);
        });
        for _ in 0..50 {
            ring.yield_now().await;
        }
        assert!(!written.get());
        late.await.unwrap();
        assert_eq!(bytes(&memory), [1; CLUSTER as usize]);
        while !written.get() {
            ring.yield_now().await;
        }
    });
    assert_eq!(
        read(&ring, &**disk, count * CLUSTER, CLUSTER as usize),
        [2; CLUSTER as usize]
    );
    ring.inject(|_| None);
    run(&ring, Rc::into_inner(disk).unwrap().close()).unwrap();
    check(&path);
}

#[test]
fn where_the_file_cannot_grow_a_write_waits_for_a_commit_that_frees_clusters() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let (disk, count) = open_full(&ring, &path);
    run(&ring, async {
        disk.discard(0, 4 * CLUSTER).await.unwrap();
        let flushing = Rc::clone(&disk);
        ring.spawn(async move { flushing.flush().await.unwrap() });
        ring.yield_now().await;
        for at in 0..4 {
            let disk = Rc::clone(&disk);
            ring.spawn(async move {
                let memory = segments(&[2; CLUSTER as usize]);
                disk.write((count + at) * CLUSTER, memory).await.unwrap();
            });
        }
        while Rc::strong_count(&disk) > 1 {
            ring.yield_now().await;
        }
    });
    ring.inject(|_| None);
    run(&ring, Rc::into_inner(disk).unwrap().close()).unwrap();
    check(&path);
}

#[test]
fn a_flush_succeeds_when_all_is_durable_though_nothing_can_be_freed() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    create_small(&path, "2M");
    let disk = open_small(&ring, &path);
    write(&ring, &*disk, 0, &[1; MIB as usize]);
    run(&ring, disk.flush()).unwrap();
    run(&ring, disk.discard(0, 64 << 10)).unwrap();
    let failed = Rc::new(Cell::new(0));
    let count = Rc::clone(&failed);
    // Refcounts of what is to be freed cannot be read.
    ring.inject(move |attempt| {
        let fails = attempt.what == What::Read;
        count.set(count.get() + u32::from(fails));
        fails.then_some(Fault::Errno(libc::EIO))
    });
    run(&ring, disk.flush()).unwrap();
    assert!(failed.get() > 0);
    ring.inject(|_| None);
    assert_eq!(read(&ring, &*disk, 0, 512), [0; 512]);
    // It is made up for.
    run(&ring, disk.close()).unwrap();
    check(&path);
}

#[test]
fn a_refcount_table_that_could_not_grow_leaks_nothing() {
    // The table has room for 2 MiB.
    const START: u64 = 15 << 17;
    const STEP: u64 = 16 << 10;
    let ring = Ring::new(crate::Engine::Threads).unwrap();
    let directory = directory();
    let original = directory.path().join("original.qcow2");
    create_small(&original, "6M");
    let disk = open_small(&ring, &original);
    write(&ring, &*disk, 0, &vec![1; START as usize]);
    run(&ring, disk.close()).unwrap();
    let path = directory.path().join("a.qcow2");
    // Failing each and every operation takes too long.
    for nth in (1..).step_by(5) {
        std::fs::copy(&original, &path).unwrap();
        let disk = open_small(&ring, &path);
        eprintln!("{nth}");
        let done = Rc::new(Cell::new(false));
        let (failed, mut count) = (Rc::clone(&done), 0);
        ring.inject(move |attempt| {
            count += u32::from(attempt.what != What::Sync);
            let fails = count == nth && !failed.replace(count >= nth);
            fails.then_some(Fault::Errno(libc::EIO))
        });
        for at in (START..START + 20 * STEP).step_by(STEP as usize) {
            let memory = segments(&[2; STEP as usize]);
            if run(&ring, disk.write(at, memory.clone())).is_err() {
                run(&ring, disk.write(at, memory)).unwrap();
            }
        }
        ring.inject(|_| None);
        run(&ring, disk.close()).unwrap();
        let found = qemu_check(&path);
        assert_eq!(found.get("corruptions"), None, "{nth}: {found:?}");
        assert_eq!(found.get("leaks"), None, "{nth}: {found:?}");
        if !done.get() {
            let header = crate::qcow2::Header::parse(&std::fs::read(&path).unwrap()).unwrap();
            assert!(header.refcount_table_clusters > 1);
            break;
        }
    }
}
