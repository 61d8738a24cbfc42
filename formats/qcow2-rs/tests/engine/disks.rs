//! Disks without backing files.

use formats::Engine;

use crate::shared::{Lab, image, segments};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

#[test]
fn what_was_written_is_read_after_reopening_and_by_qemu() {
    let lab = Lab::new();
    lab.create("a.qcow2", "cluster_size=64k", "10M");
    let mut expected = vec![0; 10 << 20];
    let disk = lab.open("a.qcow2");
    assert_eq!(disk.size(), 10 * MIB);
    for (offset, len, value) in [
        (0, 512, 1),
        (64 * KIB - 512, 1024, 2),
        (3 * MIB, MIB, 3),
        (10 * MIB - 512, 512, 4),
    ] {
        let data = vec![value; len as usize];
        lab.write(&*disk, offset, &data);
        expected[offset as usize..][..data.len()].copy_from_slice(&data);
    }
    assert!(lab.read(&*disk, 0, 10 << 20) == expected);
    lab.run(disk.flush()).unwrap();
    lab.run(disk.close()).unwrap();
    lab.check("a.qcow2");
    lab.compare("a.qcow2", &expected);
    let disk = lab.open("a.qcow2");
    assert!(lab.read(&*disk, 0, 10 << 20) == expected);
}

#[test]
fn what_is_flushed_is_in_the_file_while_it_is_open() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "10M");
    let disk = lab.open("a.qcow2");
    lab.write(&*disk, MIB, &[7; 4096]);
    lab.run(disk.flush()).unwrap();
    std::fs::copy(lab.path("a.qcow2"), lab.path("copy.qcow2")).unwrap();
    lab.check("copy.qcow2");
    let mut expected = vec![0; 10 << 20];
    expected[1 << 20..][..4096].fill(7);
    lab.compare("copy.qcow2", &expected);
}

#[test]
fn a_disk_that_is_dropped_is_flushed_and_unlocked() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    let disk = lab.open("a.qcow2");
    lab.write(&*disk, 512, &[7; 512]);
    drop(disk);
    lab.check("a.qcow2");
    let disk = lab.open("a.qcow2");
    assert_eq!(lab.read(&*disk, 512, 512), [7; 512]);
}

#[test]
fn a_write_of_a_part_of_a_new_cluster_leaves_zeroes_around_it() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", "cluster_size=64k", "1M");
    // Where clusters will be, there is something already.
    let end = std::fs::metadata(&path).unwrap().len();
    let end = end.next_multiple_of(64 * KIB);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xaa; 1 << 20], end).unwrap();
    let disk = lab.open("a.qcow2");
    lab.write(&*disk, 64 * KIB + 512, &[7; 512]);
    let mut expected = vec![0; 1 << 20];
    expected[64 * 1024 + 512..][..512].fill(7);
    assert!(lab.read(&*disk, 0, 1 << 20) == expected);
    lab.run(disk.close()).unwrap();
    lab.compare("a.qcow2", &expected);
}

#[test]
fn zeroes_are_written_where_there_is_data_and_only_there() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", "cluster_size=64k", "1M");
    let disk = lab.open("a.qcow2");
    lab.run(disk.write_zeroes(0, MIB, true)).unwrap();
    lab.run(disk.flush()).unwrap();
    let empty = std::fs::metadata(&path).unwrap().len();
    assert!(empty < 5 * 64 * KIB, "{empty}");
    lab.write(&*disk, 0, &[7; 1 << 20]);
    lab.run(disk.write_zeroes(512, MIB - 1024, false)).unwrap();
    let mut expected = vec![0; 1 << 20];
    expected[..512].fill(7);
    expected[(1 << 20) - 512..].fill(7);
    assert!(lab.read(&*disk, 0, 1 << 20) == expected);
    lab.run(disk.close()).unwrap();
    lab.check("a.qcow2");
    lab.compare("a.qcow2", &expected);
}

#[test]
fn zero_clusters_of_qemu_s_read_as_zeroes_and_can_be_written() {
    let lab = Lab::new();
    lab.create("a.qcow2", "cluster_size=64k", "1M");
    // The first of them keep their clusters.
    let commands = [
        "-c",
        "write -P 9 0 1M",
        "-c",
        "write -z 256k 128k",
        "-c",
        "write -z -u 64k 128k",
    ];
    let arguments = [&["-f", "qcow2"], &commands[..], &["a.qcow2"]].concat();
    lab.tool("qemu-io", &arguments);
    let disk = lab.open("a.qcow2");
    let mut expected = vec![9; 1 << 20];
    expected[64 << 10..][..128 << 10].fill(0);
    expected[256 << 10..][..128 << 10].fill(0);
    assert!(lab.read(&*disk, 0, 1 << 20) == expected);
    for offset in [100 << 10, 300 << 10] {
        lab.write(&*disk, offset, &[7; 512]);
        expected[offset as usize..][..512].fill(7);
    }
    lab.run(disk.close()).unwrap();
    lab.check("a.qcow2");
    lab.compare("a.qcow2", &expected);
}

#[test]
fn a_read_only_disk_is_not_touched() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", "", "1M");
    lab.tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 9 0 1M", "a.qcow2"],
    );
    let before = std::fs::read(&path).unwrap();
    let ro = formats::Image {
        ro: true,
        ..image(&path)
    };
    let disk = lab.try_open(&ro).unwrap();
    assert!(lab.read(&*disk, 0, 1 << 20) == [9; 1 << 20]);
    assert!(lab.run(disk.write(0, segments(&[1; 512]))).is_err());
    lab.run(disk.flush()).unwrap();
    lab.run(disk.close()).unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn discard_and_resize_are_not_offered() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    let disk = lab.open("a.qcow2");
    let limits = disk.limits();
    assert_eq!((limits.discard_granularity, limits.resize), (0, false));
    assert!(!limits.write_zeroes);
    for refused in [disk.discard(0, MIB), disk.resize(2 * MIB)] {
        let error = lab.run(refused).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::Unsupported);
    }
    let format = formats::find("qcow2-rs").unwrap();
    assert_eq!(format.abilities, ["backing"]);
}

#[test]
fn an_image_in_use_is_locked_against_qemu_and_ourselves() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", "", "1M");
    let disk = lab.open("a.qcow2");
    assert_eq!(lab.refused(&image(&path)).key, formats::OpenError::HOST);
    let output = std::process::Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(!output.status.success());
    drop(disk);
    lab.check("a.qcow2");
}

#[test]
fn o_direct_and_threads_do_the_same() {
    let mut lab = Lab::new();
    lab.ring = formats::Ring::new(Engine::Threads).unwrap();
    let path = lab.create("a.qcow2", "cluster_size=64k", "4M");
    let direct = formats::Image {
        o_direct: true,
        block_size: 4096,
        ..image(&path)
    };
    let disk = match lab.try_open(&direct) {
        Ok(disk) => disk,
        Err(error) => {
            assert_eq!(error.key, "o_direct", "{error}");
            eprintln!("O_DIRECT is not tested, the file system has none: {error}");
            return;
        }
    };
    let data: Vec<u8> = (0..3 << 20).map(|i: u32| (i / 4096) as u8 | 1).collect();
    lab.write(&*disk, 512 * KIB, &data);
    let mut expected = vec![0; 4 << 20];
    expected[512 << 10..][..data.len()].copy_from_slice(&data);
    assert!(lab.read(&*disk, 0, 4 << 20) == expected);
    lab.run(disk.close()).unwrap();
    lab.check("a.qcow2");
    lab.compare("a.qcow2", &expected);
}

/// Every table of the image is in use at once, several times over: were one evicted, what it held
/// would be lost, or the crate would panic.
#[test]
fn no_table_is_evicted_however_many_are_in_use() {
    for options in ["cluster_size=4k", "cluster_size=4k,refcount_bits=64"] {
        let lab = Lab::new();
        // 512 entries of 4 KiB in an L2 table: 128 tables.
        lab.create("a.qcow2", options, "256M");
        let disk = lab.open("a.qcow2");
        let cluster = |round: u64, table: u64| table * 2 * MIB + round * 67 * 4 * KIB;
        for round in 0..7 {
            for table in 0..128 {
                let value = [(round * 128 + table) as u8 | 1; 4096];
                lab.write(&*disk, cluster(round, table), &value);
            }
            if round % 3 == 0 {
                lab.run(disk.flush()).unwrap();
            }
        }
        for round in 0..7 {
            for table in 0..128 {
                let read = lab.read(&*disk, cluster(round, table), 4096);
                assert_eq!(read, [(round * 128 + table) as u8 | 1; 4096]);
            }
        }
        lab.run(disk.close()).unwrap();
        lab.check("a.qcow2");
    }
}

/// A file whose refcounts need more blocks than it has.
#[test]
fn new_refcount_blocks_are_made() {
    for (options, size) in [
        // 512 refcounts in a block, of 4 KiB: 2 MiB a block.
        ("cluster_size=4k,refcount_bits=64", 40 * MIB),
        // 4096 in a block, of which 4 KiB are cached together; 32 MiB of the file each.
        ("cluster_size=128k,refcount_bits=64", 3 * 1024 * MIB),
    ] {
        let lab = Lab::new();
        lab.create("a.qcow2", options, &size.to_string());
        let disk = lab.open("a.qcow2");
        let step = 4 * MIB;
        for offset in (0..size / 2).step_by(step as usize) {
            let len = step.min(size / 16 / 512 * 512) as usize;
            lab.write(&*disk, offset, &vec![(offset / step) as u8 | 1; len]);
        }
        for offset in (0..size / 2).step_by(step as usize) {
            let read = lab.read(&*disk, offset, 4096);
            assert_eq!(read, [(offset / step) as u8 | 1; 4096]);
        }
        lab.run(disk.close()).unwrap();
        lab.check("a.qcow2");
    }
}

#[test]
fn a_new_image_is_created_with_clusters_as_large_as_its_tables_want() {
    for (size, cluster_size) in [(10 * MIB, 65536), (1 << 40, 262144), (5 << 40, 1048576)] {
        let lab = Lab::new();
        let path = lab.path("a.qcow2");
        let new = formats::Image {
            size: Some(size),
            ..image(&path)
        };
        let disk = lab.try_open(&new).unwrap();
        lab.write(&*disk, size - 512, &[7; 512]);
        lab.run(disk.close()).unwrap();
        lab.check("a.qcow2");
        let info = lab.qemu_img(&["info", "-f", "qcow2", "a.qcow2"]);
        let line = format!("cluster_size: {cluster_size}");
        assert!(info.contains(&line), "{info}");
        let disk = lab.open("a.qcow2");
        assert_eq!(lab.read(&*disk, size - 512, 512), [7; 512]);
    }
}
