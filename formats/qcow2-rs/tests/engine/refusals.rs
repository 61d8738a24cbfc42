//! What the engine refuses, and what it says to that.

use std::os::unix::fs::FileExt;
use std::path::Path;

use formats::{Image, OpenError};

use crate::shared::{Lab, image};

fn expect(error: &OpenError, key: &str, message: &str) {
    assert!(error.message.contains(message), "{error}");
    assert_eq!(error.key, key, "{error}");
    assert!(error.help.is_some(), "{error}");
}

fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

#[test]
fn what_the_crate_cannot_do_is_refused_with_the_reason() {
    for (options, message) in [
        (
            "cluster_size=2k",
            "its cluster size is 2048 bytes, expected 4 KiB to 1 MiB",
        ),
        (
            "cluster_size=2M",
            "its cluster size is 2097152 bytes, expected 4 KiB to 1 MiB",
        ),
        ("extended_l2=on", "it has extended L2 entries"),
        ("data_file=d.raw", "it has an external data file"),
        ("compression_type=zstd", "its compression type is zstd"),
        ("refcount_bits=2", "its refcounts have 2 bits"),
        ("refcount_bits=4", "its refcounts have 4 bits"),
        (
            "refcount_bits=1,cluster_size=1M",
            "its refcounts of 1 bits with clusters of 1024 KiB",
        ),
        (
            "backing_file=b,backing_fmt=raw",
            "its backing file has the format \"raw\", expected qcow2",
        ),
        (
            "compat=0.10,backing_file=b.qcow2,backing_fmt=qcow2",
            "its version is 2, and it has a backing file",
        ),
    ] {
        let lab = Lab::new();
        std::fs::write(lab.path("b"), [0; 1 << 20]).unwrap();
        lab.create("b.qcow2", "", "1M");
        let path = lab.create("a.qcow2", options, "1M");
        expect(&lab.refused(&image(&path)), "format", message);
    }
}

#[test]
fn encryption_is_refused() {
    let lab = Lab::new();
    let path = lab.path("a.qcow2");
    lab.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        "a.qcow2",
        "1M",
    ]);
    expect(
        &lab.refused(&image(&path)),
        "path",
        "it is encrypted (LUKS)",
    );
}

#[test]
fn feature_bits_are_refused() {
    for (offset, bit, key, message) in [
        (79, 1, "format", "it is marked dirty"),
        (79, 2, "format", "it is marked corrupt"),
        (79, 0x20, "path", "incompatible bits 0x20"),
        (95, 1, "format", "its autoclear bits are 0x1"),
    ] {
        let lab = Lab::new();
        let path = lab.create("a.qcow2", "", "1M");
        patch(&path, offset, &[bit]);
        expect(&lab.refused(&image(&path)), key, message);
    }
}

#[test]
fn an_internal_snapshot_is_refused() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", "", "1M");
    lab.qemu_img(&["snapshot", "-c", "one", "a.qcow2"]);
    expect(
        &lab.refused(&image(&path)),
        "format",
        "it has 1 internal snapshots",
    );
}

#[test]
fn a_compressed_cluster_is_refused_in_a_backing_file_too() {
    let lab = Lab::new();
    std::fs::write(lab.path("plain"), [7; 1 << 20]).unwrap();
    lab.qemu_img(&["convert", "-c", "-O", "qcow2", "plain", "a.qcow2"]);
    let message = "it has compressed clusters";
    expect(
        &lab.refused(&image(&lab.path("a.qcow2"))),
        "format",
        message,
    );
    let path = lab.create("b.qcow2", "backing_file=a.qcow2,backing_fmt=qcow2", "1M");
    let over = Image {
        backing: vec![lab.path("a.qcow2")],
        ..image(&path)
    };
    let error = lab.refused(&over);
    expect(&error, "format", message);
    assert!(error.message.contains("a.qcow2"), "{error}");
}

#[test]
fn a_backing_file_is_opened_only_if_the_configuration_names_it() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    lab.create("other.qcow2", "", "1M");
    let path = lab.create("b.qcow2", "backing_file=a.qcow2,backing_fmt=qcow2", "1M");
    let named = |backing: &[&str]| Image {
        backing: backing.iter().map(|name| lab.path(name)).collect(),
        ..image(&path)
    };
    expect(
        &lab.refused(&named(&[])),
        "backing",
        "which the configuration does not name",
    );
    let error = lab.refused(&named(&["other.qcow2"]));
    expect(&error, "backing", "is based on");
    let error = lab.refused(&named(&["a.qcow2", "other.qcow2"]));
    expect(&error, "backing", "has no backing file");
    lab.try_open(&named(&["a.qcow2"])).map(drop).unwrap();
}

#[test]
fn a_backing_file_of_no_stated_format_is_refused() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    let path = lab.create("b.qcow2", "backing_file=a.qcow2,backing_fmt=qcow2", "1M");
    // The extension of this type becomes one of no meaning.
    let bytes = std::fs::read(&path).unwrap();
    let magic = [0xe2, 0x79, 0x2a, 0xca];
    let at = bytes.windows(4).position(|bytes| bytes == magic).unwrap();
    patch(&path, at as u64, &[0xe2, 0, 0, 0]);
    let over = Image {
        backing: vec![lab.path("a.qcow2")],
        ..image(&path)
    };
    expect(
        &lab.refused(&over),
        "format",
        "it does not say what format its backing file has",
    );
}

#[test]
fn a_backing_file_that_ends_before_the_last_cluster_does_is_refused() {
    for size in ["512K", "1000K"] {
        let lab = Lab::new();
        lab.create("a.qcow2", "", size);
        let options = "backing_file=a.qcow2,backing_fmt=qcow2";
        let path = lab.create("b.qcow2", options, "1000K");
        let over = Image {
            backing: vec![lab.path("a.qcow2")],
            ..image(&path)
        };
        expect(&lab.refused(&over), "format", "expected 1048576 or more");
    }
}

#[test]
fn tables_that_may_outgrow_the_caches_are_refused() {
    let lab = Lab::new();
    for (options, size, fits) in [
        ("cluster_size=64k", "400G", true),
        ("cluster_size=64k", "520G", false),
        ("cluster_size=1M", "6T", true),
        ("cluster_size=4k", "2G", true),
        // Its refcount table is for 4 GiB.
        ("cluster_size=4k", "4G", false),
    ] {
        let path = lab.create("a.qcow2", options, size);
        let message = match options {
            _ if fits => {
                lab.try_open(&image(&path)).map(drop).unwrap();
                continue;
            }
            "cluster_size=4k" => "this engine cannot make the table larger",
            _ => "MiB of memory, expected at most 64 MiB",
        };
        expect(&lab.refused(&image(&path)), "format", message);
    }
}

#[test]
fn another_size_than_the_image_has_is_refused() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", "", "1M");
    let sized = |size| Image {
        size: Some(size),
        ..image(&path)
    };
    lab.try_open(&sized(1 << 20)).map(drop).unwrap();
    for size in [512, 2 << 20] {
        expect(&lab.refused(&sized(size)), "size", "does not resize");
    }
}

#[test]
fn full_allocation_is_refused() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", "", "1M");
    let full = Image {
        sparse: false,
        ..image(&path)
    };
    expect(
        &lab.refused(&full),
        "sparse",
        "allocates only what is written",
    );
}

#[test]
fn entries_that_point_elsewhere_are_refused() {
    // L1 entry 0, and L2 entry 0: past the end, into the header, in between, shared, reserved.
    for (table, entry) in [
        (0, 0x8000_0001_0000_0000u64),
        (0, 0x8000_0000_0000_0200),
        (0, 0x0000_0000_0004_0000),
        (1, 0x8000_0001_0000_0000),
        (1, 0x8000_0000_0005_0200),
        (1, 0x0000_0000_0005_0000),
        (1, 0x8100_0000_0005_0000),
        (1, 0x8000_0000_0000_0000),
    ] {
        let lab = Lab::new();
        let path = lab.create("a.qcow2", "", "1M");
        lab.tool("qemu-io", &["-f", "qcow2", "-c", "write 0 64k", "a.qcow2"]);
        patch(&path, [0x30000, 0x40000][table], &entry.to_be_bytes());
        expect(&lab.refused(&image(&path)), "path", "it is damaged");
    }
}

#[test]
fn a_refcount_that_is_too_low_is_refused_and_one_that_is_too_high_is_not() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", "", "1M");
    lab.tool("qemu-io", &["-f", "qcow2", "-c", "write 0 64k", "a.qcow2"]);
    // That of the data cluster, in the block that follows the table.
    patch(&path, 0x20000 + 5 * 2, &[0, 0]);
    expect(&lab.refused(&image(&path)), "path", "it is damaged");
    patch(&path, 0x20000 + 5 * 2, &[0, 1]);
    patch(&path, 0x20000 + 6 * 2, &[0, 1]);
    lab.try_open(&image(&path)).map(drop).unwrap();
}

#[test]
fn anything_in_the_first_bytes_is_an_error_or_an_image() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", "", "1M");
    lab.tool("qemu-io", &["-f", "qcow2", "-c", "write 0 64k", "a.qcow2"]);
    let good = std::fs::read(&path).unwrap();
    let ro = Image {
        ro: true,
        ..image(&path)
    };
    for at in (4..120).chain([0x10000, 0x10005, 0x30005, 0x40000, 0x40005]) {
        for value in [0x01, 0x7f, 0x80, 0xff] {
            patch(&path, at, &[value]);
            if let Ok(disk) = lab.try_open(&ro) {
                let len = disk.size().min(1 << 20) as usize;
                lab.read(&*disk, 0, len / 512 * 512);
            }
            patch(&path, at, &good[at as usize..][..1]);
        }
    }
}

#[test]
fn an_image_that_is_not_there_and_has_no_size_is_refused() {
    let lab = Lab::new();
    let path = lab.path("a.qcow2");
    expect(&lab.refused(&image(&path)), "path", "cannot open");
    assert!(!path.exists());
}

#[test]
fn nothing_is_left_of_a_new_image_that_is_refused() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    std::fs::write(lab.path("a.raw"), [0; 1 << 20]).unwrap();
    let path = lab.path("b.qcow2");
    for (backing, size, key, message) in [
        (Some("a.raw"), 1 << 20, "backing", "takes qcow2 alone"),
        (
            Some("a.qcow2"),
            2 << 20,
            "format",
            "expected 2097152 or more",
        ),
        (None, 16 << 40, "format", "expected at most 64 MiB"),
    ] {
        let new = Image {
            backing: backing.into_iter().map(|name| lab.path(name)).collect(),
            size: Some(size),
            ..image(&path)
        };
        expect(&lab.refused(&new), key, message);
        assert!(!path.exists());
    }
}
