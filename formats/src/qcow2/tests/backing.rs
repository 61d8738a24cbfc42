//! Backing files and data files: opened only if the configuration names them.

use std::fs;
use std::path::{Path, PathBuf};

use super::{MIB, check, new_image, read, write};
use crate::qcow2::testing::{qemu_create, qemu_img};
use crate::testing::{directory, image, open, refused, run};
use crate::{Image, OptionValue, Ring};

/// An overlay of 4 MiB over 2 MiB of bytes 7, as QEMU makes it.
fn overlay(directory: &Path, options: &str) -> Image {
    let base = directory.join("base.raw");
    fs::write(&base, vec![7; 2 * MIB as usize]).unwrap();
    let top = directory.join("top.qcow2");
    let options = format!("backing_file=base.raw,backing_fmt=raw{options}");
    qemu_create(&options, &top, "4M");
    Image {
        backing: vec![base],
        ..image(&top)
    }
}

#[test]
fn a_backing_file_that_is_not_named_is_refused_with_the_line_to_add() {
    let directory = directory();
    let image = Image {
        backing: Vec::new(),
        ..overlay(directory.path(), "")
    };
    let error = refused("qcow2", &image);
    assert_eq!(error.key, "backing");
    assert!(error.message.contains("has the backing file `base.raw`"));
    let line = format!(
        "add `backing = \"{}\"`",
        directory.path().join("base.raw").display()
    );
    assert!(error.help.unwrap().starts_with(&line));
}

#[test]
fn the_line_to_add_is_right_wherever_the_configuration_lies() {
    let directory = directory();
    let overlay = overlay(directory.path(), "");
    // The same image, from where the tests run.
    let here = std::env::current_dir().unwrap();
    let up: PathBuf = here.components().skip(1).map(|_| "..").collect();
    let path = up.join(overlay.path.strip_prefix("/").unwrap());
    assert!(path.is_relative() && path.exists());
    let backing = Vec::new();
    let error = refused(
        "qcow2",
        &Image {
            path,
            backing,
            ..overlay
        },
    );
    let help = error.help.unwrap();
    let named = Path::new(help.split('"').nth(1).unwrap());
    assert!(named.is_absolute(), "{help}");
    let same = |path: &Path| fs::canonicalize(path).unwrap();
    assert_eq!(same(named), same(&directory.path().join("base.raw")));
}

#[test]
fn another_file_than_the_image_names_is_refused() {
    let directory = directory();
    let other = directory.path().join("other.raw");
    fs::write(&other, [0; 512]).unwrap();
    let image = Image {
        backing: vec![other],
        ..overlay(directory.path(), "")
    };
    let error = refused("qcow2", &image);
    assert_eq!(error.key, "backing");
    assert!(error.message.ends_with("is based on `base.raw`"));
    assert!(error.help.unwrap().contains("qemu-img rebase -u -b"));
}

#[test]
fn a_name_too_many_is_refused() {
    let directory = directory();
    let plain = directory.path().join("plain.qcow2");
    qemu_create("", &plain, "1M");
    let error = refused(
        "qcow2",
        &Image {
            backing: vec!["base.raw".into()],
            ..image(&plain)
        },
    );
    assert!(error.message.ends_with("has no backing file"));
}

#[test]
fn a_name_that_is_a_protocol_is_no_file() {
    let directory = directory();
    let image = overlay(directory.path(), "");
    for name in ["nbd://localhost/x", "json:{\"driver\":\"file\"}"] {
        qemu_img(&format!("rebase -u -F raw -b {name}"), &image.path);
        assert_eq!(refused("qcow2", &image).key, "backing");
    }
}

/// Makes the extension with the backing file's format one of a type that nobody knows.
fn forget_format(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let magic = [0xe2, 0x79, 0x2a, 0xca];
    let at = bytes.windows(4).position(|it| it == magic).unwrap();
    bytes[at] = 0x11;
    fs::write(path, &bytes).unwrap();
}

#[test]
fn a_backing_file_without_a_format_is_the_one_that_its_name_says() {
    let directory = directory();
    let image = overlay(directory.path(), "");
    forget_format(&image.path);
    let ring = Ring::new(Default::default()).unwrap();
    let disk = open(&ring, "qcow2", &image).unwrap();
    assert_eq!(read(&ring, &*disk, 0, 512), [7; 512]);
    run(&ring, disk.close()).unwrap();

    let nameless = directory.path().join("base");
    fs::rename(&image.backing[0], &nameless).unwrap();
    qemu_img("rebase -u -F raw -b base", &image.path);
    forget_format(&image.path);
    let error = refused(
        "qcow2",
        &Image {
            backing: vec![nameless],
            ..image
        },
    );
    assert!(error.message.contains("does not say what format"));
}

#[test]
fn what_is_not_written_comes_from_the_backing_file_and_past_its_end_are_zeroes() {
    for options in ["", ",cluster_size=2M", ",extended_l2=on", ",compat=0.10"] {
        let directory = directory();
        let image = overlay(directory.path(), options);
        let ring = Ring::new(Default::default()).unwrap();
        let disk = open(&ring, "qcow2", &image).unwrap();
        assert_eq!(
            read(&ring, &*disk, 2 * MIB - 512, 1024),
            [[7; 512], [0; 512]].concat()
        );
        write(&ring, &*disk, MIB + 512, &[1; 512]);
        let around = read(&ring, &*disk, MIB, 2048);
        assert_eq!(around, [[7; 512], [1; 512], [7; 512], [7; 512]].concat());
        run(&ring, disk.close()).unwrap();
        check(&image.path);
        assert_eq!(fs::read(&image.backing[0]).unwrap(), [7; 2 * MIB as usize]);
    }
}

#[test]
fn neither_discard_nor_growth_shows_the_backing_file_again() {
    for options in ["", ",extended_l2=on", ",compat=0.10"] {
        let directory = directory();
        let mut image = overlay(directory.path(), options);
        let ring = Ring::new(Default::default()).unwrap();
        let disk = open(&ring, "qcow2", &image).unwrap();
        write(&ring, &*disk, 0, &[1; 131_072]);
        run(&ring, disk.discard(0, 65536)).unwrap();
        let first = read(&ring, &*disk, 0, 512);
        assert!(first == [0; 512] || first == [1; 512], "{options}");
        run(&ring, disk.write_zeroes(65536, 65536, true)).unwrap();
        assert_eq!(read(&ring, &*disk, 65536, 65536), [0; 65536]);
        // Cut in the middle of a cluster, and grown again.
        run(&ring, disk.resize(MIB + 1024)).unwrap();
        run(&ring, disk.close()).unwrap();
        image.size = Some(3 * MIB);
        let disk = open(&ring, "qcow2", &image).unwrap();
        assert_eq!(read(&ring, &*disk, MIB, 1024), [7; 1024]);
        let grown = read(&ring, &*disk, MIB + 1024, 2 * MIB as usize - 1024);
        assert!(grown.iter().all(|byte| *byte == 0), "{options}");
        run(&ring, disk.close()).unwrap();
        check(&image.path);
    }
}

#[test]
fn a_new_image_is_based_on_the_backing_file_that_the_configuration_names() {
    let directory = directory();
    let base = directory.path().join("base.raw");
    fs::write(&base, vec![7; MIB as usize]).unwrap();
    let middle = Image {
        backing: vec![base.clone()],
        ..new_image(&directory.path().join("middle.qcow2"), 2 * MIB, &[])
    };
    let ring = Ring::new(Default::default()).unwrap();
    run(&ring, open(&ring, "qcow2", &middle).unwrap().close()).unwrap();
    let top = Image {
        backing: vec![middle.path.clone(), base],
        ..new_image(&directory.path().join("top.qcow2"), 3 * MIB, &[])
    };
    let disk = open(&ring, "qcow2", &top).unwrap();
    write(&ring, &*disk, 0, &[1; 512]);
    assert_eq!(read(&ring, &*disk, 0, 1024), [[1; 512], [7; 512]].concat());
    run(&ring, disk.close()).unwrap();
    check(&top.path);
    assert!(qemu_img("info --backing-chain", &top.path).contains("base.raw"));
}

#[test]
fn a_data_file_that_is_not_named_is_refused_and_one_that_is_holds_the_data() {
    let directory = directory();
    let data = directory.path().join("a.data");
    let path = directory.path().join("a.qcow2");
    let named = vec![("data_file", OptionValue::Path(data.clone()))];
    let ring = Ring::new(Default::default()).unwrap();
    let disk = open(&ring, "qcow2", &new_image(&path, MIB, &named)).unwrap();
    write(&ring, &*disk, 65536, &[3; 512]);
    run(&ring, disk.close()).unwrap();
    assert_eq!(fs::read(&data).unwrap()[65536..][..512], [3; 512]);
    check(&path);
    let error = refused("qcow2", &image(&path));
    assert_eq!(error.key, "data_file");
    assert!(error.help.unwrap().starts_with("add `data_file = "));
}
