//! Images over backing files.

use std::rc::Rc;

use formats::Image;

use crate::model::{differ, operate};
use crate::shared::{Lab, Random, image};

/// A chain of three images of `size` bytes with random contents, `c.qcow2` over `b.qcow2` over
/// `a.qcow2`, with clusters of their own sizes each; the bytes of the disk.
fn chain(lab: &Lab, clusters: [&str; 3], size: u64, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut model = vec![0; size as usize];
    for (at, name) in ["a.qcow2", "b.qcow2", "c.qcow2"].into_iter().enumerate() {
        let cluster = format!("cluster_size={}", clusters[at]);
        match at {
            0 => lab.create(name, &cluster, &size.to_string()),
            _ => {
                let under = ["a.qcow2", "b.qcow2"][at - 1];
                let over = format!("{cluster},backing_file={under},backing_fmt=qcow2");
                lab.create(name, &over, &size.to_string())
            }
        };
        let mut commands = vec!["-f".to_owned(), "qcow2".into()];
        for _ in 0..12 {
            let offset = random.below(size / 512) * 512;
            let len = (random.below(256) + 1) * 512;
            let len = len.min(size - offset);
            let value = random.below(256);
            model[offset as usize..][..len as usize].fill(value as u8);
            commands.extend(["-c".into(), format!("write -P {value} {offset} {len}")]);
        }
        commands.push(name.into());
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        lab.tool("qemu-io", &commands);
    }
    model
}

fn over(lab: &Lab, name: &str, backing: &[&str]) -> Image {
    Image {
        backing: backing.iter().map(|name| lab.path(name)).collect(),
        ..image(&lab.path(name))
    }
}

#[test]
fn random_operations_over_a_chain_leave_the_backing_files_as_they_are() {
    for (seed, clusters) in [
        (1, ["64k", "64k", "64k"]),
        (2, ["4k", "64k", "128k"]),
        (3, ["64k", "1M", "4k"]),
        (4, ["1M", "4k", "64k"]),
        (5, ["64k", "64k", "512k"]),
    ] {
        let lab = Lab::new();
        let mut model = chain(&lab, clusters, 8 << 20, seed);
        let under = ["b.qcow2", "a.qcow2"].map(|name| std::fs::read(lab.path(name)).unwrap());
        let over = over(&lab, "c.qcow2", &["b.qcow2", "a.qcow2"]);
        for session in 0..2 {
            let disk = lab.try_open(&over).unwrap();
            let disk = Rc::new(disk);
            operate(&lab, &disk, &mut model, seed * 2 + session, 100);
            let disk = Rc::into_inner(disk).unwrap();
            differ(&lab, "c.qcow2", disk, &mut model, seed * 3 + session);
        }
        let after = ["b.qcow2", "a.qcow2"].map(|name| std::fs::read(lab.path(name)).unwrap());
        assert!(under == after);
    }
}

#[test]
fn a_backing_file_that_is_larger_ends_with_the_disk() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "2M");
    lab.tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 9 0 2M", "a.qcow2"],
    );
    // Its last cluster is cut.
    let options = "cluster_size=128k,backing_file=a.qcow2,backing_fmt=qcow2";
    lab.create("b.qcow2", options, "1000K");
    let disk = lab.try_open(&over(&lab, "b.qcow2", &["a.qcow2"])).unwrap();
    assert_eq!(disk.size(), 1000 << 10);
    lab.write(&*disk, 999 << 10, &[7; 512]);
    let mut expected = vec![9; 1000 << 10];
    expected[999 << 10..][..512].fill(7);
    assert!(lab.read(&*disk, 0, 1000 << 10) == expected);
    lab.run(disk.close()).unwrap();
    lab.check("b.qcow2");
    lab.compare("b.qcow2", &expected);
}

#[test]
fn zeroes_over_a_backing_file_do_not_let_it_shine_through() {
    let lab = Lab::new();
    let mut model = chain(&lab, ["64k"; 3], 1 << 20, 7);
    let disk = lab.try_open(&over(&lab, "c.qcow2", &["b.qcow2", "a.qcow2"]));
    let disk = disk.unwrap();
    lab.run(disk.write_zeroes(512, (1 << 20) - 1024, true))
        .unwrap();
    model[512..(1 << 20) - 512].fill(0);
    lab.run(disk.close()).unwrap();
    lab.check("c.qcow2");
    lab.compare("c.qcow2", &model);
}

/// What was flushed is in the file, whatever is done to its clusters' tables afterwards.
#[test]
fn what_was_flushed_is_never_gone_from_the_file() {
    let lab = Lab::new();
    let mut expected = chain(&lab, ["64k"; 3], 4 << 20, 11);
    let disk = lab.try_open(&over(&lab, "c.qcow2", &["b.qcow2", "a.qcow2"]));
    let disk = disk.unwrap();
    for cluster in 0..8u64 {
        let offset = cluster * 320 * 1024;
        lab.write(&*disk, offset, &[cluster as u8 | 0x40; 4096]);
        expected[offset as usize..][..4096].fill(cluster as u8 | 0x40);
        lab.run(disk.flush()).unwrap();
        std::fs::copy(lab.path("c.qcow2"), lab.path("copy.qcow2")).unwrap();
        lab.check("copy.qcow2");
        lab.compare("copy.qcow2", &expected);
    }
}

#[test]
fn a_new_image_is_created_over_a_backing_file() {
    let lab = Lab::new();
    let mut model = chain(&lab, ["64k"; 3], 1 << 20, 13);
    let new = Image {
        size: Some(1 << 20),
        ..over(&lab, "d.qcow2", &["c.qcow2", "b.qcow2", "a.qcow2"])
    };
    let disk = lab.try_open(&new).unwrap();
    assert!(lab.read(&*disk, 0, 1 << 20) == model);
    lab.write(&*disk, 512, &[7; 512]);
    model[512..1024].fill(7);
    lab.run(disk.close()).unwrap();
    lab.check("d.qcow2");
    lab.compare("d.qcow2", &model);
}
