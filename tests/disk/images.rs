//! `launcher disk create`, `list`, `info` and `check`.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use super::{Folder, KIB, MIB};

fn json(folder: &Folder, arguments: &[&str]) -> Value {
    serde_json::from_str(&folder.launcher_does(arguments)).unwrap()
}

#[test]
fn create_makes_an_image_of_the_format_that_its_name_tells() {
    let folder = Folder::new("");
    let said = folder.launcher_does(&["disk", "create", "a.img", "8MiB"]);
    assert_eq!(said, "created a.img (sparse-raw, 8MiB)\n");
    assert_eq!(
        (folder.len("a.img"), folder.allocated("a.img")),
        (8 * MIB, 0)
    );
    let options = [
        "-o",
        "cluster_size=128KiB,extended_l2=on",
        "-o",
        "version=3",
    ];
    folder.launcher_does(&[&["disk", "create", "a.qcow2", "1TiB"][..], &options].concat());
    let info = folder.info("a.qcow2");
    assert_eq!(info["virtual-size"], 1u64 << 40);
    assert_eq!(info["cluster-size"], 128 * KIB);
    assert_eq!(info["format-specific"]["data"]["extended-l2"], true);
    folder.launcher_does(&["disk", "create", "b", "1MiB", "-f", "qcow2"]);
    assert_eq!(folder.info("b")["format"], "qcow2");
}

#[test]
fn create_allocates_what_is_not_to_be_thin() {
    let folder = Folder::new("");
    let said = folder.launcher_does(&["disk", "create", "a.img", "8MiB", "--allocate"]);
    assert_eq!(said, "created a.img (raw, 8MiB)\n");
    assert_eq!(folder.len("a.img"), 8 * MIB);
    assert!(folder.allocated("a.img") >= 8 * MIB);
    folder.launcher_does(&["disk", "create", "a.qcow2", "8MiB", "--allocate"]);
    assert!(folder.allocated("a.qcow2") >= 8 * MIB);
    folder.qemu_img(&["check", "-q", "a.qcow2"]);
}

#[test]
fn create_makes_an_overlay_as_large_as_its_backing_file() {
    let folder = Folder::new("");
    folder.raw("base.raw", 3 * MIB, 9);
    folder.launcher_does(&["disk", "create", "a.qcow2", "--backing", "base.raw"]);
    let info = folder.info("a.qcow2");
    assert_eq!(info["virtual-size"], 3 * MIB);
    assert_eq!(info["backing-filename"], "base.raw");
    assert_eq!(info["backing-filename-format"], "raw");
    folder.qemu_io("a.qcow2", &["read -P 9 0 3M"]);
}

#[test]
fn create_overwrites_nothing_and_leaves_nothing_half_made() {
    let folder = Folder::new("");
    folder.raw("a.img", MIB, 7);
    let done = folder.launcher(&["disk", "create", "a.img", "8MiB"]);
    assert_eq!(done.code, 2);
    assert!(done.err.contains("File exists"), "{done:?}");
    assert_eq!(folder.read("a.img"), vec![7; MIB as usize]);
    for arguments in [
        &["b.img", "0"][..],
        &["b.img", "1gb"],
        &["b.img", "1000"],
        &["b.img"],
        &["b.img", "1MiB", "-o", "cluster_size=1"],
        &["b.img", "1MiB", "--backing", "a.img"],
        &["b.qcow2", "1MiB", "-o", "cluster_size=1"],
        &["b.qcow2", "1MiB", "-o", "nonsense=1"],
        &["b.qcow2", "--backing", "missing.raw"],
        &["b.xyz", "1MiB"],
        &["b.img", "1MiB", "--format", "nonsense"],
    ] {
        let done = folder.launcher(&[&["disk", "create"], arguments].concat());
        assert_eq!((done.code, &*done.out), (2, ""), "{arguments:?}: {done:?}");
        assert_eq!(folder.names(), ["a.img", "vm.toml"], "{arguments:?}");
    }
}

const DISKS: &str = "[[block]]\npath = \"a.img\"\nroot = true\nid = \"ROOT\"\n[[block]]\npath = \
                     \"b.qcow2\"\nro = true\n[[block]]\npath = \"c.img\"\n";

#[test]
fn list_shows_every_disk_and_what_is_wrong_with_one() {
    let folder = Folder::new(DISKS);
    folder.raw("a.img", MIB, 7);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "b.qcow2", "20G"]);
    let list = json(&folder, &["disk", "list", "vm.toml", "--json"]);
    assert_eq!(list[0]["id"], "ROOT");
    assert_eq!(list[0]["size"], MIB);
    assert_eq!(list[0]["host_size"], folder.allocated("a.img"));
    assert_eq!(list[1]["size"], 20u64 << 30);
    assert_eq!(list[1]["format"], "qcow2");
    assert_eq!(list[1]["ro"], true);
    assert_eq!(list[2]["size"], Value::Null);
    assert!(list[2]["error"].as_str().unwrap().contains("No such file"));
    let text = folder.launcher_does(&["disk", "list"]);
    assert_eq!(text.lines().count(), 4);
    assert!(text.starts_with("DISK  ID    FORMAT"), "{text}");
}

#[test]
fn info_says_what_qemu_img_says() {
    let folder = Folder::new("[[block]]\npath = \"a.qcow2\"\nbacking = \"base.img\"\n");
    folder.raw("base.img", 2 * MIB, 9);
    folder.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compression_type=zstd,lazy_refcounts=on",
        "-b",
        "base.img",
        "-F",
        "raw",
        "a.qcow2",
        "64M",
    ]);
    folder.qemu_io("a.qcow2", &["write -P 1 0 1M", "write -P 2 32M 1M"]);
    folder.qemu_img(&["snapshot", "-c", "before", "a.qcow2"]);
    let info = json(&folder, &["disk", "info", "vm.toml", "0", "--json"]);
    let theirs = folder.info("a.qcow2");
    assert_eq!(info["size"], theirs["virtual-size"]);
    assert_eq!(info["host_size"], theirs["actual-size"]);
    let qcow2 = &info["qcow2"];
    assert_eq!(qcow2["cluster_size"], theirs["cluster-size"]);
    assert_eq!(qcow2["compression_type"], "zstd");
    assert_eq!(qcow2["features"][0], "lazy-refcounts");
    assert_eq!(qcow2["backing_file"], "base.img");
    assert_eq!(qcow2["snapshots"][0]["name"], "before");
    assert_eq!(qcow2["snapshots"][0]["id"], theirs["snapshots"][0]["id"]);
    assert_eq!(
        qcow2["snapshots"][0]["date"],
        theirs["snapshots"][0]["date-sec"]
    );
    assert_eq!(info["backing"][0]["size"], 2 * MIB);
    let check = folder.qemu_img(&["check", "--output=json", "a.qcow2"]);
    let check: Value = serde_json::from_str(&check).unwrap();
    assert_eq!(
        info["allocation"]["allocated_clusters"],
        check["allocated-clusters"]
    );
    assert_eq!(
        info["allocation"]["total_clusters"],
        check["total-clusters"]
    );
    assert_eq!(info["allocation"]["clean"], true);
    let text = folder.launcher_does(&["disk", "info", "vm.toml", "0"]);
    for line in [
        "compression   zstd",
        "backing file  base.img (format: raw)",
        "SNAPSHOT ID  NAME",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn info_of_a_path_needs_no_vm_and_opens_no_other_file() {
    let folder = Folder::new("");
    folder.qemu_img(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "/no/such/base",
        "-F",
        "raw",
        "a.qcow2",
        "1M",
    ]);
    let info = json(&folder, &["disk", "info", "--path", "a.qcow2", "--json"]);
    assert_eq!(info["qcow2"]["backing_file"], "/no/such/base");
    assert_eq!(info["backing"], Value::Array(Vec::new()));
    folder.raw("b", MIB, 7);
    let info = json(
        &folder,
        &["disk", "info", "--path", "b", "--format", "raw", "--json"],
    );
    assert_eq!(info["size"], MIB);
    let done = folder.launcher(&["disk", "info", "--path", "b"]);
    assert_eq!(done.code, 2);
    assert!(done.err.contains("add `--format`"), "{done:?}");
}

#[test]
fn info_and_check_want_a_disk_or_a_path() {
    let folder = Folder::new(DISKS);
    for command in ["info", "check"] {
        for arguments in [&[][..], &["vm.toml"], &["vm.toml", "0", "--path", "a.img"]] {
            let done = folder.launcher(&[&["disk", command], arguments].concat());
            assert_eq!((done.code, &*done.out), (2, ""), "{arguments:?}: {done:?}");
        }
    }
}

#[test]
fn what_is_no_image_is_an_error_and_no_wait() {
    let folder = Folder::new("");
    folder.write("a.qcow2", "no image");
    let done = folder.launcher(&["disk", "info", "--path", "a.qcow2"]);
    assert_eq!(done.code, 1);
    assert!(
        done.err.contains("`a.qcow2` is no usable qcow2 image"),
        "{done:?}"
    );
    let fifo = folder.path("fifo.img");
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
    )
    .unwrap();
    for path in ["fifo.img", "/dev/null"] {
        let done = folder.launcher(&["disk", "info", "--format", "raw", "--path", path]);
        assert_eq!(done.code, 1, "{done:?}");
        assert!(
            done.err.contains("is no file and no block device"),
            "{done:?}"
        );
    }
}

#[test]
fn check_finds_a_leak_and_repair_frees_it() {
    let folder = Folder::new("[[block]]\npath = \"a.qcow2\"\n");
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "16M"]);
    folder.qemu_io("a.qcow2", &["write -P 1 0 1M"]);
    let said = folder.launcher_does(&["disk", "check", "vm.toml", "0"]);
    assert!(
        said.starts_with("no errors\n16 of 256 clusters allocated"),
        "{said}"
    );
    // The refcount of a cluster that nothing uses: clusters of 64 KiB, refcounts of 16 bits.
    let file = File::options()
        .read(true)
        .write(true)
        .open(folder.path("a.qcow2"))
        .unwrap();
    let mut offset = [0; 8];
    file.read_exact_at(&mut offset, 48).unwrap();
    let table = u64::from_be_bytes(offset);
    file.read_exact_at(&mut offset, table).unwrap();
    let block = u64::from_be_bytes(offset);
    file.write_all_at(&[0, 1], block + 2 * 100).unwrap();
    file.set_len(101 << 16).unwrap();
    let before = folder.read("a.qcow2");
    let done = folder.launcher(&["disk", "check", "vm.toml", "0"]);
    assert_eq!((done.code, &*done.err), (1, ""), "{done:?}");
    assert!(done.out.contains("leak: "), "{done:?}");
    assert!(folder.read("a.qcow2") == before);
    let done = folder.launcher(&["disk", "check", "vm.toml", "0", "--json"]);
    assert_eq!((done.code, &*done.err), (1, ""), "{done:?}");
    let found: Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(
        (&found["leaks"], &found["clean"]),
        (&1.into(), &false.into())
    );
    assert_eq!(found["corruptions"], 0);
    assert_eq!(found["problems"][0]["kind"], "leak");
    assert_eq!(found["allocated_clusters"], 16);
    let said = folder.launcher_does(&["disk", "check", "vm.toml", "0", "--repair"]);
    assert!(
        said.contains("repaired: 0 corruptions, 1 leaked cluster\nno errors"),
        "{said}"
    );
    folder.qemu_img(&["check", "-q", "a.qcow2"]);
    folder.launcher_does(&["disk", "check", "--path", "a.qcow2"]);
}

#[test]
fn what_nothing_tells_the_use_of_or_is_read_only_is_checked_and_not_repaired() {
    for (key, said) in [
        ("ro = true", "which is not changed"),
        ("lock = false", "nothing tells whether a VM uses it"),
    ] {
        let folder = Folder::new(&format!("[[block]]\npath = \"a.qcow2\"\n{key}\n"));
        folder.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "16M"]);
        let check = ["disk", "check", "vm.toml", "0"];
        folder.launcher_does(&check);
        let done = folder.launcher(&[&check[..], &["--repair"]].concat());
        assert_eq!((done.code, &*done.out), (1, ""), "{done:?}");
        assert!(done.err.contains(said), "{done:?}");
        folder.launcher_does(&["disk", "check", "--path", "a.qcow2", "--repair"]);
    }
}

#[test]
fn an_image_that_another_program_writes_is_looked_at_but_neither_counted_nor_checked() {
    let folder = Folder::new("[[block]]\npath = \"a.qcow2\"\n");
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "16M"]);
    let held = folder.hold("a.qcow2");
    let info = json(&folder, &["disk", "info", "vm.toml", "0", "--json"]);
    assert_eq!(info["size"], 16 * MIB);
    assert_eq!(info["allocation"], Value::Null);
    let why = info["not_counted"].as_str().unwrap();
    assert!(why.contains("is being written by process"), "{why}");
    for arguments in [&["vm.toml", "0"][..], &["--path", "a.qcow2"]] {
        for repair in [&[][..], &["--repair"]] {
            let check = [&["disk", "check"], arguments, repair].concat();
            let done = folder.launcher(&check);
            assert_eq!((done.code, &*done.out), (1, ""), "{done:?}");
            assert!(done.err.contains("(`qemu-io`)"), "{done:?}");
        }
    }
    drop(held);
    folder.launcher_does(&["disk", "check", "vm.toml", "0"]);
}

#[test]
fn a_raw_image_has_nothing_to_check() {
    let folder = Folder::new(DISKS);
    folder.raw("a.img", MIB, 7);
    let done = folder.launcher(&["disk", "check", "vm.toml", "ROOT"]);
    assert_eq!(done.code, 1);
    assert!(done.err.contains("has no structure to check"), "{done:?}");
}
