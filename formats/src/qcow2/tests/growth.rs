//! Growing an image that is fully allocated.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::{Fault, What};

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// A new disk of 8 MiB, allocated in full, whose last sector is written.
fn full(ring: &Ring, path: &Path) -> Box<dyn Disk> {
    let full = Image {
        sparse: false,
        ..new_image(path, 8 * MIB, &[])
    };
    let disk = open(ring, "qcow2", &full).unwrap();
    write(ring, &*disk, 8 * MIB - 512, &[7; 512]);
    run(ring, disk.flush()).unwrap();
    disk
}

#[test]
fn a_growth_that_the_host_refuses_half_way_changes_nothing_the_guest_or_the_host_sees() {
    for allowed in 0..4 {
        let ring = Ring::new(Default::default()).unwrap();
        let directory = directory();
        let path = directory.path().join("a.qcow2");
        let disk = full(&ring, &path);
        let before = allocated(&path);

        let seen = Cell::new(0);
        ring.inject(move |attempt| {
            // What is large: not the punch that frees it again.
            let grows = attempt.what == What::Fallocate && attempt.offset >= 8 * MIB;
            seen.set(seen.get() + u32::from(grows));
            (grows && seen.get() == allowed + 1).then_some(Fault::Errno(libc::ENOSPC))
        });
        // More than one L2 table describes.
        let grown = run(&ring, disk.resize(1500 * MIB));
        ring.inject(|_| None);
        if allowed == 0 {
            assert_eq!(
                grown.as_ref().unwrap_err().raw_os_error(),
                Some(libc::ENOSPC)
            );
        }
        if grown.is_err() {
            assert_eq!(disk.size(), 8 * MIB);
            run(&ring, disk.flush()).unwrap();
            let left = allocated(&path) - before;
            assert!(left <= MIB, "{left} bytes are left of it");
            assert_eq!(read(&ring, &*disk, 8 * MIB - 512, 512), [7; 512]);
            run(&ring, disk.resize(16 * MIB)).unwrap();
        }
        assert_eq!(read(&ring, &*disk, 8 * MIB, 512), [0; 512]);
        run(&ring, disk.close()).unwrap();
        check(&path);
    }
}

#[test]
fn a_growth_that_is_not_wanted_any_more_ends_early_and_changes_nothing() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let disk = full(&ring, &path);
    let before = allocated(&path);
    let unwanted = Arc::new(AtomicBool::new(false));
    ring.cancel_by(unwanted.clone());
    let reports = Rc::new(Cell::new(0));
    let seen = reports.clone();
    ring.on_progress(move |_| {
        seen.set(seen.get() + 1);
        unwanted.store(seen.get() == 3, Ordering::Relaxed);
    });
    let grown = run(&ring, disk.resize(1500 * MIB));
    assert_eq!(grown.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    assert_eq!(reports.get(), 3);
    assert_eq!(disk.size(), 8 * MIB);
    assert_eq!(read(&ring, &*disk, 8 * MIB - 512, 512), [7; 512]);
    run(&ring, disk.close()).unwrap();
    assert!(allocated(&path) <= before + MIB);
    check(&path);
}

#[test]
fn a_growth_past_what_the_host_has_is_refused_before_anything_is_allocated() {
    let ring = Ring::new(Default::default()).unwrap();
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let full = Image {
        sparse: false,
        ..new_image(&path, MIB, &[])
    };
    let disk = open(&ring, "qcow2", &full).unwrap();
    run(&ring, disk.flush()).unwrap();
    let (before, bytes) = (allocated(&path), fs::read(&path).unwrap());
    let host = rustix::fs::statvfs(&path).unwrap();
    let free = host.f_bfree * host.f_frsize;
    let error = run(
        &ring,
        disk.resize((free + (64 << 30)).next_multiple_of(MIB)),
    )
    .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(disk.size(), MIB);
    run(&ring, disk.flush()).unwrap();
    assert!(allocated(&path) <= before + MIB);
    // Not even the L1 table has moved.
    assert!(fs::read(&path).unwrap() == bytes);
    run(&ring, disk.close()).unwrap();
    check(&path);
}
