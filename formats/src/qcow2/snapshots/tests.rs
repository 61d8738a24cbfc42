use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use super::super::check::{self, check};
use super::super::testing::damage::{KINDS, damages, mutate, used};
use super::super::testing::{assert_sound, qemu_create, qemu_img, qemu_io};
use super::write::{LEFT, STEPS, Step};
use super::*;
use crate::testing::{Random, bytes, directory, image, in_tmpfs, open, run, segments};
use crate::{Engine, Ring};

type Action = fn(&File) -> Result<Snapshot, CheckError>;

/// What is done to images that have a snapshot `one`.
const ACTIONS: [(&str, Action); 3] = [
    ("create", |file| create_in(file, "two", &mut |_, _| {})),
    ("apply", |file| {
        apply_in(file, Which::Name("one"), &mut |_, _| {})
    }),
    ("delete", |file| {
        delete_in(file, Which::Name("one"), &mut |_, _| {})
    }),
];

fn writable(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn create_here(path: &Path, name: &str) -> Result<Snapshot, CheckError> {
    create_in(&writable(path), name, &mut |_, _| {})
}

fn apply_here(path: &Path, name: &str) -> Result<Snapshot, CheckError> {
    apply_in(&writable(path), Which::Name(name), &mut |_, _| {})
}

fn delete_here(path: &Path, name: &str) -> Result<Snapshot, CheckError> {
    delete_in(&writable(path), Which::Name(name), &mut |_, _| {})
}

#[track_caller]
fn refusal(result: Result<Snapshot, CheckError>) -> String {
    match result {
        Err(CheckError::Refused(refusal)) => refusal.message,
        other => panic!("{other:?}"),
    }
}

fn names(path: &Path) -> Vec<String> {
    let snapshots = list(path).unwrap();
    snapshots.into_iter().map(|it| it.name).collect()
}

#[track_caller]
fn assert_clean(path: &Path) {
    let report = check(&File::open(path).unwrap(), &mut |_, _| {}).unwrap();
    assert!(report.is_clean(), "{report}");
}

/// All that the disk holds.
fn content(path: &Path) -> Vec<u8> {
    let ring = Ring::new(Engine::Threads).unwrap();
    let image = crate::Image {
        ro: true,
        lock: false,
        ..image(path)
    };
    run(&ring, async {
        let disk = open(&ring, "qcow2", &image).unwrap();
        let memory = segments(&vec![0; disk.size() as usize]);
        disk.read(0, memory.clone()).await.unwrap();
        bytes(&memory)
    })
}

/// An image of every kind of entry with a snapshot `one`, without leaks or bitmaps.
fn base(options: &str, path: &Path) -> Vec<u8> {
    used(options, path);
    if !options.contains("compat=v2") {
        qemu_img("bitmap --remove IMAGE b", path);
    }
    assert_clean(path);
    fs::read(path).unwrap()
}

/// The file after a power cut: what was written since the last sync is there in part.
fn cut(base: &[u8], steps: &[Step], kept: &mut dyn FnMut() -> bool) -> Vec<u8> {
    let durable = steps.iter().rposition(|step| matches!(step, Step::Sync));
    let durable = durable.map_or(0, |at| at + 1);
    let mut file = base.to_vec();
    for (number, step) in steps.iter().enumerate() {
        let mut sector = || number < durable || kept();
        match step {
            Step::Sync => {}
            Step::Truncate(len) if sector() => file.resize(*len as usize, 0),
            Step::Truncate(_) => {}
            Step::Punch(offset, len) => {
                let end = ((offset + len) as usize).min(file.len());
                if sector() && (*offset as usize) < end {
                    file[*offset as usize..end].fill(0);
                }
            }
            Step::Write(offset, bytes) => {
                let mut at = *offset as usize;
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (part, next) = rest.split_at(rest.len().min(512 - at % 512));
                    if sector() {
                        file.resize(file.len().max(at + part.len()), 0);
                        file[at..at + part.len()].copy_from_slice(part);
                    }
                    at += part.len();
                    rest = next;
                }
            }
        }
    }
    file
}

#[test]
fn after_a_power_cut_at_any_instant_the_image_is_clean_and_as_before_or_as_after() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let mut random = Random::new(1);
    for options in KINDS {
        let base = base(options, &path);
        let before = (names(&path), content(&path));
        for (what, action) in ACTIONS {
            fs::write(&path, &base).unwrap();
            STEPS.take();
            action(&writable(&path)).unwrap();
            let steps = STEPS.take();
            let after = (names(&path), content(&path));
            assert_clean(&path);
            assert_sound(&path);
            let syncs = steps.iter().enumerate();
            let mut syncs = syncs.filter(|(_, step)| matches!(step, Step::Sync));
            let (tables, header) = (syncs.next().unwrap().0, syncs.next().unwrap().0);
            for end in 0..=steps.len() {
                for percent in [0, 50, 100] {
                    let state = cut(&base, &steps[..end], &mut || random.chance(percent));
                    fs::write(&path, &state).unwrap();
                    assert_clean(&path);
                    let now = (names(&path), content(&path));
                    let right = match end {
                        _ if end <= tables => now == before,
                        _ if end > header => now == after,
                        _ => now == before || now == after,
                    };
                    assert!(right, "{options}: {what}: {end} of {} steps", steps.len());
                }
            }
        }
    }
}

#[test]
fn a_header_that_is_switched_before_the_tables_are_durable_would_be_caught() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let base = base(KINDS[0], &path);
    STEPS.take();
    create_here(&path, "two").unwrap();
    let mut steps = STEPS.take();
    steps.retain(|step| !matches!(step, Step::Sync));
    let mut random = Random::new(2);
    let caught = (0..50).any(|_| {
        fs::write(&path, cut(&base, &steps, &mut || random.chance(50))).unwrap();
        let report = check(&File::open(&path).unwrap(), &mut |_, _| {});
        !report.is_ok_and(|report| report.is_clean())
    });
    assert!(caught);
}

#[test]
fn when_the_host_fails_at_any_write_the_image_is_as_before_or_as_after() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for options in KINDS {
        let base = base(options, &path);
        let before = names(&path);
        for (what, action) in ACTIONS {
            for left in 0.. {
                fs::write(&path, &base).unwrap();
                LEFT.set(left);
                let result = action(&writable(&path));
                LEFT.set(u64::MAX);
                assert_clean(&path);
                let done = result.is_ok();
                if done {
                    assert_sound(&path);
                    break;
                }
                assert!(left < 1000, "{options}: {what}");
                let now = names(&path);
                let switched = fs::read(&path).unwrap()[..96] != base[..96];
                assert!(switched || now == before, "{options}: {what}: {left}");
            }
        }
    }
}

#[test]
fn when_the_host_fails_at_any_read_nothing_is_changed() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let base = base(KINDS[0], &path);
    for (what, action) in ACTIONS {
        for left in 0.. {
            fs::write(&path, &base).unwrap();
            check::io::LEFT.set(left);
            let result = action(&writable(&path));
            check::io::LEFT.set(u64::MAX);
            assert_clean(&path);
            if result.is_ok() {
                break;
            }
            assert!(left < 10_000, "{what}");
            let now = fs::read(&path).unwrap();
            assert_eq!(now[..96], base[..96], "{what}: {left}");
        }
    }
}

#[test]
fn a_damaged_image_is_refused_and_not_changed() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for options in KINDS {
        let image = used(options, &path);
        let mut bad: Vec<Vec<u8>> = damages(&image)
            .into_iter()
            .map(|(_, at, value)| {
                let mut bad = image.clone();
                bad[at..at + 8].copy_from_slice(&value.to_be_bytes());
                bad
            })
            .collect();
        let mut random = Random::new(3);
        bad.extend((0..30).map(|_| mutate(&image, &mut random)));
        for (number, bad) in bad.into_iter().enumerate() {
            let (what, action) = ACTIONS[number % 3];
            fs::write(&path, &bad).unwrap();
            match action(&writable(&path)) {
                Ok(_) => {
                    let after = check(&File::open(&path).unwrap(), &mut |_, _| {});
                    assert!(after.unwrap().is_sound());
                    fs::write(&path, &bad).unwrap();
                    let before = check(&File::open(&path).unwrap(), &mut |_, _| {});
                    assert!(before.unwrap().is_sound(), "{options}: {what}");
                }
                Err(error) => assert!(fs::read(&path).unwrap() == bad, "{what}: {error}"),
            }
        }
    }
}

#[test]
fn no_bytes_of_a_snapshot_table_make_it_panic() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let good = base(KINDS[0], &path);
    let header = Header::parse(&good[..MAX_HEADER]).unwrap();
    let table = header.snapshots_offset as usize;
    for at in (0..72).step_by(2) {
        for value in [0x00, 0x01, 0x7f, 0xff] {
            let mut bad = good.clone();
            bad[table + at..table + at + 4].fill(value);
            for (_, action) in ACTIONS {
                fs::write(&path, &bad).unwrap();
                let _ = list(&path);
                if action(&writable(&path)).is_err() {
                    assert!(fs::read(&path).unwrap() == bad);
                }
            }
        }
    }
}

#[test]
fn names_are_unique_and_ids_are_the_next_number() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("", &path, "1M");
    for name in ["a", "b", "c"] {
        create_here(&path, name).unwrap();
    }
    assert!(refusal(create_here(&path, "b")).contains("a snapshot of that name already"));
    delete_here(&path, "b").unwrap();
    create_here(&path, "b").unwrap();
    let ids: Vec<_> = list(&path).unwrap().into_iter().map(|it| it.id).collect();
    assert_eq!(ids, ["1", "3", "4"]);
    assert_sound(&path);
    let long = "x".repeat(256);
    for (name, message) in [
        ("", "is empty"),
        (&*long, "has 256 bytes"),
        ("a\nb", "control"),
    ] {
        assert!(refusal(create_here(&path, name)).contains(message));
    }
    assert!(refusal(apply_here(&path, "x")).contains("no such snapshot"));
    for name in ["a", "b", "c"] {
        delete_here(&path, name).unwrap();
    }
    assert_eq!(refusal(delete_here(&path, "a")), "it has no snapshots");
    assert_sound(&path);
}

#[test]
fn what_may_mean_two_snapshots_is_refused_and_an_id_means_one() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("", &path, "1M");
    for name in ["2", "b"] {
        create_here(&path, name).unwrap();
    }
    assert!(refusal(delete_here(&path, "2")).ends_with("of the ids 1, 2"));
    delete_in(&writable(&path), Which::Id("2"), &mut |_, _| {}).unwrap();
    assert_eq!(names(&path), ["2"]);
    // Without a name like it, a number is an id.
    delete_here(&path, "1").unwrap();
    assert_eq!(names(&path), [""; 0]);
}

#[test]
fn ids_that_are_no_numbers_count_as_far_as_they_are() {
    let with = |ids: &[&str]| -> Vec<Snapshot> {
        let snapshot = |id: &&str| Snapshot {
            l1_table_offset: 0,
            l1_size: 0,
            id: (*id).to_owned(),
            name: "n".into(),
            date: Duration::ZERO,
            vm_clock: Duration::ZERO,
            vm_state_size: 0,
            disk_size: None,
            icount: None,
        };
        ids.iter().map(snapshot).collect()
    };
    assert_eq!(next_id(&with(&[])).unwrap(), "1");
    assert_eq!(next_id(&with(&["x", "7y", "3"])).unwrap(), "8");
    assert!(next_id(&with(&["18446744073709551615"])).is_err());
    assert!(next_id(&with(&["99999999999999999999999"])).is_err());
}

#[test]
fn refcounts_that_are_too_narrow_are_refused_before_anything_is_changed() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for (bits, most) in [(1, 0), (2, 2)] {
        qemu_create(&format!("refcount_bits={bits}"), &path, "1M");
        qemu_io(&["write -P 1 0 128k"], &path);
        for number in 0..most {
            create_here(&path, &number.to_string()).unwrap();
        }
        let before = fs::read(&path).unwrap();
        let message = refusal(create_here(&path, "more"));
        let limit = format!("its refcounts of {bits} bits count");
        assert!(message.starts_with(&limit), "{message}");
        assert!(fs::read(&path).unwrap() == before);
        assert_sound(&path);
    }
    // Nothing is shared of an image that has nothing.
    qemu_create("refcount_bits=1", &path, "1M");
    create_here(&path, "empty").unwrap();
    qemu_io(&["write -P 1 0 128k"], &path);
    apply_here(&path, "empty").unwrap();
    qemu_io(&["read -P 0 0 1M"], &path);
    assert_sound(&path);
}

#[test]
fn an_external_data_file_and_marked_damage_are_refused() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    let data = directory.path().join("a.raw");
    qemu_create(&format!("data_file={}", data.display()), &path, "1M");
    assert!(refusal(create_here(&path, "a")).contains("external data file"));
    fs::remove_file(&path).unwrap();
    qemu_create("", &path, "1M");
    writable(&path).write_all_at(&[2], 79).unwrap();
    assert!(refusal(create_here(&path, "a")).contains("marked as damaged"));
    assert_eq!(names(&path), [""; 0]);
}

#[test]
fn postponed_refcounts_are_counted_first() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("lazy_refcounts=on", &path, "1M");
    qemu_io(&["write -P 1 0 300k"], &path);
    let image = fs::read(&path).unwrap();
    let header = Header::parse(&image[..MAX_HEADER]).unwrap();
    let table = header.refcount_table_offset as usize;
    let block = super::super::header::be64(&image, table);
    let file = writable(&path);
    file.write_all_at(&[1], 79).unwrap();
    // Those of the data are not written yet.
    file.write_all_at(&[0; 4], block + 10).unwrap();
    create_here(&path, "a").unwrap();
    qemu_io(&["write -P 2 0 300k"], &path);
    apply_here(&path, "a").unwrap();
    qemu_io(&["read -P 1 0 300k"], &path);
    assert_sound(&path);
}

#[test]
fn valid_bitmaps_stay_valid_but_a_snapshot_is_not_applied_over_them() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    used(KINDS[0], &path);
    assert!(refusal(apply_here(&path, "one")).contains("dirty bitmaps"));
    // A bit that is unknown here does not survive.
    writable(&path).write_all_at(&[0x81], 95).unwrap();
    create_here(&path, "two").unwrap();
    delete_here(&path, "one").unwrap();
    assert_eq!(fs::read(&path).unwrap()[95], 1);
    assert!(qemu_img("info IMAGE", &path).contains("name: b"));
    assert_sound(&path);
}

#[test]
fn a_snapshot_of_another_size_brings_its_size_back() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    for options in ["cluster_size=4k", "cluster_size=512", ""] {
        let _ = fs::remove_file(&path);
        qemu_create(options, &path, "5M");
        qemu_io(&["write -P 1 0 5M"], &path);
        create_here(&path, "large").unwrap();
        qemu_img("resize --shrink -q IMAGE 1M", &path);
        qemu_io(&["write -P 2 0 1M"], &path);
        create_here(&path, "small").unwrap();
        qemu_img("resize -q IMAGE 7M", &path);
        for (name, size, byte) in [("large", 5, 1), ("small", 1, 2), ("large", 5, 1)] {
            apply_here(&path, name).unwrap();
            assert_eq!(content(&path), vec![byte; size << 20], "{options}: {name}");
            assert_sound(&path);
        }
    }
}

#[test]
fn the_state_of_a_vm_in_a_snapshot_is_kept_there_but_not_applied() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    // An L2 table describes 2 MiB: the second one is made the state of a VM.
    qemu_create("cluster_size=4k", &path, "4M");
    qemu_io(&["write -P 1 0 4M"], &path);
    create_here(&path, "vm").unwrap();
    let header = Header::parse(&fs::read(&path).unwrap()[..MAX_HEADER]).unwrap();
    let mut snapshot = list(&path).unwrap().remove(0);
    (snapshot.disk_size, snapshot.vm_state_size) = (Some(2 << 20), 1 << 20);
    (snapshot.vm_clock, snapshot.icount) = (Duration::from_secs(5), Some(77));
    let file = writable(&path);
    file.write_all_at(&snapshot.to_bytes(), header.snapshots_offset)
        .unwrap();
    apply_here(&path, "vm").unwrap();
    assert_eq!(content(&path), vec![1; 2 << 20]);
    assert_sound(&path);
    create_here(&path, "later").unwrap();
    delete_here(&path, "later").unwrap();
    assert_eq!(list(&path).unwrap(), [snapshot]);
    delete_here(&path, "vm").unwrap();
    assert_sound(&path);
    assert_eq!(content(&path), vec![1; 2 << 20]);
}

#[test]
fn entries_of_others_are_kept_byte_for_byte() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("", &path, "1M");
    create_here(&path, "a").unwrap();
    let header = Header::parse(&fs::read(&path).unwrap()[..MAX_HEADER]).unwrap();
    // Extra data of a later version of the format, and an id that is no text.
    let mut entry = list(&path).unwrap()[0].to_bytes();
    entry[36..40].copy_from_slice(&40u32.to_be_bytes());
    entry.splice(64..66, [7; 16].into_iter().chain([0xff, 0xfe]));
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry[12..16].copy_from_slice(&[0, 1, 0, 1]);
    let file = writable(&path);
    file.write_all_at(&entry, header.snapshots_offset).unwrap();
    create_here(&path, "b").unwrap();
    delete_here(&path, "b").unwrap();
    let image = fs::read(&path).unwrap();
    let header = Header::parse(&image[..MAX_HEADER]).unwrap();
    let at = header.snapshots_offset as usize;
    assert_eq!(image[at..at + entry.len()], entry);
}

#[test]
fn refcounts_grow_with_what_snapshots_need() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    // A refcount block counts 32 KiB, a cluster of the table 2 MiB.
    qemu_create("cluster_size=512,refcount_bits=64", &path, "4M");
    qemu_io(&["write -P 1 0 1900k"], &path);
    let before = Header::parse(&fs::read(&path).unwrap()[..512]).unwrap();
    for name in ["a", "b", "c", "d"] {
        create_here(&path, name).unwrap();
        assert_clean(&path);
        qemu_io(&["write -P 2 0 300k"], &path);
        assert_sound(&path);
    }
    let after = Header::parse(&fs::read(&path).unwrap()[..512]).unwrap();
    assert!(after.refcount_table_clusters > before.refcount_table_clusters);
    apply_here(&path, "a").unwrap();
    qemu_io(&["read -P 1 0 1900k"], &path);
    assert_sound(&path);
}

#[test]
fn a_snapshot_that_is_deleted_gives_its_space_back_to_the_host() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("", &path, "16M");
    qemu_io(&["write -P 1 0 8M"], &path);
    let host = || {
        File::open(&path).unwrap().sync_all().unwrap();
        fs::metadata(&path).unwrap().blocks() * 512
    };
    create_here(&path, "a").unwrap();
    qemu_io(&["write -P 2 0 8M"], &path);
    assert!(host() >= 16 << 20);
    delete_here(&path, "a").unwrap();
    assert!(host() < 9 << 20, "{}", host());
    qemu_io(&["read -P 2 0 8M"], &path);
    assert_sound(&path);
}

#[test]
fn again_and_again_the_file_does_not_grow() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("cluster_size=4k", &path, "8M");
    qemu_io(&["write -P 1 0 8M"], &path);
    let mut most = 0;
    for round in 0..30 {
        create_here(&path, "a").unwrap();
        delete_here(&path, "a").unwrap();
        let len = fs::metadata(&path).unwrap().len();
        match round {
            0..5 => most = most.max(len),
            _ => assert!(len <= most, "{round}: {len}, not {most}"),
        }
    }
    assert_sound(&path);
}

#[test]
fn an_image_in_use_is_refused_but_listed() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("", &path, "1M");
    create(&path, "a", &mut |_, _| {}).unwrap();
    let ring = Ring::new(Engine::Threads).unwrap();
    let disk = open(&ring, "qcow2", &image(&path)).unwrap();
    let error = create(&path, "b", &mut |_, _| {}).unwrap_err();
    let holder = format!("process {}", std::process::id());
    assert!(error.message.contains(&holder), "{error}");
    assert_eq!(names(&path), ["a"]);
    run(&ring, disk.close()).unwrap();
    delete(&path, Which::Name("a"), &mut |_, _| {}).unwrap();
    let error = apply(&path, Which::Id("7"), &mut |_, _| {}).unwrap_err();
    assert_eq!(
        error.message,
        format!(
            "cannot apply the snapshot of id 7 to `{}`: it has no snapshots",
            path.display()
        )
    );
}

#[test]
fn a_block_device_without_room_is_refused_before_anything_is_written() {
    let directory = directory();
    let path = directory.path().join("a.qcow2");
    qemu_create("", &path, "1M");
    let file = writable(&path);
    let subject = Subject::read(&file).unwrap();
    let len = fs::metadata(&path).unwrap().len();
    let device = |len| plan::Plan::new(&subject.header, &subject.stored, Some(len));
    let clusters = len.div_ceil(65536);
    let full = device(len).place(2 << 16, 1).unwrap_err();
    assert!(full.to_string().contains("No space left"), "{full}");
    let place = device((clusters + 2) << 16).place(2 << 16, 1).unwrap();
    assert_eq!(place, clusters << 16);
}

#[test]
fn a_full_file_system_leaves_the_image_as_it_was() {
    let name = "qcow2::snapshots::tests::a_full_file_system_leaves_the_image_as_it_was";
    let Some(mounted) = in_tmpfs(name, "4m") else {
        return;
    };
    let path = mounted.join("a.qcow2");
    qemu_create("cluster_size=4k", &path, "2M");
    qemu_io(&["write -P 1 0 2M"], &path);
    let before = fs::read(&path).unwrap();
    let filler = mounted.join("filler");
    assert!(fs::write(&filler, vec![1; 4 << 20]).is_err());
    let error = create(&path, "a", &mut |_, _| {}).unwrap_err();
    assert!(
        error.message.ends_with(": No space left on device"),
        "{error}"
    );
    assert_eq!(error.help.as_deref(), Some("free some space"));
    assert!(fs::read(&path).unwrap() == before);
    fs::remove_file(filler).unwrap();
    create(&path, "a", &mut |_, _| {}).unwrap();
    assert_sound(&path);
}
