//! `launcher disk resize`.

use std::os::unix::fs::symlink;
use std::process::Command;

use super::{Done, Folder, KIB, MIB, run};

const RAW: &str = "[[block]]\npath = \"a.img\"\n";
const QCOW2: &str = "[[block]]\npath = \"a.qcow2\"\n";

/// Resizes disk 0, which is refused with this exit code; the image stays as it was.
fn refused(folder: &Folder, image: &str, arguments: &[&str], code: i32) -> String {
    let before = folder.read(image);
    let done = folder.launcher(&[&["disk", "resize", "vm.toml"], arguments].concat());
    assert_eq!(
        (done.code, &*done.out),
        (code, ""),
        "{arguments:?}: {done:?}"
    );
    assert!(done.err.starts_with("error: "), "{done:?}");
    assert!(
        folder.read(image) == before,
        "{arguments:?} changed {image}"
    );
    done.err
}

#[test]
fn a_raw_image_grows_to_a_size_and_by_one_and_keeps_its_content() {
    let folder = Folder::new(RAW);
    folder.raw("a.img", MIB, 7);
    let said = folder.launcher_does(&["disk", "resize", "vm.toml", "0", "2MiB"]);
    assert_eq!(said, "disk 0 has grown from 1MiB to 2MiB\n");
    folder.launcher_does(&["disk", "resize", "vm.toml", "0", "+512"]);
    assert_eq!(folder.len("a.img"), 2 * MIB + 512);
    folder.launcher_does(&["disk", "resize", "vm.toml", "0", &(4 * MIB).to_string()]);
    assert_eq!(folder.len("a.img"), 4 * MIB);
    folder.qemu_io("a.img", &["read -P 7 0 1M", "read -P 0 1M 3M"]);
    assert!(folder.allocated("a.img") < 2 * MIB);
}

#[test]
fn an_image_that_is_not_sparse_stays_fully_allocated() {
    let folder = Folder::new(
        "[[block]]\npath = \"a.img\"\nsparse = false\n[[block]]\npath = \"a.qcow2\"\nsparse = false\n",
    );
    folder.raw("a.img", MIB, 7);
    folder.launcher_does(&["disk", "resize", "vm.toml", "0", "8MiB"]);
    assert!(folder.allocated("a.img") >= 8 * MIB);
    folder.qemu_io("a.img", &["read -P 7 0 1M", "read -P 0 1M 7M"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    folder.launcher_does(&["disk", "resize", "vm.toml", "1", "8MiB"]);
    assert!(folder.allocated("a.qcow2") >= 8 * MIB);
    folder.qemu_img(&["check", "-q", "a.qcow2"]);
    let map = folder.qemu_img(&["map", "--output=json", "a.qcow2"]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let ranges = map.as_array().unwrap();
    assert!(ranges.iter().all(|range| range["offset"].is_u64()), "{map}");
}

#[test]
fn a_qcow2_image_grows() {
    let folder = Folder::new(QCOW2);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "64M"]);
    folder.qemu_io("a.qcow2", &["write -P 7 1M 3M"]);
    folder.launcher_does(&["disk", "resize", "vm.toml", "0", "20GiB"]);
    assert_eq!(folder.size("a.qcow2"), 20 << 30);
    folder.qemu_img(&["check", "-q", "a.qcow2"]);
    folder.qemu_io(
        "a.qcow2",
        &["read -P 7 1M 3M", "read -P 0 64M 64M", "write -P 8 19G 1M"],
    );
}

#[test]
fn new_space_of_an_overlay_does_not_show_a_longer_backing_file() {
    let folder = Folder::new("[[block]]\npath = \"a.qcow2\"\nbacking = \"base.img\"\n");
    folder.raw("base.img", 8 * MIB, 9);
    folder.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2", "2M",
    ]);
    folder.launcher_does(&["disk", "resize", "vm.toml", "0", "+10MiB"]);
    folder.qemu_img(&["check", "-q", "a.qcow2"]);
    folder.qemu_io("a.qcow2", &["read -P 9 0 2M", "read -P 0 2M 10M"]);
    assert_eq!(folder.len("base.img"), 8 * MIB);
}

#[test]
fn a_smaller_size_needs_shrink() {
    let folder = Folder::new(RAW);
    folder.raw("a.img", 2 * MIB, 7);
    let err = refused(&folder, "a.img", &["0", "1MiB"], 2);
    assert_eq!(
        err,
        "error: disk 0 (`a.img`) has 2MiB: with 1MiB, its last 1MiB would be lost\nhelp: shrink the \
         partitions and file systems in it first, then add `--shrink`\n"
    );
    let said = folder.launcher_does(&["disk", "resize", "vm.toml", "0", "1MiB", "--shrink"]);
    assert!(
        said.ends_with("has shrunk from 2MiB to 1MiB: its last 1MiB are lost\n"),
        "{said}"
    );
    assert_eq!(folder.read("a.img"), vec![7; MIB as usize]);
}

#[test]
fn a_qcow2_image_shrinks_and_grows_again_without_its_old_content() {
    let folder = Folder::new(QCOW2);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]);
    folder.qemu_io("a.qcow2", &["write -P 7 0 8M"]);
    refused(&folder, "a.qcow2", &["0", "4MiB"], 2);
    folder.launcher_does(&["disk", "resize", "vm.toml", "0", "4MiB", "--shrink"]);
    assert_eq!(folder.size("a.qcow2"), 4 * MIB);
    folder.qemu_img(&["check", "-q", "a.qcow2"]);
    folder.launcher_does(&["disk", "resize", "vm.toml", "0", "8MiB"]);
    folder.qemu_img(&["check", "-q", "a.qcow2"]);
    folder.qemu_io("a.qcow2", &["read -P 7 0 4M", "read -P 0 4M 4M"]);
}

#[test]
fn the_size_that_it_has_changes_nothing() {
    let folder = Folder::new(RAW);
    folder.raw("a.img", MIB, 7);
    let said = folder.launcher_does(&["disk", "resize", "vm.toml", "0", "1MiB"]);
    assert!(said.ends_with("has 1MiB already\n"), "{said}");
    folder.launcher_does(&["disk", "resize", "vm.toml", "0", "+0"]);
    assert_eq!(folder.read("a.img"), vec![7; MIB as usize]);
}

#[test]
fn a_disk_is_named_by_index_or_id_and_another_is_refused() {
    let folder = Folder::new("[[block]]\npath = \"a.img\"\nid = \"ROOT\"\n");
    folder.raw("a.img", MIB, 7);
    folder.launcher_does(&["disk", "resize", "vm.toml", "ROOT", "2MiB"]);
    assert_eq!(folder.len("a.img"), 2 * MIB);
    for wrong in ["1", "root", "18446744073709551616"] {
        let err = refused(&folder, "a.img", &[wrong, "4MiB"], 2);
        assert!(err.contains(&format!("has no disk {wrong:?}")), "{err}");
        assert!(
            err.contains("its disks are 0 to 0; the ids are ROOT"),
            "{err}"
        );
    }
}

#[test]
fn a_wrong_size_is_refused_with_what_is_right() {
    let folder = Folder::new("[[block]]\npath = \"a.img\"\nblock_size = 4096\n");
    folder.raw("a.img", MIB, 7);
    for (size, said) in [
        ("2gb", "help: write \"2GiB\""),
        ("-1GiB", "unexpected argument"),
        ("", "the size is \"\""),
        ("1049088", "expected a multiple of 4096"),
        ("0", "and not 0"),
        ("16777215TiB", "past 2^63 bytes"),
        ("+16777215TiB", "past 2^63 bytes"),
    ] {
        let err = refused(&folder, "a.img", &["0", size], 2);
        assert!(err.contains(said), "{size}: {err}");
    }
    let err = refused(&folder, "a.img", &["0"], 2);
    assert!(
        err.contains("disk 0 (`a.img`) is no host block device: it needs a size"),
        "{err}"
    );
    let err = refused(&folder, "a.img", &["0", "1MiB", "--force"], 2);
    assert!(err.contains("--shrink"), "{err}");
}

#[test]
fn read_only_and_ephemeral_disks_keep_their_size() {
    for (key, said) in [("ro", "is read-only"), ("ephemeral", "is ephemeral")] {
        let folder = Folder::new(&format!("{RAW}{key} = true\n"));
        folder.raw("a.img", MIB, 7);
        let err = refused(&folder, "a.img", &["0", "2MiB"], 1);
        assert!(err.contains(said), "{err}");
    }
}

#[test]
fn an_image_in_use_or_absent_is_refused() {
    let folder = Folder::new(RAW);
    folder.raw("a.img", MIB, 7);
    let held = folder.hold("a.img");
    let err = refused(&folder, "a.img", &["0", "2MiB"], 1);
    assert!(err.contains("(`qemu-io`)"), "{err}");
    drop(held);
    folder.launcher_does(&["disk", "resize", "vm.toml", "0", "2MiB"]);
    std::fs::remove_file(folder.path("a.img")).unwrap();
    let done = folder.launcher(&["disk", "resize", "vm.toml", "0", "2MiB"]);
    assert_eq!(done.code, 2);
    assert!(done.err.contains("No such file or directory"), "{done:?}");
    assert_eq!(folder.names(), ["vm.toml"]);
}

#[test]
fn a_host_without_the_space_leaves_everything_as_it_was() {
    let folder = Folder::new(&format!("{RAW}sparse = false\n"));
    folder.raw("a.img", MIB, 7);
    let allocated = folder.allocated("a.img");
    let err = refused(&folder, "a.img", &["0", "1024TiB"], 1);
    assert!(
        err.contains("stays as it is") && err.contains("No space left on device"),
        "{err}"
    );
    assert_eq!(folder.allocated("a.img"), allocated);
}

#[test]
fn a_qcow2_image_without_the_space_has_its_disk_as_it_was() {
    let folder = Folder::new(&format!("{QCOW2}sparse = false\n"));
    let whole = "preallocation=full";
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-o", whole, "a.qcow2", "1M"]);
    folder.qemu_io("a.qcow2", &["write -P 7 0 1M"]);
    let done = folder.launcher(&["disk", "resize", "vm.toml", "0", "1024TiB"]);
    assert_eq!((done.code, &*done.out), (1, ""), "{done:?}");
    assert!(done.err.contains("No space left on device"), "{done:?}");
    assert_eq!(folder.size("a.qcow2"), MIB);
    assert!(folder.allocated("a.qcow2") < 64 * MIB);
    folder.qemu_img(&["check", "-q", "a.qcow2"]);
    folder.qemu_io("a.qcow2", &["read -P 7 0 1M"]);
}

/// As `refused`, with a limit of 16 MiB on the size of files.
fn refused_by_limit(folder: &Folder, image: &str, size: &str) -> String {
    let before = folder.read(image);
    let script = "ulimit -f 16384 && exec \"$0\" disk resize vm.toml 0 \"$1\"";
    let mut command = Command::new("bash");
    command.args(["-c", script, env!("CARGO_BIN_EXE_launcher"), size]);
    let Done { code, out, err } = run(&mut command, folder.folder.path());
    assert_eq!((code, &*out), (1, ""), "{err}");
    assert!(folder.read(image) == before, "{image} has changed: {err}");
    err
}

#[test]
fn the_limit_of_a_file_s_size_is_an_error_and_changes_nothing() {
    for sparse in ["true", "false"] {
        let folder = Folder::new(&format!("{RAW}sparse = {sparse}\n"));
        folder.raw("a.img", MIB, 7);
        let err = refused_by_limit(&folder, "a.img", "32MiB");
        assert!(
            err.contains("File too large") && err.contains("ulimit -f"),
            "{err}"
        );
        assert_eq!(folder.len("a.img"), MIB);
    }
}

const COMMENTED: &str = "# the disk\n[[block]]\npath = \"a.img\"  # beside this file\nsize = \
                         \"1MiB\" # grown in May\nid = \"ROOT\"\n# the end\n";

#[test]
fn save_writes_the_size_into_the_file_and_keeps_its_comments() {
    let folder = Folder::new(COMMENTED);
    folder.raw("a.img", MIB, 7);
    let before = folder.text("vm.toml");
    folder.launcher_does(&["disk", "resize", "vm.toml", "ROOT", "+1MiB", "--save"]);
    assert_eq!(
        folder.text("vm.toml"),
        before.replace("\"1MiB\"", "\"2MiB\"")
    );
    assert_eq!(folder.names(), ["a.img", "vm.toml"]);
}

#[test]
fn save_writes_through_a_link() {
    let folder = Folder::new(COMMENTED);
    folder.raw("a.img", MIB, 7);
    symlink("vm.toml", folder.path("link.toml")).unwrap();
    folder.launcher_does(&["disk", "resize", "link.toml", "0", "2MiB", "--save"]);
    assert!(folder.path("link.toml").is_symlink());
    assert!(
        folder
            .text("vm.toml")
            .contains("size = \"2MiB\" # grown in May")
    );
}

#[test]
fn a_refused_size_is_not_saved() {
    let folder = Folder::new(COMMENTED);
    folder.raw("a.img", MIB, 7);
    let before = folder.text("vm.toml");
    refused(&folder, "a.img", &["0", "512KiB", "--save"], 2);
    assert_eq!(folder.text("vm.toml"), before);
}

#[test]
fn without_save_it_says_what_the_next_start_does() {
    let folder = Folder::new(COMMENTED);
    folder.raw("a.img", MIB, 7);
    for (size, said) in [
        (
            "2MiB",
            "the `size` of disk 0 in vm.toml is 1MiB: the next `launcher up` refuses the larger image",
        ),
        ("512KiB", "the next `launcher up` makes it so large again"),
    ] {
        let done = folder.launcher(&["disk", "resize", "vm.toml", "0", size, "--shrink"]);
        assert_eq!(done.code, 0);
        assert!(
            done.err.starts_with("note: ") && done.err.contains(said),
            "{done:?}"
        );
    }
    assert_eq!(folder.len("a.img"), 512 * KIB);
}
