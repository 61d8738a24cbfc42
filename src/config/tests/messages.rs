//! Messages as they are printed, letter by letter.

use super::*;

/// Checks what is said of a wrong file.
#[track_caller]
pub(super) fn said(text: &str, expected: &str) {
    let errors = errors(text);
    let expected = expected.trim_matches('\n');
    assert_eq!(
        errors, expected,
        "\n--- said\n{errors}\n--- expected\n{expected}\n---"
    );
}

#[test]
fn a_bad_value_has_its_place_and_a_caret() {
    said(
        "[boot]\nkernel = \"k\"\n\n[[block]]\npath = \"a.img\"\nblock_size = 1000\n",
        r#"
error: `block_size` is 1000, expected a power of two, 512 to 65536
 --> vms/vm.toml:6:14
  |
6 | block_size = 1000
  |              ^^^^
"#,
    );
}

#[test]
fn a_missing_key_names_the_table_that_needs_it() {
    said(
        "[boot]\ninitrd = 'i'\n[[block]]\nro = true\n",
        r#"
error: `kernel` is missing, `[boot]` needs it
 --> vms/vm.toml:1:1
  |
1 | [boot]
  | ^^^^^^
  |
  = help: add a line `kernel = "vmlinuz"`

error: `path` is missing, `[[block]]` needs it
 --> vms/vm.toml:3:1
  |
3 | [[block]]
  | ^^^^^^^^^
  |
  = help: add a line `path = "disk.img"`
"#,
    );
}

#[test]
fn a_missing_table_is_named_with_the_key_it_is_needed_for() {
    said(
        "cpus = 2\n",
        r#"
error: `kernel` is missing, `[boot]` needs it
--> vms/vm.toml
 = help: add a table `[boot]` with a line `kernel = "vmlinuz"`
"#,
    );
}

#[test]
fn a_key_in_kebab_case_is_asked_for_in_snake_case() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\no-direct = true\n",
        r#"
error: unknown key `o-direct` in `[[block]]`
 --> vms/vm.toml:4:1
  |
4 | o-direct = true
  | ^^^^^^^^
  |
  = help: did you mean `o_direct`?
"#,
    );
}

#[test]
fn a_misspelled_table_gets_the_nearest() {
    said(
        "[boot]\nkernel = 'k'\n[consol]\n",
        r#"
error: unknown key `consol` at the top of the file
 --> vms/vm.toml:3:2
  |
3 | [consol]
  |  ^^^^^^
  |
  = help: did you mean `[console]`?
"#,
    );
}

#[test]
fn a_key_below_a_wrong_table_is_told_where_it_belongs() {
    said(
        "[boot]\nkernel = 'k'\nmemory = '1GiB'\n[console]\nread_only = true\nroot = true\n",
        r#"
error: unknown key `memory` in `[boot]`
 --> vms/vm.toml:3:1
  |
3 | memory = '1GiB'
  | ^^^^^^
  |
  = help: `memory` belongs at the top of the file, above the first table

error: unknown key `read_only` in `[console]`
 --> vms/vm.toml:5:1
  |
5 | read_only = true
  | ^^^^^^^^^
  |
  = help: known here: mode, log, ready

error: unknown key `root` in `[console]`
 --> vms/vm.toml:6:1
  |
6 | root = true
  | ^^^^
  |
  = help: `root` belongs in `[[block]]`
"#,
    );
}

#[test]
fn every_error_is_reported_in_the_order_of_the_file() {
    let errors = errors(
        "cpus = 0\nmemory = '1MiB'\nname = '/'\n[boot]\nkernel = ''\nintrd = ''\n[[block]]\n\
         block_size = 1\npath = 'a'\n[lifecycle]\non_reboot = 'never'\n[console]\nmode = 1\n",
    );
    let places: Vec<_> = errors
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("--> vms/vm.toml:"))
        .collect();
    assert_eq!(
        places,
        [
            "1:8", "2:10", "3:8", "5:10", "6:1", "8:14", "9:8", "11:13", "13:8"
        ]
    );
}

#[test]
fn two_roots_are_shown_together() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\nroot = true\n[[block]]\npath = 'b.img'\n\
         root = true\n",
        r#"
error: `root` is true on two disks, expected one root file system
 --> vms/vm.toml:7:8
  |
4 | root = true
  |        ---- first here
...
7 | root = true
  |        ^^^^
"#,
    );
}

#[test]
fn two_writers_of_one_image_are_shown_together() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\n[[block]]\npath = 'a.img'\n",
        r#"
error: `path` is vms/a.img on two writable disks, expected one
 --> vms/vm.toml:5:8
  |
3 | path = 'a.img'
  |        ------- first here
4 | [[block]]
5 | path = 'a.img'
  |        ^^^^^^^
"#,
    );
}

#[test]
fn two_disks_of_one_id_are_shown_together() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\nid = 'A'\n[[block]]\npath = 'b.img'\n\
         id = 'A'\n",
        r#"
error: `id` is "A" on two disks, expected another on each
 --> vms/vm.toml:7:6
  |
4 | id = 'A'
  |      --- first here
...
7 | id = 'A'
  |      ^^^
"#,
    );
}

#[test]
fn a_contradiction_of_sparse_and_format_is_shown_with_both_lines() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a'\nformat = 'sparse-raw'\nsparse = false\n",
        r#"
error: `sparse` is false, but `format` is "sparse-raw", expected one of them
 --> vms/vm.toml:5:10
  |
4 | format = 'sparse-raw'
  |          ------------ this is the thin one
5 | sparse = false
  |          ^^^^^
  |
  = help: for a fully allocated image write `format = "raw"`
"#,
    );
}

#[test]
fn an_unknown_format_gets_the_list_and_the_nearest() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a'\nformat = 'qcow'\n",
        r#"
error: `format` is "qcow", expected "qcow2", "raw" or "sparse-raw"
 --> vms/vm.toml:4:10
  |
4 | format = 'qcow'
  |          ^^^^^^
  |
  = help: did you mean "qcow2"?
"#,
    );
}

#[test]
fn a_path_that_tells_no_format_says_which_line_to_add() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = '/dev/sdb'\n[[block]]\npath = 'a.vdi'\n",
        r#"
error: `path` has no extension that tells the format
 --> vms/vm.toml:3:8
  |
3 | path = '/dev/sdb'
  |        ^^^^^^^^^^
  |
  = help: add a line such as `format = "raw"`: "qcow2", "raw" or "sparse-raw"

error: `path` ends in ".vdi", the extension of no format
 --> vms/vm.toml:5:8
  |
5 | path = 'a.vdi'
  |        ^^^^^^^
  |
  = help: add a line `format = "..."` with "qcow2", "raw" or "sparse-raw"
"#,
    );
}

#[test]
fn a_table_of_another_format_says_whose_it_is() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\n[block.qcow2]\ncluster_size = 65536\n",
        r#"
error: `[block.qcow2]` has options of qcow2, but the disk is sparse-raw
 --> vms/vm.toml:4:1
  |
3 | path = 'a.img'
  |        ------- its format follows from this
4 | [block.qcow2]
  | ^^^^^^^^^^^^^
  |
  = help: remove the table, or write `format = "qcow2"`
"#,
    );
}

#[test]
fn a_size_that_is_no_whole_number_of_blocks_is_shown_with_the_block_size() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\nsize = 512\nblock_size = 4096\n",
        r#"
error: `size` is 512 bytes, expected a multiple of `block_size`
 --> vms/vm.toml:4:8
  |
4 | size = 512
  |        ^^^
5 | block_size = 4096
  |              ---- the block size
"#,
    );
}

#[test]
fn a_wrong_word_gets_the_nearest() {
    said(
        "boot.kernel = 'k'\nconsole.mode = 'studio'\n",
        r#"
error: `mode` is 'studio', expected "stdio" or "socket" or "off"
 --> vms/vm.toml:2:16
  |
2 | console.mode = 'studio'
  |                ^^^^^^^^
  |
  = help: did you mean "stdio"?
"#,
    );
}

#[test]
fn a_unit_that_is_near_is_told_how_to_write_it() {
    said(
        "memory = '4GB'\nlifecycle.stop_timeout = 30\nboot.kernel = 'k'\n",
        r#"
error: `memory` is '4GB', expected a size from 2MiB to 1TiB, a multiple of 4KiB
 --> vms/vm.toml:1:10
  |
1 | memory = '4GB'
  |          ^^^^^
  |
  = help: write "4GiB"

error: `stop_timeout` is 30, expected a time such as "500ms", "30s" or "2m", at most "1h"
 --> vms/vm.toml:2:26
  |
2 | lifecycle.stop_timeout = 30
  |                          ^^
  |
  = help: write "30s" for seconds
"#,
    );
}

#[test]
fn a_value_of_a_wrong_kind_says_what_is_expected() {
    said(
        "boot = 1\nblock = {}\nconsole = ['off']\ncpus = '2'\n",
        r#"
error: `boot` is 1, expected a table `[boot]`
 --> vms/vm.toml:1:8
  |
1 | boot = 1
  |        ^

error: `block` is a table, expected a list of tables, each headed `[[block]]`
 --> vms/vm.toml:2:9
  |
2 | block = {}
  |         ^^

error: `console` is an array, expected a table `[console]`
 --> vms/vm.toml:3:11
  |
3 | console = ['off']
  |           ^^^^^^^

error: `cpus` is '2', expected a whole number, 1 to 254
 --> vms/vm.toml:4:8
  |
4 | cpus = '2'
  |        ^^^
  |
  = help: numbers stand without quotes
"#,
    );
}

#[test]
fn a_key_given_twice_is_shown_with_the_first() {
    said(
        "cpus = 1\ncpus = 2\n[boot]\nkernel = 'k'\n[console]\n[boot]\ninitrd = 'i'\n",
        r#"
error: `cpus` is given twice
 --> vms/vm.toml:2:1
  |
1 | cpus = 1
  | ---- first given here
2 | cpus = 2
  | ^^^^

error: `boot` is given twice
 --> vms/vm.toml:6:2
  |
3 | [boot]
  |  ---- first given here
...
6 | [boot]
  |  ^^^^
"#,
    );
}

#[test]
fn a_text_without_quotes_is_told_of_them() {
    said(
        "[boot]\nkernel = vmlinuz\ninitrd =\n",
        r#"
error: this is no value
 --> vms/vm.toml:2:10
  |
2 | kernel = vmlinuz
  |          ^^^^^^^
  |
  = help: if it is a text, put it in quotes: "vmlinuz"

error: a value is missing
 --> vms/vm.toml:3:9
  |
3 | initrd =
  |         ^
"#,
    );
}

#[test]
fn errors_of_syntax_and_of_values_are_reported_in_one_run() {
    said(
        "cpus = 0\n[boot]\nkernel = 'k'\ncmdline = \"quiet\n[console]\nmod = 'off'\n",
        r#"
error: `cpus` is 0, expected a whole number, 1 to 254
 --> vms/vm.toml:1:8
  |
1 | cpus = 0
  |        ^

error: invalid basic string, expected `"`
 --> vms/vm.toml:4:17
  |
4 | cmdline = "quiet
  |                 ^

error: unknown key `mod` in `[console]`
 --> vms/vm.toml:6:1
  |
6 | mod = 'off'
  | ^^^
  |
  = help: did you mean `mode`?
"#,
    );
}

#[test]
fn a_line_that_is_no_key_hides_no_other_error() {
    said(
        "[boot]\nkernel 'k'\n[[block]]\n# a disk\npath = 1\n]\nrot = true\n",
        r#"
error: key with no value, expected `=`
 --> vms/vm.toml:2:8
  |
2 | kernel 'k'
  |        ^

error: `path` is 1, expected a path
 --> vms/vm.toml:5:8
  |
5 | path = 1
  |        ^

error: missing table open, expected `[`
 --> vms/vm.toml:6:1
  |
6 | ]
  | ^

error: unknown key `rot` in `[[block]]`
 --> vms/vm.toml:7:1
  |
7 | rot = true
  | ^^^
  |
  = help: did you mean `root`?
"#,
    );
}

#[test]
fn an_open_bracket_of_a_table_draws_no_tail_of_complaints() {
    said(
        "[boot\nkernel = 'k'\n[[block]]\npath = 'a.img'\nroot = 1\n",
        r#"
error: unclosed table, expected `]`
 --> vms/vm.toml:1:6
  |
1 | [boot
  |      ^
"#,
    );
}

#[test]
fn an_open_bracket_of_a_value_draws_no_tail_of_complaints() {
    said(
        "cpus = 0\nblock = [\ncpu = 1\nmemory = 1\n[boot]\nkernel = 'k'\n",
        r#"
error: `cpus` is 0, expected a whole number, 1 to 254
 --> vms/vm.toml:1:8
  |
1 | cpus = 0
  |        ^

error: this is no value
 --> vms/vm.toml:3:1
  |
3 | cpu = 1
  | ^^^
  |
  = help: is a bracket above left open?
"#,
    );
}

#[test]
fn colour_changes_no_letter() {
    let text = "cpus = 0\n";
    let colour = parse(text.as_bytes(), &source(), &Renderer::styled()).unwrap_err();
    assert!(colour.contains("\u{1b}["));
    let mut plain = String::new();
    let mut rest = colour.as_str();
    while let Some((text, escape)) = rest.split_once('\u{1b}') {
        plain.push_str(text);
        rest = escape.split_once('m').unwrap().1;
    }
    plain.push_str(rest);
    assert_eq!(plain, errors(text));
}

#[test]
fn an_ephemeral_disk_that_is_read_only_or_allocated_is_shown_with_both_lines() {
    said(
        "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\nro = true\nephemeral = true\n[[block]]\n\
         path = 'b.img'\nephemeral = true\nsparse = false\n",
        r#"
error: `ephemeral` is true on a disk with `ro = true`, expected one of them
 --> vms/vm.toml:5:13
  |
4 | ro = true
  |      ---- and this
5 | ephemeral = true
  |             ^^^^
  |
  = help: neither writes the image; remove `ro` if the guest is to write

error: `ephemeral` is true on a disk with `sparse = false`, expected one of them
 --> vms/vm.toml:8:13
  |
8 | ephemeral = true
  |             ^^^^
9 | sparse = false
  |          ----- and this
  |
  = help: nothing is allocated for an image that is never written; remove `sparse`
"#,
    );
}

#[test]
fn a_kernel_beside_a_disk_to_boot_from_is_shown_with_both_lines() {
    said(
        "[boot]\nfrom_block = 0\nkernel = 'k'\n[[block]]\npath = 'a.img'\n",
        r#"
error: `kernel` is given, and `from_block` too, expected one of them
 --> vms/vm.toml:3:10
  |
2 | from_block = 0
  |              - the disk that has both
3 | kernel = 'k'
  |          ^^^
  |
  = help: remove `from_block` to boot files of the host
"#,
    );
    said(
        "[boot]\ninitrd = 'i'\nfrom_block = 0\n[[block]]\npath = 'a.img'\n",
        r#"
error: `initrd` is given, and `from_block` too, expected one of them
 --> vms/vm.toml:2:10
  |
2 | initrd = 'i'
  |          ^^^
3 | from_block = 0
  |              - the disk that has both
  |
  = help: remove `from_block` to boot files of the host
"#,
    );
}

#[test]
fn a_disk_to_boot_from_that_is_not_there_is_shown_with_those_that_are() {
    said(
        "boot.from_block = 2\n[[block]]\npath = 'a.img'\n[[block]]\npath = 'b.img'\n",
        r#"
error: `from_block` is 2, but there are 2 disks, 0 to 1
 --> vms/vm.toml:1:19
  |
1 | boot.from_block = 2
  |                   ^
"#,
    );
    said(
        "boot.from_block = 0\n",
        r#"
error: `from_block` is 0, but there is no disk
 --> vms/vm.toml:1:19
  |
1 | boot.from_block = 0
  |                   ^
  |
  = help: add a `[[block]]` with the image
"#,
    );
    said(
        "boot.from_block = 'ROTO'\n[[block]]\npath = 'a.img'\nid = 'ROOT'\n",
        r#"
error: `from_block` is "ROTO", the `id` of no disk
 --> vms/vm.toml:1:19
  |
1 | boot.from_block = 'ROTO'
  |                   ^^^^^^
  |
  = help: did you mean "ROOT"?
"#,
    );
    said(
        "boot.from_block = '0'\n[[block]]\npath = 'a.img'\n",
        r#"
error: `from_block` is "0", the `id` of no disk
 --> vms/vm.toml:1:19
  |
1 | boot.from_block = '0'
  |                   ^^^
  |
  = help: there is one disk, 0: an index stands without quotes
"#,
    );
    said(
        "boot.from_block = true\n[[block]]\npath = 'a.img'\n",
        r#"
error: `from_block` is true, expected the index of a disk, from 0, or its `id`
 --> vms/vm.toml:1:19
  |
1 | boot.from_block = true
  |                   ^^^^
"#,
    );
}
