//! `launcher disk bench`: what it prints, refuses and leaves as it was. How fast anything is plays
//! no part.

use serde_json::Value;

use super::{Folder, KIB, MIB};

/// Measures briefly.
fn bench(folder: &Folder, arguments: &[&str]) -> String {
    let arguments = [&["disk", "bench"][..], arguments, &["--seconds", "0.02"]].concat();
    folder.launcher_does(&arguments)
}

fn refused(folder: &Folder, arguments: &[&str]) -> (i32, String) {
    let done = folder.launcher(&[&["disk", "bench"], arguments].concat());
    assert_eq!(done.out, "");
    (done.code, done.err)
}

#[test]
fn reads_are_measured_and_the_image_stays_as_it_is() {
    let folder = Folder::new("");
    folder.raw("a.img", 4 * MIB, 7);
    folder.qemu_img(&["convert", "-O", "qcow2", "a.img", "a.qcow2"]);
    for name in ["a.img", "a.qcow2"] {
        let before = (folder.read(name), folder.allocated(name));
        let said = bench(&folder, &[name]);
        let lines: Vec<_> = said.lines().collect();
        let format = if name == "a.img" {
            "sparse-raw"
        } else {
            "qcow2"
        };
        let head = format!("{name} ({format}, 4MiB, 4MiB of it data), through the page cache, by ");
        assert!(lines[0].starts_with(&head), "{said}");
        let rows: Vec<_> = lines[3..].iter().map(|line| &line[..32]).collect();
        let words = |row: &str| {
            row.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            words(rows[0])[..4],
            ["random", "read", "4KiB", "1"],
            "{said}"
        );
        assert_eq!(
            words(rows[1])[..4],
            ["random", "read", "4KiB", "32"],
            "{said}"
        );
        assert_eq!(
            words(rows[2])[..4],
            ["sequential", "read", "1MiB", "8"],
            "{said}"
        );
        assert_eq!(rows.len(), 3, "{said}");
        assert!(before == (folder.read(name), folder.allocated(name)));
    }
}

#[test]
fn writes_go_to_another_image_and_leave_nothing_behind() {
    let folder = Folder::new("");
    folder.raw("a.img", 4 * MIB, 7);
    folder.qemu_img(&["convert", "-O", "qcow2", "a.img", "a.qcow2"]);
    let names = folder.names();
    for name in ["a.img", "a.qcow2"] {
        let before = folder.read(name);
        let said = bench(&folder, &[name, "--write", "--json", "--depth", "1,4"]);
        let report: Value = serde_json::from_str(&said).unwrap();
        let rows = report["rows"].as_array().unwrap();
        let what: Vec<_> = rows
            .iter()
            .map(|row| {
                (
                    row["what"].as_str().unwrap(),
                    row["depth"].as_u64().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            what,
            [
                ("random read", 1),
                ("random read", 4),
                ("sequential read", 8),
                ("random write, new", 4),
                ("random write", 1),
                ("random write", 4),
                ("sequential write", 8),
            ]
        );
        for row in rows {
            assert!(row["requests"].as_u64().unwrap() > 0, "{row}");
            assert!(row["iops"].as_f64().unwrap() > 0.0, "{row}");
            assert!(row["p50_us"].as_f64() <= row["p99_us"].as_f64(), "{row}");
            assert!(row["p99_us"].as_f64() <= row["max_us"].as_f64(), "{row}");
        }
        assert!(before == folder.read(name));
        assert_eq!(names, folder.names());
    }
}

#[test]
fn reads_go_to_where_there_is_data() {
    let folder = Folder::new("");
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1G"]);
    let said = bench(&folder, &["a.qcow2"]);
    assert!(said.contains(", 1GiB, 0 bytes of it data)"), "{said}");
    assert!(said.contains("\nthere is no data on it: "), "{said}");
    folder.qemu_io("a.qcow2", &["write -P 1 512M 128k"]);
    let said = bench(&folder, &["a.qcow2", "--json"]);
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["data"], 128 * KIB);
}

#[test]
fn a_disk_of_a_vm_is_opened_as_its_file_says() {
    let folder = Folder::new(
        "[[block]]\npath = \"top.qcow2\"\nbacking = \"base.img\"\nid = \"ROOT\"\no_direct = true\n",
    );
    folder.raw("base.img", MIB, 7);
    let make = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        "base.img",
        "top.qcow2",
    ];
    folder.qemu_img(&make);
    let said = bench(&folder, &["vm.toml", "ROOT", "--write"]);
    assert!(said.contains(", past the page cache, "), "{said}");
    assert!(said.contains("\nrandom write, new "), "{said}");
    assert_eq!(said.lines().count(), 11, "{said}");
}

#[test]
fn an_image_that_somebody_writes_to_is_refused() {
    let folder = Folder::new("");
    folder.raw("a.img", MIB, 7);
    let held = folder.hold("a.img");
    let (code, said) = refused(&folder, &["a.img"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("a.img"), "{said}");
    drop(held);
    bench(&folder, &["a.img"]);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let folder = Folder::new("");
    folder.raw("a.img", MIB, 7);
    folder.raw("small.img", 2048, 7);
    for (arguments, expected) in [
        (&["a.img", "--size", "3KiB"][..], "a power of two"),
        (&["a.img", "--size", "2MiB"], "a power of two"),
        (&["a.img", "--depth", "0"], "1..=1024"),
        (&["a.img", "--depth", "1,2000"], "1..=1024"),
        (
            &["a.img", "--depth", "1024", "--size", "1MiB"],
            "at most 256MiB in flight",
        ),
        (&["a.img", "--seconds", "0"], "0.01 to 3600"),
        (&["a.img", "--format", "vmdk"], "vmdk"),
        (
            &["small.img"],
            "expected at most the size of `small.img`, 2KiB",
        ),
        (&["vm.toml"], "launcher disk bench vm.toml 0"),
        (&["vm.toml", "0", "--format", "raw"], "--format"),
    ] {
        let (code, said) = refused(&folder, arguments);
        assert_eq!(code, 2, "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}
