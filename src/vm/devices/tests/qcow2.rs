//! Disks on qcow2 images: the files that an image refers to, and the format's own options.

use super::*;

/// Runs `qemu-img` in the folder.
fn qemu_img(folder: &Folder, arguments: &[&str]) {
    let status = Command::new("qemu-img")
        .args(arguments)
        .current_dir(folder.0.path())
        .status();
    assert!(
        status
            .expect("qemu-img (package qemu-utils) is needed")
            .success(),
        "qemu-img {arguments:?}"
    );
}

/// With `c.qcow2`, an overlay of 1 MiB over `a.img`, and `d.qcow2`, whose data is in `d.data`.
fn folder() -> Folder {
    let folder = Folder::new();
    let overlay = [
        "create", "-q", "-f", "qcow2", "-b", "a.img", "-F", "raw", "c.qcow2",
    ];
    qemu_img(&folder, &overlay);
    let external = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=d.data",
        "d.qcow2",
        "1M",
    ];
    qemu_img(&folder, &external);
    folder
}

#[test]
fn a_backing_file_that_is_not_named_is_shown_with_the_line_to_add() {
    said(
        folder().refused("[[block]]\npath = 'c.qcow2'\n"),
        exit::USAGE,
        r#"
error: `c.qcow2` has the backing file `a.img`, which the configuration does not name
 --> vm.toml:3:8
  |
3 | path = 'c.qcow2'
  |        ^^^^^^^^^
  |
  = help: add `backing = "a.img"` if that is right; after others of its chain, in order
"#,
    );
}

#[test]
fn a_backing_file_that_is_not_the_image_s_is_shown_where_it_is_named() {
    said(
        folder().refused("[[block]]\npath = 'c.qcow2'\nbacking = 'b.img'\n"),
        exit::USAGE,
        r#"
error: `backing` is `b.img`, but `c.qcow2` is based on `a.img`
 --> vm.toml:4:11
  |
4 | backing = 'b.img'
  |           ^^^^^^^
  |
  = help: if the backing file has moved, tell the image: `qemu-img rebase -u -b b.img -F raw c.qcow2`
"#,
    );
    said(folder().refused("[[block]]\npath = 'd.qcow2'\nbacking = ['b.img']\n[block.qcow2]\ndata_file = 'd.data'\n"), exit::USAGE, r#"
error: `backing` names `b.img`, but `d.qcow2` has no backing file
 --> vm.toml:4:11
  |
4 | backing = ['b.img']
  |           ^^^^^^^^^
  |
  = help: take it out of `backing`
"#);
}

#[test]
fn a_backing_file_of_a_new_image_that_is_missing_is_shown_where_it_is_named() {
    let folder = folder();
    said(
        folder.refused("[[block]]\npath = 'e.qcow2'\nsize = '1MiB'\nbacking = 'n.img'\n"),
        exit::USAGE,
        r#"
error: cannot open `n.img`: No such file or directory
 --> vm.toml:5:11
  |
5 | backing = 'n.img'
  |           ^^^^^^^
"#,
    );
    assert!(!folder.path("e.qcow2").exists());
}

#[test]
fn a_data_file_that_is_not_named_is_shown_with_the_line_to_add() {
    said(
        folder().refused("[[block]]\npath = 'd.qcow2'\n"),
        exit::USAGE,
        r#"
error: `d.qcow2` has the data file `d.data`, which the configuration does not name
 --> vm.toml:3:8
  |
3 | path = 'd.qcow2'
  |        ^^^^^^^^^
  |
  = help: add `data_file = "d.data"` to `[block.qcow2]` if that is right
"#,
    );
}

#[test]
fn a_data_file_that_is_not_the_image_s_is_shown_where_it_is_named() {
    said(
        folder().refused("[[block]]\npath = 'd.qcow2'\n[block.qcow2]\ndata_file = 'b.img'\n"),
        exit::USAGE,
        r#"
error: `data_file` is `b.img`, but the data file of `d.qcow2` is `d.data`
 --> vm.toml:5:13
  |
5 | data_file = 'b.img'
  |             ^^^^^^^
  |
  = help: name that one
"#,
    );
}

#[test]
fn a_wrong_option_of_the_format_is_shown_in_the_format_s_table() {
    said(folder().refused("[[block]]\npath = 'e.qcow2'\nsize = '1MiB'\n[block.qcow2]\nversion = 3\ncluster_size = 1000\n"), exit::USAGE, r#"
error: `cluster_size` is 1000, expected a power of two, 512 to 2MiB
 --> vm.toml:7:16
  |
7 | cluster_size = 1000
  |                ^^^^
"#);
    said(
        folder().refused("[[block]]\npath = 'e.qcow2'\nsize = '1MiB'\nqcow2.refcount_bits = 5\n"),
        exit::USAGE,
        r#"
error: `refcount_bits` is 5, expected a power of two, 1 to 64
 --> vm.toml:5:23
  |
5 | qcow2.refcount_bits = 5
  |                       ^
"#,
    );
}

/// Each name is relative to the file that has it: in the VM's file to that, in the image to the image.
#[test]
fn an_overlay_in_another_folder_finds_its_chain() {
    let folder = folder();
    fs::create_dir(folder.path("disks")).unwrap();
    let disk = "[[block]]\npath = 'disks/e.qcow2'\nsize = '2MiB'\nbacking = ['c.qcow2', 'a.img']\n";
    for _ in 0..2 {
        folder.open(disk).unwrap().close().unwrap();
    }
    qemu_img(&folder, &["check", "-q", "disks/e.qcow2"]);
    // QEMU follows the same names.
    qemu_img(
        &folder,
        &[
            "compare",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "disks/e.qcow2",
            "a.img",
        ],
    );
    let (code, errors) = folder.refused(&disk.replace(", 'a.img'", ""));
    assert_eq!(code, exit::USAGE);
    assert!(errors.contains(" --> vm.toml:5:11\n"), "{errors}");
}
