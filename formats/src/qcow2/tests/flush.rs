//! What is written when, and in which order.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;
use std::rc::Rc;

use super::{MIB, check, new_image, read, write};
use crate::qcow2::testing::qemu_check;
use crate::testing::{directory, image, open, run, segments};
use crate::{Attempt, Disk, Fault, Image, Ring, What};

/// Tells every attempt to write and to synchronise, in order.
fn watch(ring: &Ring) -> Rc<RefCell<Vec<Attempt>>> {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let log = Rc::clone(&seen);
    ring.inject(move |attempt| {
        if matches!(attempt.what, What::Write | What::Sync) {
            log.borrow_mut().push(*attempt);
        }
        None
    });
    seen
}

fn shape(seen: &RefCell<Vec<Attempt>>) -> String {
    let one = |attempt: &Attempt| match attempt.what {
        What::Sync => 'S',
        _ => 'w',
    };
    seen.borrow_mut().drain(..).map(|it| one(&it)).collect()
}

#[test]
fn a_first_write_is_one_transfer_and_a_flush_orders_its_tables() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let disk = open(&ring, "qcow2", &new_image(&path, 64 * MIB, &[])).unwrap();
    let seen = watch(&ring);
    write(&ring, &*disk, 0, &[1; 4096]);
    assert_eq!(shape(&seen), "w");
    run(&ring, disk.flush()).unwrap();
    // Refcounts, then the L2 table, then the L1 table.
    assert_eq!(shape(&seen), "wSwSwS");
    write(&ring, &*disk, 65536, &[2; 4096]);
    run(&ring, disk.flush()).unwrap();
    // The cluster was reserved together with the first: its refcount is there.
    assert_eq!(shape(&seen), "wSwS");
    run(&ring, disk.close()).unwrap();
    check(&path);
}

#[test]
fn a_write_in_place_is_one_transfer_and_its_flush_one_barrier() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let disk = open(&ring, "qcow2", &new_image(&path, 64 * MIB, &[])).unwrap();
    write(&ring, &*disk, 0, &[1; 262_144]);
    run(&ring, disk.flush()).unwrap();
    let seen = watch(&ring);
    // Four clusters that lie together.
    write(&ring, &*disk, 512, &[2; 261_120]);
    run(&ring, disk.flush()).unwrap();
    assert_eq!(shape(&seen), "wS");
    run(&ring, disk.close()).unwrap();
}

#[test]
fn flushes_at_once_share_one() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let disk = open(&ring, "qcow2", &new_image(&path, 64 * MIB, &[])).unwrap();
    let disk = Rc::new(disk);
    let seen = watch(&ring);
    run(&ring, async {
        for _ in 0..32 {
            let disk = Rc::clone(&disk);
            ring.spawn(async move { disk.flush().await.unwrap() });
        }
        while Rc::strong_count(&disk) > 1 {
            ring.yield_now().await;
        }
    });
    // One began with the first call, and one after all others had come.
    assert_eq!(shape(&seen), "SS");
}

/// Flushes new clusters while the write or sync with that number fails; the ring's faults are over
/// then. Returns the disk, what failed, and the result.
fn flush_that_fails(
    ring: &Ring,
    path: &Path,
    fail: u32,
) -> (Box<dyn Disk>, Option<What>, io::Result<()>) {
    let _ = std::fs::remove_file(path);
    let disk = open(ring, "qcow2", &new_image(path, 64 * MIB, &[])).unwrap();
    write(ring, &*disk, MIB, &[1; 4096]);
    let failed = Rc::new(Cell::new(None));
    let (found, mut count) = (Rc::clone(&failed), 0);
    ring.inject(move |attempt| {
        count += u32::from(matches!(attempt.what, What::Write | What::Sync));
        let fails = count == fail && found.get().is_none();
        fails.then(|| {
            found.set(Some(attempt.what));
            Fault::Errno(libc::EIO)
        })
    });
    let result = run(ring, disk.flush());
    ring.inject(|_| None);
    (disk, failed.get(), result)
}

#[test]
fn a_flush_whose_write_failed_is_made_up_for_by_the_next() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for fail in [1, 3, 5] {
        let (disk, what, result) = flush_that_fails(&ring, &path, fail);
        assert_eq!(what, Some(What::Write));
        result.unwrap_err();
        run(&ring, disk.flush()).unwrap();
        // As after the process was killed.
        drop(disk);
        let disk = open(&ring, "qcow2", &image(&path)).unwrap();
        assert_eq!(read(&ring, &*disk, MIB, 4096), [1; 4096]);
        run(&ring, disk.close()).unwrap();
    }
    let (_, what, result) = flush_that_fails(&ring, &path, 7);
    assert_eq!(what, None);
    result.unwrap();
}

#[test]
fn after_a_barrier_that_failed_nothing_is_said_to_be_durable_and_the_image_stays_valid() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for fail in [2, 4, 6] {
        let (disk, what, result) = flush_that_fails(&ring, &path, fail);
        assert_eq!(what, Some(What::Sync));
        result.unwrap_err();
        write(&ring, &*disk, 2 * MIB, &[2; 4096]);
        let error = run(&ring, disk.flush()).unwrap_err();
        assert!(error.to_string().contains("restart the VM"), "{error}");
        // The guest still reads what it wrote.
        assert_eq!(read(&ring, &*disk, MIB, 4096), [1; 4096]);
        assert_eq!(read(&ring, &*disk, 2 * MIB, 4096), [2; 4096]);
        run(&ring, disk.close()).unwrap_err();
        assert_eq!(qemu_check(&path).get("corruptions"), None);
        let disk = open(&ring, "qcow2", &image(&path)).unwrap();
        run(&ring, disk.flush()).unwrap();
        run(&ring, disk.close()).unwrap();
    }
}

#[test]
fn a_cluster_is_not_handed_out_again_while_a_read_of_it_is_in_flight() {
    let ring = Ring::new(crate::Engine::Threads).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let disk = open(&ring, "qcow2", &new_image(&path, 64 * MIB, &[])).unwrap();
    write(&ring, &*disk, 0, &[1; 65536]);
    run(&ring, disk.flush()).unwrap();
    let memory = segments(&[0; 65536]);
    let late = disk.read(0, memory.clone());
    run(&ring, disk.discard(0, 65536)).unwrap();
    run(&ring, disk.flush()).unwrap();
    for at in 1..64 {
        write(&ring, &*disk, at * 65536, &[2; 65536]);
    }
    run(&ring, late).unwrap();
    assert_eq!(crate::testing::bytes(&memory), [1; 65536]);
    run(&ring, disk.flush()).unwrap();
    // Now it is.
    write(&ring, &*disk, 0, &[3; 65536]);
    run(&ring, disk.close()).unwrap();
    check(&path);
}

#[test]
fn an_image_whose_refcounts_were_postponed_has_them_counted_when_it_is_opened() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let disk = open(&ring, "qcow2", &new_image(&path, 64 * MIB, &[])).unwrap();
    write(&ring, &*disk, MIB, &[1; 4096]);
    run(&ring, disk.close()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    // The dirty bit, and a refcount block that knows of nothing.
    bytes[79] |= 1;
    let block = u64::from_be_bytes(bytes[65536..][..8].try_into().unwrap()) as usize;
    bytes[block..block + 65536].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    let disk = open(&ring, "qcow2", &image(&path)).unwrap();
    assert_eq!(read(&ring, &*disk, MIB, 4096), [1; 4096]);
    write(&ring, &*disk, 2 * MIB, &[2; 4096]);
    run(&ring, disk.close()).unwrap();
    check(&path);
}

/// What a process that is killed now leaves, opened by another one.
fn killed(ring: &Ring, path: &Path, look: impl FnOnce(&dyn Disk)) {
    let copy = path.with_extension("killed.qcow2");
    std::fs::copy(path, &copy).unwrap();
    let disk = open(
        ring,
        "qcow2",
        &Image {
            ro: true,
            ..image(&copy)
        },
    )
    .unwrap();
    look(&*disk);
    run(ring, disk.close()).unwrap();
}

#[test]
fn what_an_image_has_no_tables_for_yet_is_volatile_until_it_is_flushed() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let disk = open(&ring, "qcow2", &new_image(&path, 64 * MIB, &[])).unwrap();
    assert!(!disk.volatile());
    write(&ring, &*disk, 0, &[1; 4096]);
    assert!(disk.volatile());
    killed(&ring, &path, |disk| {
        assert_eq!(read(&ring, disk, 0, 4096), [0; 4096])
    });
    run(&ring, disk.flush()).unwrap();
    assert!(!disk.volatile());
    // In place: the host has it.
    write(&ring, &*disk, 512, &[2; 512]);
    assert!(!disk.volatile());
    let content = [[1; 512], [2; 512]].concat();
    killed(&ring, &path, |disk| {
        assert_eq!(read(&ring, disk, 0, 1024), content)
    });
    run(&ring, disk.write_zeroes(0, 65536, true)).unwrap();
    assert!(disk.volatile());
    run(&ring, disk.close()).unwrap();
}

#[test]
fn what_a_flush_is_writing_or_could_not_write_is_volatile() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let disk = Rc::new(open(&ring, "qcow2", &new_image(&path, 64 * MIB, &[])).unwrap());
    write(&ring, &**disk, 0, &[1; 4096]);
    let states = Rc::new(RefCell::new(Vec::new()));
    let (watched, seen) = (Rc::clone(&disk), Rc::clone(&states));
    ring.inject(move |attempt| {
        if attempt.what == What::Sync {
            seen.borrow_mut().push(watched.volatile());
        }
        None
    });
    run(&ring, disk.flush()).unwrap();
    // After refcounts, after L2 tables, after the L1 table: only then is it told.
    assert_eq!(*states.borrow(), [true; 3]);
    assert!(!disk.volatile());
    write(&ring, &**disk, MIB, &[1; 4096]);
    ring.inject(|attempt| (attempt.what == What::Write).then_some(Fault::Errno(libc::EIO)));
    run(&ring, disk.flush()).unwrap_err();
    assert!(disk.volatile());
    ring.inject(|_| None);
    run(&ring, disk.flush()).unwrap();
    assert!(!disk.volatile());
}

#[test]
fn a_process_that_is_killed_loses_nothing_that_was_not_volatile() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let size = [("cluster_size", crate::OptionValue::Number(4096))];
    let disk = open(&ring, "qcow2", &new_image(&path, MIB, &size)).unwrap();
    let mut random = crate::testing::Random::new(4711);
    let mut model = vec![0; MIB as usize];
    let mut looks = 0;
    for number in 0..600 {
        let (offset, len) = (random.below(2000) * 512, (1 + random.below(24)) * 512);
        let range = offset as usize..(offset + len) as usize;
        match random.below(8) {
            0 => run(&ring, disk.flush()).unwrap(),
            1 => {
                run(&ring, disk.write_zeroes(offset, len, true)).unwrap();
                model[range].fill(0);
            }
            _ => {
                model[range].fill(number as u8);
                write(&ring, &*disk, offset, &vec![number as u8; len as usize]);
            }
        }
        if !disk.volatile() {
            looks += 1;
            killed(&ring, &path, |disk| {
                assert!(read(&ring, disk, 0, model.len()) == model, "after {number}");
            });
        }
    }
    assert!(looks > 100, "{looks}");
    run(&ring, disk.close()).unwrap();
    check(&path);
}
