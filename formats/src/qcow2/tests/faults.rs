//! Each operation of the host fails once: what succeeded is there, and the image stays valid.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;

use super::*;
use crate::qcow2::testing::{qemu_check, qemu_create, qemu_io};
use crate::{Fault, What};

const UNIT: usize = 512;

/// What the guest did, sector by sector: the value, or more than one after an error.
struct Guest<'a> {
    ring: &'a Ring,
    disk: Box<dyn Disk>,
    sectors: BTreeMap<u64, Vec<u8>>,
    errors: u64,
}

impl Guest<'_> {
    fn set(&mut self, offset: u64, len: u64, value: u8, result: io::Result<()>) {
        self.errors += u64::from(result.is_err());
        for sector in offset / UNIT as u64..(offset + len) / UNIT as u64 {
            let values = self.sectors.entry(sector).or_insert_with(|| vec![0]);
            if result.is_ok() {
                values.clear();
            }
            values.push(value);
        }
    }

    fn write(&mut self, offset: u64, len: usize, value: u8) {
        let result = run(
            self.ring,
            self.disk.write(offset, segments(&vec![value; len])),
        );
        self.set(offset, len as u64, value, result);
    }

    fn discard(&mut self, offset: u64, len: u64) {
        let result = run(self.ring, self.disk.discard(offset, len));
        // The start and the end may stay, and with a backing file all of it.
        let failed = result.is_err();
        self.set(offset, len, 0, Err(io::ErrorKind::Other.into()));
        self.errors -= u64::from(!failed);
    }

    fn zero(&mut self, offset: u64, len: u64, unmap: bool) {
        let result = run(self.ring, self.disk.write_zeroes(offset, len, unmap));
        self.set(offset, len, 0, result);
    }

    fn flush(&mut self) {
        self.errors += u64::from(run(self.ring, self.disk.flush()).is_err());
    }

    fn verify(&self, disk: &dyn Disk) {
        for (sector, values) in &self.sectors {
            let found = read(self.ring, disk, sector * UNIT as u64, UNIT);
            assert!(
                values.iter().any(|value| found == [*value; UNIT]),
                "sector {sector}: {} is not of {values:?}",
                found[0]
            );
        }
    }
}

fn scenario(guest: &mut Guest<'_>, size: u64) {
    guest.write(0, 4096, 1);
    guest.write(size / 2 + 1024, 20 << 10, 2);
    guest.flush();
    guest.write(size / 2 + 4096, 512, 3);
    guest.write(size / 4, 70 << 10, 4);
    guest.zero(size / 4 + 512, 30 << 10, false);
    guest.write(size / 4 + 2048, 1024, 5);
    guest.discard(size / 2, 16 << 10);
    guest.flush();
    guest.write(size / 2, 12 << 10, 6);
    guest.zero(0, 8192, true);
    guest.flush();
    guest.flush();
    guest.write(64 << 10, 64 << 10, 7);
    guest.write(3 * size / 4, 40 << 10, 8);
}

fn each_operation_fails(options: &str, snapshot: bool, cache: u64, faults: &[Fault]) {
    const SIZE: u64 = 4 * MIB;
    let directory = directory();
    let original = directory.path().join("original.qcow2");
    qemu_create(options, &original, "4M");
    qemu_io(&["write -P 9 64k 64k", "write -P 9 2M 100k"], &original);
    if snapshot {
        qemu_img("snapshot -c a", &original);
    }
    let path = directory.path().join("a.qcow2");
    for fault in faults {
        for repeated in [1, 3] {
            let mut nth = 1;
            loop {
                std::fs::copy(&original, &path).unwrap();
                let ring = Ring::new(crate::Engine::Threads).unwrap();
                let options = vec![("cache_size", OptionValue::Number(cache))];
                let disk = open(
                    &ring,
                    "qcow2",
                    &Image {
                        options,
                        ..image(&path)
                    },
                )
                .unwrap();
                let mut sectors = BTreeMap::new();
                for (start, len) in [(64 << 10, 64 << 10), (2 * MIB, 100 << 10)] {
                    let of = start / UNIT as u64..(start + len) / UNIT as u64;
                    sectors.extend(of.map(|sector| (sector, vec![9])));
                }
                let mut guest = Guest {
                    ring: &ring,
                    disk,
                    sectors,
                    errors: 0,
                };
                let count = Rc::new(Cell::new(0));
                let on = Rc::new(Cell::new(true));
                let (counted, active, fault) = (Rc::clone(&count), Rc::clone(&on), *fault);
                ring.inject(move |attempt| {
                    if !active.get() {
                        return None;
                    }
                    counted.set(counted.get() + 1);
                    let now = (nth..nth + repeated).contains(&counted.get());
                    let short = matches!(fault, Fault::Short(_));
                    let takes = !short || matches!(attempt.what, What::Read | What::Write);
                    (now && takes).then_some(fault)
                });
                eprintln!(
                    "{options:?} {fault:?} x{repeated} at {nth}",
                    options = &original
                );
                scenario(&mut guest, SIZE);
                on.set(false);
                guest.verify(&*guest.disk);
                on.set(true);
                let Guest {
                    disk,
                    sectors,
                    errors,
                    ..
                } = guest;
                let closed = run(&ring, disk.close());
                on.set(false);
                let reached = count.get() >= nth;
                let found = qemu_check(&path);
                assert_eq!(found.get("check-errors"), Some(&0), "{found:?}");
                assert_eq!(found.get("corruptions"), None, "{found:?}");
                if closed.is_ok() && errors == 0 {
                    assert_eq!(found.get("leaks"), None, "{found:?}");
                } else if let Some(leaks) = found.get("leaks") {
                    eprintln!("leaks {leaks} errors {errors} closed {closed:?}");
                }
                if closed.is_ok() {
                    let disk = open(&ring, "qcow2", &image(&path)).unwrap();
                    let guest = Guest {
                        ring: &ring,
                        disk,
                        sectors,
                        errors,
                    };
                    guest.verify(&*guest.disk);
                    run(&ring, guest.disk.close()).unwrap();
                    let found = qemu_check(&path);
                    assert_eq!(found.get("corruptions"), None, "{found:?}");
                }
                if !reached {
                    break;
                }
                nth += 1;
            }
        }
    }
}

#[test]
fn an_error_of_the_host_damages_nothing() {
    each_operation_fails(
        "",
        false,
        0,
        &[Fault::Errno(libc::EIO), Fault::Errno(libc::ENOSPC)],
    );
}

#[test]
fn an_error_of_the_host_damages_nothing_with_little_memory_and_small_clusters() {
    let options = "cluster_size=512,refcount_bits=64";
    each_operation_fails(options, false, 1024, &[Fault::Errno(libc::EIO)]);
}

#[test]
fn an_error_of_the_host_damages_nothing_with_snapshots_and_subclusters() {
    each_operation_fails("extended_l2=on", true, 0, &[Fault::Errno(libc::EIO)]);
}

#[test]
fn a_short_transfer_is_continued() {
    each_operation_fails("", true, 0, &[Fault::Short(512)]);
}
