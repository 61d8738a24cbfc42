//! Backing files: what names them, and what cannot be one.

use super::blocks::{disks, format};
use super::messages::said;
use super::*;

#[test]
fn a_backing_file_is_one_path_or_a_chain_of_them_in_order() {
    let backing = |value: &str| {
        let text = format!("[[block]]\npath = 'a.qcow2'\nbacking = {value}");
        disks(&text).remove(0).image().backing
    };
    assert_eq!(backing("'base.img'"), [Path::new("vms/base.img")]);
    assert_eq!(backing("'~/base.img'"), [Path::new("/home/ada/base.img")]);
    assert_eq!(
        backing("['b.qcow2', '../c.img', '/d']"),
        [
            Path::new("vms/b.qcow2"),
            Path::new("vms/../c.img"),
            Path::new("/d")
        ]
    );
    assert!(backing("[]").is_empty());
}

#[test]
fn many_disks_may_share_a_backing_file_that_no_disk_writes() {
    let overlay = |name| format!("[[block]]\npath = '{name}.qcow2'\nbacking = 'base.img'\n");
    let overlays = overlay("a") + &overlay("b");
    for reader in ["", "ro = true", "ephemeral = true"] {
        let base = match reader {
            "" => String::new(),
            _ => format!("[[block]]\npath = 'base.img'\n{reader}"),
        };
        let disks = disks(&(overlays.clone() + &base));
        assert_eq!(disks[0].image().backing, disks[1].image().backing);
    }
}

#[test]
fn an_empty_list_of_backing_files_suits_every_format() {
    assert_eq!(format("path = 'a.img'\nbacking = []"), "sparse-raw");
}

#[test]
fn a_backing_file_of_a_wrong_kind_is_shown_where_it_is() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.qcow2'\nbacking = true\n[[block]]\n\
         path = 'b.qcow2'\nbacking = ''\n[[block]]\npath = 'c.qcow2'\nbacking = [\n    'd.img',\n    \
         7,\n    '',\n    ['e.img'],\n]\n",
        r#"
error: `backing` is true, expected a path, a table with `path` or `url`, or an array of them
 --> vms/vm.toml:4:11
  |
4 | backing = true
  |           ^^^^

error: `backing` is '', expected a path, a table with `path` or `url`, or an array of them
 --> vms/vm.toml:7:11
  |
7 | backing = ''
  |           ^^

error: `backing[1]` is 7, expected a path, or a table with `path` or `url`
  --> vms/vm.toml:12:5
   |
12 |     7,
   |     ^

error: `backing[2]` is '', expected a path, or a table with `path` or `url`
  --> vms/vm.toml:13:5
   |
13 |     '',
   |     ^^

error: `backing[3]` is an array, expected a path, or a table with `path` or `url`
  --> vms/vm.toml:14:5
   |
14 |     ['e.img'],
   |     ^^^^^^^^^
"#,
    );
}

#[test]
fn a_backing_file_of_a_format_that_has_none_is_shown_with_the_format() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\nbacking = 'b.img'\n[[block]]\n\
         path = 'c'\nformat = 'raw'\nsparse = false\nbacking = ['d.img']\n",
        r#"
error: `backing` is given, but format `raw` has no backing files
 --> vms/vm.toml:4:11
  |
3 | path = 'a.img'
  |        ------- the format follows from this
4 | backing = 'b.img'
  |           ^^^^^^^
  |
  = help: remove it, or write `format = "qcow2"` for an overlay

error: `backing` is given, but format `raw` has no backing files
 --> vms/vm.toml:9:11
  |
7 | format = 'raw'
  |          ----- the format follows from this
8 | sparse = false
9 | backing = ['d.img']
  |           ^^^^^^^^^
  |
  = help: remove it, or write `format = "qcow2"` for an overlay
"#,
    );
}

#[test]
fn a_chain_that_comes_back_to_a_file_is_shown_with_the_first_place() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.qcow2'\nbacking = './a.qcow2'\n[[block]]\n\
         path = 'b.qcow2'\nbacking = ['c.img', 'd.img', 'c.img']\n",
        r#"
error: `backing` is vms/./a.qcow2, the disk's own `path`, expected another file
 --> vms/vm.toml:4:11
  |
3 | path = 'a.qcow2'
  |        --------- the image over it
4 | backing = './a.qcow2'
  |           ^^^^^^^^^^^

error: `backing` has vms/c.img twice, expected it once
 --> vms/vm.toml:7:30
  |
7 | backing = ['c.img', 'd.img', 'c.img']
  |            -------           ^^^^^^^
  |            |
  |            first here
"#,
    );
}

#[test]
fn a_backing_file_that_another_disk_writes_is_shown_with_that_disk() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.qcow2'\nbacking = ['b.qcow2', 'c.img']\n\
         [[block]]\npath = 'c.img'\n",
        r#"
error: `backing` is vms/c.img, which another disk writes, expected a file that never changes
 --> vms/vm.toml:4:23
  |
4 | backing = ['b.qcow2', 'c.img']
  |                       ^^^^^^^
5 | [[block]]
6 | path = 'c.img'
  |        ------- written here
  |
  = help: add `ro = true` to that disk, or make it an overlay of its own
"#,
    );
}
