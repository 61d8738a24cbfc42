//! A host that fails, or stops.

use std::cell::{Cell, RefCell};
use std::process::Command;
use std::rc::Rc;

use formats::{Attempt, Disk, Fault, Image, What};

use crate::shared::{Lab, Random, bytes, image, segments};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const CLUSTER: u64 = 64 << 10;

impl Lab {
    /// From now on the host does as `faults` says.
    fn inject(&self, faults: impl FnMut(&Attempt) -> Option<Fault> + 'static) {
        self.ring.inject(faults);
    }

    fn heal(&self) {
        self.inject(|_| None);
    }

    fn errno<T>(&self, result: std::io::Result<T>) -> Option<i32> {
        result.err().and_then(|error| error.raw_os_error())
    }
}

#[test]
fn a_transfer_that_the_kernel_cuts_short_is_continued() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    let mut attempts = 0;
    lab.inject(move |_| {
        attempts += 1;
        (attempts % 3 != 0).then_some(Fault::Short(1536))
    });
    let disk = lab.open("a.qcow2");
    let data: Vec<u8> = (0..300 << 10).map(|i: u32| (i / 512) as u8 | 1).collect();
    lab.write(&*disk, 512, &data);
    assert!(lab.read(&*disk, 512, data.len()) == data);
    lab.run(disk.close()).unwrap();
    lab.heal();
    lab.check("a.qcow2");
    let disk = lab.open("a.qcow2");
    assert!(lab.read(&*disk, 512, data.len()) == data);
}

#[test]
fn an_error_of_the_guest_s_data_is_that_request_s_alone() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    let disk = lab.open("a.qcow2");
    lab.write(&*disk, 0, &[7; 2 << 16]);
    for (what, errno) in [(What::Read, EIO), (What::Write, ENOSPC)] {
        let bad = move |it: &Attempt| it.what == what && it.len == 1536;
        lab.inject(move |it| bad(it).then_some(Fault::Errno(errno)));
        let memory = segments(&[8; 1536]);
        let result = match what {
            What::Read => lab.run(disk.read(CLUSTER, memory)),
            _ => lab.run(disk.write(CLUSTER, memory)),
        };
        assert_eq!(lab.errno(result), Some(errno));
        lab.heal();
        assert_eq!(lab.read(&*disk, CLUSTER, 512), [7; 512]);
        lab.write(&*disk, 3 * CLUSTER, &[9; 512]);
        lab.run(disk.flush()).unwrap();
    }
    lab.run(disk.close()).unwrap();
    lab.check("a.qcow2");
}

#[test]
fn after_a_table_was_not_written_nothing_is_but_the_disk_can_be_read() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    let disk = lab.open("a.qcow2");
    lab.write(&*disk, 0, &[7; 512]);
    lab.run(disk.flush()).unwrap();
    lab.write(&*disk, CLUSTER, &[8; 512]);
    lab.inject(|it| (it.what == What::Write).then_some(Fault::Errno(ENOSPC)));
    let flushed = lab.run(disk.flush());
    assert_eq!(lab.errno(flushed), Some(ENOSPC));
    lab.heal();
    assert_eq!(lab.read(&*disk, CLUSTER, 512), [8; 512]);
    let written = lab.run(disk.write(0, segments(&[9; 512])));
    assert_eq!(lab.errno(written), Some(EIO));
    let flushed = lab.run(disk.flush());
    assert_eq!(lab.errno(flushed), Some(EIO));
    let closed = lab.run(disk.close());
    assert_eq!(lab.errno(closed), Some(EIO));
    // It is closed all the same, and unlocked; what was flushed is there.
    let disk = lab.open("a.qcow2");
    assert_eq!(lab.read(&*disk, 0, 512), [7; 512]);
}

#[test]
fn after_a_table_was_not_read_nothing_is() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    lab.tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 7 0 1M", "a.qcow2"],
    );
    let disk = lab.open("a.qcow2");
    lab.inject(|it| (it.what == What::Read).then_some(Fault::Errno(EIO)));
    for _ in 0..2 {
        let memory = segments(&[0; 512]);
        let result = lab.run(disk.read(0, memory.clone()));
        assert_eq!(lab.errno(result), Some(EIO));
        lab.heal();
    }
    let written = lab.run(disk.write(0, segments(&[9; 512])));
    assert_eq!(lab.errno(written), Some(EIO));
    drop(disk);
    lab.check("a.qcow2");
    let disk = lab.open("a.qcow2");
    assert_eq!(lab.read(&*disk, 0, 512), [7; 512]);
}

#[test]
fn a_backing_file_that_cannot_be_read_is_an_error_and_never_other_bytes() {
    for cluster in ["64k", "4k"] {
        let lab = Lab::new();
        lab.create("a.qcow2", &format!("cluster_size={cluster}"), "1M");
        lab.tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 7 0 1M", "a.qcow2"],
        );
        let path = lab.create("b.qcow2", "backing_file=a.qcow2,backing_fmt=qcow2", "1M");
        let over = Image {
            backing: vec![lab.path("a.qcow2")],
            ..image(&path)
        };
        let disk = lab.try_open(&over).unwrap();
        assert_eq!(lab.read(&*disk, 0, 512), [7; 512]);
        // The tables are there by now; what fails is the data, once whole and once a part of it.
        let reads = Cell::new(0);
        lab.inject(move |it| {
            reads.set(reads.get() + u32::from(it.what == What::Read));
            (it.what == What::Read && reads.get() > 1).then_some(Fault::Errno(EIO))
        });
        let memory = segments(&[0xee; 1 << 17]);
        assert!(lab.run(disk.read(CLUSTER, memory)).is_err());
        // A cluster that would have to be copied from there.
        assert!(
            lab.run(disk.write(CLUSTER + 512, segments(&[9; 512])))
                .is_err()
        );
        lab.heal();
        drop(disk);
        lab.check("b.qcow2");
        let disk = lab.try_open(&over).unwrap();
        assert!(lab.read(&*disk, 0, 1 << 20) == [7; 1 << 20]);
    }
}

/// The order on the host of what the image's consistency hangs on, as far as it is ours: the crate
/// has no barrier between these.
#[test]
fn a_refcount_table_is_durable_before_l2_tables_that_need_it() {
    let lab = Lab::new();
    // A refcount block counts 2 MiB.
    lab.create("a.qcow2", "cluster_size=4k,refcount_bits=64", "16M");
    let disk = lab.open("a.qcow2");
    let seen = Rc::new(RefCell::new(Vec::new()));
    let record = seen.clone();
    lab.inject(move |it| {
        record.borrow_mut().push(*it);
        None
    });
    lab.write(&*disk, 0, &vec![7; 8 << 20]);
    lab.run(disk.close()).unwrap();
    let seen = seen.borrow();
    let table = |it: &Attempt| it.what == What::Write && (4096..8192).contains(&it.offset);
    let writes: Vec<usize> = (0..seen.len()).filter(|at| table(&seen[*at])).collect();
    assert!(!writes.is_empty());
    for at in writes {
        assert_eq!(seen[at + 1].what, What::Sync);
    }
    lab.check("a.qcow2");
}

/// Wherever in a workload the host stops writing, the image has no corruption, and what was
/// flushed is in it.
fn stops_anywhere(options: &str, backing: bool) {
    let size: u64 = 4 << 20;
    for stop in (0u32..).step_by(7) {
        let lab = Lab::new();
        let mut model = vec![0; size as usize];
        let mut over = image(&lab.path("b.qcow2"));
        let mut with = options.to_owned();
        if backing {
            lab.create("a.qcow2", "", "4M");
            lab.tool(
                "qemu-io",
                &["-f", "qcow2", "-c", "write -P 7 0 4M", "a.qcow2"],
            );
            model.fill(7);
            over.backing.push(lab.path("a.qcow2"));
            with += ",backing_file=a.qcow2,backing_fmt=qcow2";
        }
        lab.create("b.qcow2", &with, "4M");
        let disk = lab.try_open(&over).unwrap();
        let left = Rc::new(Cell::new(stop));
        let hit = Rc::new(Cell::new(false));
        let (counter, noticed) = (left.clone(), hit.clone());
        lab.inject(move |it| {
            if it.what == What::Read {
                return None;
            }
            match counter.get().checked_sub(1) {
                Some(less) => counter.set(less),
                None => noticed.set(true),
            }
            noticed.get().then_some(Fault::Errno(EIO))
        });
        let mut random = Random::new(5);
        // What a sector may hold: as of the last flush, and what was written to it since.
        let mut since: Vec<(usize, u8)> = Vec::new();
        for round in 0..12u8 {
            for _ in 0..4 {
                let sector = random.below(size / 512) as usize;
                let value = round | 0x40;
                since.push((sector, value));
                let from = segments(&[value; 512]);
                let _ = lab.run(disk.write(sector as u64 * 512, from));
            }
            if lab.run(disk.flush()).is_ok() {
                for (sector, value) in since.drain(..) {
                    model[sector * 512..][..512].fill(value);
                }
            }
        }
        let _ = lab.run(disk.close());
        lab.heal();
        let output = Command::new("qemu-img")
            .args(["check", "-f", "qcow2"])
            .arg(&over.path)
            .output()
            .unwrap();
        // 3: leaks alone.
        let code = output.status.code().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(code == 0 || code == 3, "stopped after {stop}: {said}");
        let ro = Image {
            ro: true,
            ..over.clone()
        };
        let disk = lab.try_open(&ro).unwrap();
        let found = lab.read(&*disk, 0, size as usize);
        for (sector, (found, flushed)) in found.chunks(512).zip(model.chunks(512)).enumerate() {
            let written = since
                .iter()
                .any(|(at, value)| *at == sector && found[0] == *value);
            assert!(
                found == flushed || written,
                "stopped after {stop}: sector {sector}"
            );
        }
        if !hit.get() {
            assert!(stop > 40, "{stop}");
            return;
        }
    }
}

#[test]
fn a_host_that_stops_writing_leaves_a_good_image() {
    stops_anywhere("cluster_size=64k", false);
    stops_anywhere("cluster_size=4k,refcount_bits=64", false);
}

#[test]
fn a_host_that_stops_writing_leaves_a_good_image_over_a_backing_file() {
    stops_anywhere("cluster_size=64k", true);
}

#[test]
fn requests_that_are_given_up_cost_no_one_the_image() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "4M");
    lab.tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 7 0 4M", "a.qcow2"],
    );
    let disk: Rc<Box<dyn Disk>> = Rc::new(lab.open("a.qcow2"));
    let reading = disk.clone();
    let memory = segments(&[0; 1 << 20]);
    let to = memory.clone();
    lab.run(async {
        lab.ring.spawn(async move {
            let _ = reading.read(0, to).await;
        });
        lab.ring.yield_now().await;
    });
    drop(memory);
    let disk = Rc::into_inner(disk).unwrap();
    let memory = segments(&[0; 512]);
    // Maybe it was amid a table; then it says so rather than to return something else.
    if lab.run(disk.read(0, memory.clone())).is_ok() {
        assert_eq!(bytes(&memory), [7; 512]);
    }
    drop(disk);
    lab.check("a.qcow2");
}
