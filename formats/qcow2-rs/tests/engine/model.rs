//! Random operations, many in flight, against a flat model.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use formats::Disk;

use crate::shared::{Lab, Random, bytes, segments};

pub(crate) const SECTOR: u64 = 512;

/// Does `count` random operations, up to 32 at a time, and compares what is read with `model`,
/// the bytes of the disk. Operations in flight together never touch the same sectors, but do
/// touch the same clusters.
pub(crate) fn operate(
    lab: &Lab,
    disk: &Rc<Box<dyn Disk>>,
    model: &mut Vec<u8>,
    seed: u64,
    count: u32,
) {
    let mut random = Random::new(seed);
    let in_flight: Rc<RefCell<Vec<(u64, u64)>>> = Rc::default();
    let wrong = Rc::new(Cell::new(None));
    let expected = Rc::new(RefCell::new(std::mem::take(model)));
    let ring = lab.ring.clone();
    let sectors = disk.size() / SECTOR;
    lab.run(async {
        for number in 0..count {
            let longest = [8, 64, 1024][random.below(3) as usize];
            let start = random.below(sectors);
            let end = sectors.min(start + 1 + random.below(longest));
            let overlaps = |(from, to): &(u64, u64)| start < *to && *from < end;
            while in_flight.borrow().len() >= 32 || in_flight.borrow().iter().any(overlaps) {
                ring.yield_now().await;
            }
            in_flight.borrow_mut().push((start, end));
            let kind = random.below(8);
            let value = random.below(255) as u8 + 1;
            let (disk, in_flight, wrong) = (disk.clone(), in_flight.clone(), wrong.clone());
            let expected = expected.clone();
            ring.spawn(async move {
                let (offset, len) = (start * SECTOR, (end - start) * SECTOR);
                let range = offset as usize..(offset + len) as usize;
                let done = match kind {
                    0..=3 => {
                        expected.borrow_mut()[range].fill(value);
                        disk.write(offset, segments(&vec![value; len as usize]))
                            .await
                    }
                    4 => {
                        expected.borrow_mut()[range].fill(0);
                        disk.write_zeroes(offset, len, true).await
                    }
                    5 => disk.flush().await,
                    _ => {
                        let to = segments(&vec![0xee; len as usize]);
                        let done = disk.read(offset, to.clone()).await;
                        if bytes(&to) != expected.borrow()[range] {
                            wrong.set(Some(number));
                        }
                        done
                    }
                };
                if done.is_err() {
                    wrong.set(Some(number));
                }
                in_flight.borrow_mut().retain(|it| *it != (start, end));
            });
        }
        while !in_flight.borrow().is_empty() {
            ring.yield_now().await;
        }
    });
    assert_eq!(
        wrong.get(),
        None,
        "seed {seed}: the operation of this number went wrong"
    );
    *model = expected.take();
}

/// Operates on an image, then has QEMU look at it.
pub(crate) fn differ(lab: &Lab, name: &str, disk: Box<dyn Disk>, model: &mut Vec<u8>, seed: u64) {
    let disk = Rc::new(disk);
    operate(lab, &disk, model, seed, 150);
    let disk = Rc::into_inner(disk).unwrap();
    let whole = lab.read(&*disk, 0, model.len());
    assert!(whole == *model, "seed {seed}");
    lab.run(disk.close()).unwrap();
    lab.check(name);
    lab.compare(name, model);
}

#[test]
fn random_operations_do_to_an_image_what_they_do_to_a_flat_model() {
    for seed in 0..10 {
        let bits = 12 + seed % 9;
        let refcount_bits = [1, 8, 16, 32, 64][seed as usize % 5];
        let compat = ["1.1", "0.10"][usize::from(refcount_bits == 16 && seed % 2 == 0)];
        let options = match compat {
            "1.1" => format!("cluster_size={},refcount_bits={refcount_bits}", 1 << bits),
            _ => format!("cluster_size={},compat=0.10", 1 << bits),
        };
        if bits == 20 && refcount_bits == 1 {
            continue;
        }
        let lab = Lab::new();
        let size: usize = (9 << 20) + 512 * seed as usize;
        lab.create("a.qcow2", &options, &size.to_string());
        let mut model = vec![0; size];
        for session in 0..2 {
            let disk = lab.open("a.qcow2");
            differ(&lab, "a.qcow2", disk, &mut model, seed * 2 + session);
        }
    }
}
