//! Messages about files that extend each other, profiles and `--set`, letter by letter.

use super::*;

/// Checks what is said of files, the VM's own first, and a command line.
#[track_caller]
fn said(files: &[(&str, &str)], line: &[&str], expected: &str) {
    let files: Vec<_> = files
        .iter()
        .map(|(f, text)| (*f, text.as_bytes()))
        .collect();
    let errors = match read_from(&files, line, &Renderer::plain()) {
        Ok(vm) => panic!("nothing is wrong: {vm:?}"),
        Err(errors) => errors,
    };
    let expected = expected.trim_matches('\n');
    assert_eq!(
        errors, expected,
        "\n--- said\n{errors}\n--- expected\n{expected}\n---"
    );
}

const BASE: &str = "[boot]\nkernel = 'k'\n[[block]]\nid = 'ROOT'\npath = 'a.img'\nroot = true\n";

#[test]
fn mistakes_of_all_files_are_shown_in_one_run_by_file_and_place() {
    said(
        &[
            ("vm.toml", "extends = ['a.toml', 'b.toml']\ncpus = 0\n"),
            ("a.toml", "boot.kernel = 'k'\nmemory = 1\nmemroy = 2\n"),
            ("b.toml", "memory = '1GiB'\nboot.kernel = true\nname = \n"),
        ],
        &["--set", "console.mode=tty"],
        r#"
error: `cpus` is 0, expected a whole number, 1 to 254
 --> vm.toml:2:8
  |
2 | cpus = 0
  |        ^

error: `memory` is 1, expected a size from 2MiB to 1TiB, a multiple of 4KiB
 --> a.toml:2:10
  |
2 | memory = 1
  |          ^

error: unknown key `memroy` at the top of the file
 --> a.toml:3:1
  |
3 | memroy = 2
  | ^^^^^^
  |
  = help: did you mean `memory`?

error: `kernel` is true, expected a path, or a table with `path` or `url`
 --> b.toml:2:15
  |
2 | boot.kernel = true
  |               ^^^^

error: a value is missing
 --> b.toml:3:8
  |
3 | name = 
  |        ^

error: `mode` is tty, expected "stdio" or "socket" or "off"
 --> --set:1:14
  |
1 | console.mode=tty
  |              ^^^
"#,
    );
}

#[test]
fn two_places_of_one_mistake_may_be_in_two_files() {
    said(
        &[
            (
                "vm.toml",
                "extends = 'base.toml'\n\n[[block]]\npath = 'b.img'\nroot = true\n",
            ),
            ("base.toml", BASE),
        ],
        &[],
        r#"
error: `root` is true on two disks, expected one root file system
 --> vm.toml:5:8
  |
5 | root = true
  |        ^^^^
  |
 ::: base.toml:6:8
  |
6 | root = true
  |        ---- first here
"#,
    );
}

#[test]
fn a_value_that_is_replaced_is_checked_all_the_same() {
    said(
        &[
            ("vm.toml", "extends = 'base.toml'\ncpus = 1\n"),
            ("base.toml", &format!("cpus = 0\n{BASE}")),
        ],
        &[],
        r#"
error: `cpus` is 0, expected a whole number, 1 to 254
 --> base.toml:1:8
  |
1 | cpus = 0
  |        ^
"#,
    );
}

#[test]
fn a_key_missing_in_the_whole_is_missed_in_the_file_of_the_vm() {
    said(
        &[
            (
                "vm.toml",
                "extends = 'base.toml'\n[[block]]\nid = 'B'\nro = true\n",
            ),
            (
                "base.toml",
                "[boot]\ncmdline = 'quiet'\n[[block]]\nid = 'A'\nsize = 512\n[[block]]\nid = 'B'\n",
            ),
        ],
        &[],
        r#"
error: `kernel` is missing, `[boot]` needs it
 --> vm.toml
  |
 ::: base.toml:1:1
  |
1 | [boot]
  | ------ this one
  |
  = help: add a table `[boot]` with a line `kernel = "vmlinuz"`

error: `path` is missing, `[[block]]` needs it
 --> vm.toml
  |
 ::: base.toml:3:1
  |
3 | [[block]]
  | --------- this one
  |
  = help: add a line `path = "disk.img"` to it, or to one in vm.toml with the same `id`

error: `path` is missing, `[[block]]` needs it
 --> vm.toml:2:1
  |
2 | [[block]]
  | ^^^^^^^^^
  |
  = help: add a line `path = "disk.img"`
"#,
    );
}

#[test]
fn what_cannot_be_read_is_an_error_at_the_name_of_it() {
    said(
        &[
            ("vms/vm.toml", "extends = ['../base.toml', 'b.toml']\n"),
            ("vms/b.toml", "extends = ['', 7]\n"),
        ],
        &["-p", "no-matter", "--set", "block.0.ro=true"],
        r#"
error: cannot read vms/../base.toml
 --> vms/vm.toml:1:12
  |
1 | extends = ['../base.toml', 'b.toml']
  |            ^^^^^^^^^^^^^^

error: `extends[0]` is '', expected a path
 --> vms/b.toml:1:12
  |
1 | extends = ['', 7]
  |            ^^

error: `extends[1]` is 7, expected a path
 --> vms/b.toml:1:16
  |
1 | extends = ['', 7]
  |                ^
"#,
    );
}

#[test]
fn files_that_extend_each_other_are_shown_as_a_chain() {
    said(
        &[
            ("vm.toml", "extends = 'a.toml'\n"),
            ("a.toml", "extends = 'b.toml'\n"),
            ("b.toml", "extends = 'a.toml'\n"),
        ],
        &[],
        r#"
error: `extends` comes back to a.toml
 --> b.toml:1:11
  |
1 | extends = 'a.toml'
  |           ^^^^^^^^
  |
  = help: the chain is vm.toml -> a.toml -> b.toml -> a.toml: remove one of its links
"#,
    );
}

#[test]
fn a_file_that_extends_itself_is_told_so() {
    said(
        &[("vm.toml", "extends = 'vm.toml'\nboot.kernel = 'k'\n")],
        &[],
        r#"
error: `extends` comes back to vm.toml
 --> vm.toml:1:11
  |
1 | extends = 'vm.toml'
  |           ^^^^^^^^^
  |
  = help: the chain is vm.toml -> vm.toml: remove one of its links
"#,
    );
}

#[test]
fn a_file_that_is_reached_twice_is_shown_with_both_chains() {
    said(
        &[
            ("vm.toml", "extends = ['a.toml', 'b.toml']\n"),
            ("a.toml", "extends = 'base.toml'\n"),
            ("b.toml", "extends = 'base.toml'\n"),
            ("base.toml", BASE),
        ],
        &[],
        r#"
error: `extends` leads to base.toml twice, expected once
 --> b.toml:1:11
  |
1 | extends = 'base.toml'
  |           ^^^^^^^^^^^
  |
 ::: a.toml:1:11
  |
1 | extends = 'base.toml'
  |           ----------- first here
  |
  = help: the chains are vm.toml -> a.toml -> base.toml and vm.toml -> b.toml -> base.toml
"#,
    );
}

#[test]
fn two_disks_of_one_id_in_one_file_do_not_merge() {
    said(
        &[
            (
                "vm.toml",
                "extends = 'base.toml'\n[[block]]\nid = 'ROOT'\nro = true\n[[block]]\nid = 'ROOT'\npath = 'b.img'\n",
            ),
            ("base.toml", BASE),
        ],
        &[],
        r#"
error: `id` is "ROOT" on two disks, expected another on each
 --> vm.toml:6:6
  |
3 | id = 'ROOT'
  |      ------ first here
...
6 | id = 'ROOT'
  |      ^^^^^^
"#,
    );
}

const PROFILES: &str =
    "boot.kernel = 'k'\n[profile.debug]\nboot.cmdline = 'debug'\n[profile.ci]\ncpus = 2\n";

#[test]
fn an_unknown_profile_gets_the_nearest_and_the_list() {
    said(
        &[("vm.toml", PROFILES)],
        &["-p", "debgu", "-p", "x"],
        r#"
error: unknown profile `debgu`
--> vm.toml
 = help: did you mean `debug`? the profiles are ci, debug

error: unknown profile `x`
--> vm.toml
 = help: the profiles are ci, debug
"#,
    );
    said(
        &[("vm.toml", "boot.kernel = 'k'\n")],
        &["-p", "ci"],
        r#"
error: unknown profile `ci`
--> vm.toml
 = help: there is none: a profile is a table `[profile.NAME]`
"#,
    );
}

#[test]
fn a_mistake_in_a_profile_that_is_not_chosen_is_shown() {
    said(
        &[(
            "vm.toml",
            "boot.kernel = 'k'\n[profile.ci]\ncpus = 0\nmemroy = 1\nextends = 'a.toml'\nprofile.x = 1\n\
             [profile.ci.boot]\ninitramfs = 'i'\n[[profile.ci.block]]\nro = 1\nformat = 'zip'\n\
             [profile]\nold = true\n",
        )],
        &[],
        r#"
error: `cpus` is 0, expected a whole number, 1 to 254
 --> vm.toml:3:8
  |
3 | cpus = 0
  |        ^

error: unknown key `memroy` in `[profile.ci]`
 --> vm.toml:4:1
  |
4 | memroy = 1
  | ^^^^^^
  |
  = help: did you mean `memory`?

error: unknown key `extends` in `[profile.ci]`
 --> vm.toml:5:1
  |
5 | extends = 'a.toml'
  | ^^^^^^^
  |
  = help: `extends` belongs at the top of the file alone

error: unknown key `profile` in `[profile.ci]`
 --> vm.toml:6:1
  |
6 | profile.x = 1
  | ^^^^^^^
  |
  = help: `profile` belongs at the top of the file alone

error: unknown key `initramfs` in `[boot]`
 --> vm.toml:8:1
  |
8 | initramfs = 'i'
  | ^^^^^^^^^
  |
  = help: known here: kernel, initrd, from_block, cmdline

error: `ro` is 1, expected true or false
  --> vm.toml:10:6
   |
10 | ro = 1
   |      ^

error: `format` is "zip", expected "qcow2", "raw" or "sparse-raw"
  --> vm.toml:11:10
   |
11 | format = 'zip'
   |          ^^^^^

error: `old` is true, expected a table `[profile.old]`
  --> vm.toml:13:7
   |
13 | old = true
   |       ^^^^
"#,
    );
}

#[test]
fn a_profile_that_is_chosen_is_checked_with_the_whole() {
    said(
        &[(
            "vm.toml",
            "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\nro = true\nid = 'A'\n[[profile.ci.block]]\n\
             id = 'A'\nephemeral = true\n[[profile.ci.block]]\nid = 'B'\n",
        )],
        &["-p", "ci"],
        r#"
error: `ephemeral` is true on a disk with `ro = true`, expected one of them
 --> vm.toml:8:13
  |
4 | ro = true
  |      ---- and this
...
8 | ephemeral = true
  |             ^^^^
  |
  = help: neither writes the image; remove `ro` if the guest is to write

error: `path` is missing, `[[block]]` needs it
 --> vm.toml:9:1
  |
9 | [[profile.ci.block]]
  | ^^^^^^^^^^^^^^^^^^^^
  |
  = help: add a line `path = "disk.img"`
"#,
    );
}

#[test]
fn a_bad_value_that_is_set_is_shown_in_its_argument() {
    said(
        &[("vm.toml", BASE)],
        &[
            "--set",
            "cpus=0",
            "--set",
            "block.ROOT.format=zip",
            "--set",
            "boot.intrd=i",
            "--set",
            "bot.kernel=k",
        ],
        r#"
error: `cpus` is 0, expected a whole number, 1 to 254
 --> --set:1:6
  |
1 | cpus=0
  |      ^

error: `format` is "zip", expected "qcow2", "raw" or "sparse-raw"
 --> --set:1:19
  |
1 | block.ROOT.format=zip
  |                   ^^^

error: unknown key `intrd` in `[boot]`
 --> --set:1:6
  |
1 | boot.intrd=i
  |      ^^^^^
  |
  = help: did you mean `initrd`?

error: unknown key `bot` at the top of the file
 --> --set:1:1
  |
1 | bot.kernel=k
  | ^^^
  |
  = help: did you mean `[boot]`?
"#,
    );
}

#[test]
fn what_is_no_key_and_value_is_told_so() {
    said(
        &[("vm.toml", BASE)],
        &[
            "--set",
            "cpus",
            "--set",
            "=2",
            "--set",
            "boot cmdline=quiet",
            "--set",
            "[boot]=1",
            "--set",
            "",
        ],
        r#"
error: `--set` is "cpus", expected KEY=VALUE
 --> --set:1:1
  |
1 | cpus
  | ^^^^
  |
  = help: an example is `--set boot.cmdline=quiet`

error: `--set` is "=2", expected KEY=VALUE
 --> --set:1:1
  |
1 | =2
  | ^^
  |
  = help: an example is `--set boot.cmdline=quiet`

error: `boot cmdline` is no key, expected words with dots between them
 --> --set:1:1
  |
1 | boot cmdline=quiet
  | ^^^^^^^^^^^^
  |
  = help: an example is `--set boot.cmdline=quiet`

error: `[boot]` is no key, expected words with dots between them
 --> --set:1:1
  |
1 | [boot]=1
  | ^^^^^^
  |
  = help: an example is `--set boot.cmdline=quiet`

error: `--set` is "", expected KEY=VALUE
 --> --set:1:1
  |
1 |
  | ^
  |
  = help: an example is `--set boot.cmdline=quiet`
"#,
    );
}

#[test]
fn a_disk_that_is_not_there_cannot_be_set() {
    said(
        &[("vm.toml", BASE)],
        &["--set", "block.1.ro=true", "--set", "block.DATA.ro=true"],
        r#"
error: `--set` names "1", expected an index or an `id`
 --> --set:1:7
  |
1 | block.1.ro=true
  |       ^
  |
  = help: the only index is 0; the ids are ROOT

error: `--set` names "DATA", expected an index or an `id`
 --> --set:1:7
  |
1 | block.DATA.ro=true
  |       ^^^^
  |
  = help: the only index is 0; the ids are ROOT
"#,
    );
    said(
        &[("vm.toml", "boot.kernel = 'k'\n")],
        &["--set", "block.0.ro=true"],
        r#"
error: `--set` names "0", expected an index or an `id`
 --> --set:1:7
  |
1 | block.0.ro=true
  |       ^
  |
  = help: there is none at all
"#,
    );
}

#[test]
fn what_only_a_file_says_cannot_be_set() {
    said(
        &[("vm.toml", BASE)],
        &["--set", "extends=base.toml", "--set", "profile.ci.cpus=2"],
        r#"
error: `--set` cannot change `extends`, expected a key of the VM itself
 --> --set:1:1
  |
1 | extends=base.toml
  | ^^^^^^^
  |
  = help: what a file extends is for the file to say

error: `--set` cannot change `profile`, expected a key of the VM itself
 --> --set:1:1
  |
1 | profile.ci.cpus=2
  | ^^^^^^^
  |
  = help: choose a profile with `-p NAME`
"#,
    );
}

#[test]
fn a_value_of_another_kind_is_pointed_at_where_it_has_the_last_word() {
    said(
        &[
            (
                "vm.toml",
                "extends = 'base.toml'\nboot = 'k'\nblock = true\n",
            ),
            ("base.toml", BASE),
        ],
        &[],
        r#"
error: `boot` is 'k', expected a table `[boot]`
 --> vm.toml:2:8
  |
2 | boot = 'k'
  |        ^^^

error: `block` is true, expected a list of tables, each headed `[[block]]`
 --> vm.toml:3:9
  |
3 | block = true
  |         ^^^^
"#,
    );
}

#[test]
fn what_a_text_with_damage_may_hold_is_not_missed() {
    said(
        &[
            ("vm.toml", "extends = 'base.toml'\n"),
            ("base.toml", "[boot]\nkernel\n"),
        ],
        &["-p", "ci"],
        r#"
error: key with no value, expected `=`
 --> base.toml:2:7
  |
2 | kernel
  |       ^
"#,
    );
}
