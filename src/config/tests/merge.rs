//! What becomes of files that extend each other, of profiles and of `--set`.

use std::time::Duration;

use super::*;

/// Reads a right VM from `vm.toml`, other files and a command line.
#[track_caller]
fn merged(files: &[(&str, &str)], line: &[&str]) -> Vm {
    let files: Vec<_> = files
        .iter()
        .map(|(f, text)| (*f, text.as_bytes()))
        .collect();
    match read_from(&files, line, &Renderer::plain()) {
        Ok(vm) => vm,
        Err(errors) => panic!("{errors}"),
    }
}

/// The paths of the disks.
fn paths(vm: &Vm) -> Vec<&str> {
    let paths = vm.block.iter().map(|block| block.path.to_str().unwrap());
    paths.collect()
}

/// The path of a file.
fn path(file: &Option<HostFile>) -> &str {
    file.as_ref().unwrap().path.to_str().unwrap()
}

const BASE: &str = "cpus = 2\nmemory = \"1GiB\"\n[boot]\nkernel = \"k\"\ncmdline = \"quiet\"\n";

#[test]
fn a_value_of_the_file_replaces_that_of_what_it_extends() {
    let vm = merged(
        &[
            ("vm.toml", "extends = 'base.toml'\ncpus = 4\n"),
            ("base.toml", BASE),
        ],
        &[],
    );
    assert_eq!((vm.cpus, vm.memory), (4, 1 << 30));
}

#[test]
fn tables_merge_key_by_key() {
    let vm = merged(
        &[
            ("vm.toml", "extends = 'base.toml'\nboot.cmdline = 'debug'\n"),
            ("base.toml", BASE),
        ],
        &[],
    );
    assert_eq!(path(&vm.boot.kernel), "k");
    assert_eq!(vm.boot.cmdline, "debug");
}

#[test]
fn of_several_the_later_wins_and_the_file_over_all() {
    let vm = merged(
        &[
            (
                "vm.toml",
                "extends = ['a.toml', 'b.toml']\nmemory = '3GiB'\n",
            ),
            (
                "a.toml",
                "cpus = 1\nmemory = '1GiB'\nboot.kernel = 'a'\nboot.cmdline = 'a'\n",
            ),
            ("b.toml", "cpus = 2\nmemory = '2GiB'\nboot.kernel = 'b'\n"),
        ],
        &[],
    );
    assert_eq!((vm.cpus, vm.memory), (2, 3 << 30));
    assert_eq!((path(&vm.boot.kernel), &*vm.boot.cmdline), ("b", "a"));
    assert_eq!(vm.extends, [Path::new("a.toml"), Path::new("b.toml")]);
}

#[test]
fn what_is_extended_may_extend_others() {
    let vm = merged(
        &[
            ("vm.toml", "extends = 'a.toml'\n"),
            ("a.toml", "extends = 'b.toml'\ncpus = 3\n"),
            ("b.toml", BASE),
        ],
        &[],
    );
    assert_eq!((vm.cpus, vm.memory), (3, 1 << 30));
    assert_eq!(vm.extends, [Path::new("a.toml")], "the VM's own");
}

#[test]
fn the_name_is_that_of_the_file_that_was_named() {
    let vm = merged(
        &[("web.toml", "extends = 'base.toml'\n"), ("base.toml", BASE)],
        &[],
    );
    assert_eq!((&*vm.name, vm.named), ("web", false));
    assert_eq!(vm.file, Path::new("web.toml"));
}

#[test]
fn a_path_is_relative_to_the_file_that_wrote_it() {
    let vm = merged(
        &[
            (
                "vms/web/vm.toml",
                "extends = '../base.toml'\nboot.initrd = 'i'\n[[block]]\nid = 'A'\nbacking = 'b'\n",
            ),
            (
                "vms/web/../base.toml",
                "extends = 'more/c.toml'\n[boot]\nkernel = 'k'\n[[block]]\nid = 'A'\npath = 'a.qcow2'\n",
            ),
            ("vms/web/../more/c.toml", "[console]\nlog = 'log'\n"),
        ],
        &["--set", "block.A.qcow2.data_file=d"],
    );
    assert_eq!(path(&vm.boot.initrd), "vms/web/i");
    assert_eq!(path(&vm.boot.kernel), "vms/web/../k");
    assert_eq!(
        vm.console.log.as_deref(),
        Some(Path::new("vms/web/../more/log"))
    );
    assert_eq!(vm.block[0].path, Path::new("vms/web/../a.qcow2"));
    assert_eq!(vm.block[0].image().backing, [Path::new("vms/web/b")]);
    let data_file = formats::OptionValue::Path("d".into());
    assert_eq!(
        vm.block[0].options,
        [("data_file", data_file)],
        "the current folder"
    );
}

const DISKS: &str = "boot.kernel = 'k'\n[[block]]\npath = 'a.img'\nid = 'A'\nsize = '1GiB'\n\
                     [[block]]\npath = 'b.img'\n[[block]]\npath = 'c.qcow2'\nid = 'C'\n\
                     [block.qcow2]\ncluster_size = '64KiB'\nrefcount_bits = 1\n";

#[test]
fn a_disk_with_the_same_id_is_changed_in_place() {
    let text = "extends = 'base.toml'\n[[block]]\nid = 'C'\nro = true\n[[block]]\nid = 'A'\n\
                size = '2GiB'\n";
    let vm = merged(&[("vm.toml", text), ("base.toml", DISKS)], &[]);
    assert_eq!(paths(&vm), ["a.img", "b.img", "c.qcow2"]);
    assert_eq!(vm.block[0].size, Some(2 << 30));
    assert!(vm.block[2].ro && !vm.block[0].ro);
}

#[test]
fn a_disk_with_another_id_or_none_is_a_further_one() {
    let text = "extends = 'base.toml'\n[[block]]\nid = 'D'\npath = 'd.img'\n[[block]]\n\
                path = 'e.img'\n";
    let vm = merged(&[("vm.toml", text), ("base.toml", DISKS)], &[]);
    assert_eq!(paths(&vm), ["a.img", "b.img", "c.qcow2", "d.img", "e.img"]);
}

#[test]
fn the_table_of_a_disk_s_format_merges() {
    let text = "extends = 'base.toml'\n[[block]]\nid = 'C'\n[block.qcow2]\nrefcount_bits = 64\n";
    let vm = merged(&[("vm.toml", text), ("base.toml", DISKS)], &[]);
    let mut options = vm.block[2].options.clone();
    options.sort_by_key(|(name, _)| *name);
    assert_eq!(
        options,
        [
            ("cluster_size", formats::OptionValue::Number(64 << 10)),
            ("refcount_bits", formats::OptionValue::Number(64))
        ]
    );
}

#[test]
fn a_list_of_values_is_replaced() {
    let base = "boot.kernel = 'k'\n[[block]]\nid = 'A'\npath = 'a.qcow2'\nbacking = ['b', 'c']\n";
    let text = "extends = 'base.toml'\n[[block]]\nid = 'A'\nbacking = ['d']\n";
    let vm = merged(&[("vm.toml", text), ("base.toml", base)], &[]);
    assert_eq!(vm.block[0].image().backing, [Path::new("d")]);
}

#[test]
fn only_the_whole_must_have_what_a_vm_needs() {
    let vm = merged(
        &[
            (
                "vm.toml",
                "extends = ['disk.toml']\n[boot]\nkernel = 'k'\n[[block]]\nid = 'A'\npath = 'a.img'\n",
            ),
            (
                "disk.toml",
                "[[block]]\nid = 'A'\nro = true\nsize = 512\nblock_size = 512\n",
            ),
        ],
        &[],
    );
    assert!(vm.block[0].ro);
}

const PROFILES: &str = "cpus = 1\nboot.kernel = 'k'\n[[block]]\nid = 'A'\npath = 'a.img'\n\
    [profile.big]\ncpus = 8\nmemory = '8GiB'\n[profile.ci]\ncpus = 2\nlifecycle.on_reboot = 'stop'\n\
    [[profile.ci.block]]\nid = 'A'\nephemeral = true\n[[profile.ci.block]]\npath = 'b.img'\n";

#[test]
fn a_profile_that_is_not_chosen_changes_nothing() {
    let vm = merged(&[("vm.toml", PROFILES)], &[]);
    assert_eq!((vm.cpus, vm.memory, vm.block.len()), (1, 512 << 20, 1));
    assert_eq!(vm.profile, ["big", "ci"]);
}

#[test]
fn a_profile_that_is_chosen_is_laid_over_the_file() {
    let vm = merged(&[("vm.toml", PROFILES)], &["-p", "ci"]);
    assert_eq!(vm.cpus, 2);
    assert_eq!(vm.lifecycle.on_reboot, OnReboot::Stop);
    assert_eq!(path(&vm.boot.kernel), "k");
    assert_eq!(paths(&vm), ["a.img", "b.img"]);
    assert!(vm.block[0].ephemeral && !vm.block[1].ephemeral);
}

#[test]
fn of_several_profiles_the_later_wins() {
    let both = |line: &[&str]| {
        let vm = merged(&[("vm.toml", PROFILES)], line);
        (vm.cpus, vm.memory, vm.block.len())
    };
    assert_eq!(both(&["-p", "big", "-p", "ci"]), (2, 8 << 30, 2));
    assert_eq!(both(&["-p", "ci", "-p", "big"]), (8, 8 << 30, 2));
}

#[test]
fn a_profile_of_what_is_extended_counts_and_the_file_s_own_merges_over_it() {
    let base = format!("{BASE}[profile.ci]\ncpus = 2\nmemory = '2GiB'\n[profile.old]\ncpus = 7\n");
    let text = "extends = 'base.toml'\ncpus = 5\n[profile.ci]\nmemory = '4GiB'\n";
    let files = [("vm.toml", text), ("base.toml", &*base)];
    let vm = merged(&files, &["-p", "ci"]);
    assert_eq!((vm.cpus, vm.memory), (2, 4 << 30));
    assert_eq!(merged(&files, &["-p", "old"]).cpus, 7);
}

#[test]
fn set_is_laid_over_the_profiles() {
    let vm = merged(&[("vm.toml", PROFILES)], &["-p", "ci", "--set", "cpus=3"]);
    assert_eq!(vm.cpus, 3);
}

#[test]
fn of_several_values_set_the_last_wins() {
    let line = ["--set", "cpus=3", "--set", "cpus=4"];
    assert_eq!(merged(&[("vm.toml", PROFILES)], &line).cpus, 4);
}

/// What `--set` makes of two disks, one of them without an id.
#[track_caller]
fn set(argument: &str) -> Vm {
    merged(&[("vm.toml", DISKS)], &["--set", argument])
}

#[test]
fn what_is_set_is_toml_or_else_a_text() {
    assert_eq!(set("name=web").name, "web");
    assert_eq!(set("name=\"web\"").name, "web");
    assert_eq!(set("memory=2GiB").memory, 2 << 30);
    assert_eq!(set("memory=1_073_741_824").memory, 1 << 30);
    assert_eq!(
        set("boot.cmdline=quiet root=/dev/vda").boot.cmdline,
        "quiet root=/dev/vda"
    );
    assert_eq!(set("boot.cmdline='a=b'").boot.cmdline, "a=b");
    assert_eq!(set("boot.cmdline=").boot.cmdline, "");
    assert_eq!(
        set("lifecycle.stop_timeout=2m").lifecycle.stop_timeout,
        Duration::from_secs(120)
    );
    assert_eq!(set(" cpus = 3 ").cpus, 3);
}

#[test]
fn what_is_set_reaches_a_disk_by_its_index_or_its_id() {
    assert!(set("block.0.ro=true").block[0].ro);
    assert!(set("block.1.ro=true").block[1].ro);
    assert_eq!(set("block.A.size=\"8GiB\"").block[0].size, Some(8 << 30));
    assert_eq!(set("block.\"A\".size=8GiB").block[0].size, Some(8 << 30));
    let vm = set("block.C.qcow2.refcount_bits=8");
    let bits = ("refcount_bits", formats::OptionValue::Number(8));
    assert!(vm.block[2].options.contains(&bits));
    assert!(set("block.1={ro=true}").block[1].ro);
}

#[test]
fn an_id_may_hold_what_a_key_does_not() {
    let text = "boot.kernel = 'k'\n[[block]]\nid = 'a=b.c'\npath = 'a.img'\n";
    let vm = merged(&[("vm.toml", text)], &["--set", "block.\"a=b.c\".ro=true"]);
    assert!(vm.block[0].ro);
}

#[test]
fn an_index_comes_before_an_id() {
    let text = "boot.kernel = 'k'\n[[block]]\nid = '1'\npath = 'a.img'\n[[block]]\nid = '7'\n\
                path = 'b.img'\n";
    let ro = |argument| {
        let vm = merged(&[("vm.toml", text)], &["--set", argument]);
        vm.block.iter().map(|block| block.ro).collect::<Vec<_>>()
    };
    assert_eq!(ro("block.1.ro=true"), [false, true]);
    assert_eq!(ro("block.7.ro=true"), [false, true]);
}

#[test]
fn disks_that_are_set_merge_by_id_or_are_further_ones() {
    let vm = set("block=[{id='A', ro=true}, {path='d.img'}]");
    assert_eq!(paths(&vm), ["a.img", "b.img", "c.qcow2", "d.img"]);
    assert!(vm.block[0].ro);
}

#[test]
fn a_table_that_no_file_has_may_be_set() {
    let vm = set("console={mode='off', log='l'}");
    assert_eq!(
        (vm.console.mode, vm.console.log.as_deref()),
        (ConsoleMode::Off, Some(Path::new("l")))
    );
    assert_eq!(set("console.mode=socket").console.mode, ConsoleMode::Socket);
}

#[test]
fn a_home_folder_is_one_in_every_file_and_argument() {
    let vm = merged(
        &[
            ("vm.toml", "extends = '~/base.toml'\n"),
            ("/home/ada/base.toml", BASE),
        ],
        &["--set", "boot.initrd=~/i"],
    );
    assert_eq!(path(&vm.boot.initrd), "/home/ada/i");
}

const DIGEST: &str = "0000000000000000000000000000000000000000000000000000000000000000";

#[test]
fn a_file_of_the_host_is_one_value_and_replaced_whole() {
    let base = format!("boot.kernel = {{ path = 'k', sha256 = '{DIGEST}', build = 'make' }}\n");
    let text = "extends = 'base/base.toml'\nboot.kernel = { path = 'l' }\n";
    let vm = merged(&[("vm.toml", text), ("base/base.toml", &base)], &[]);
    let kernel = vm.boot.kernel.unwrap();
    assert_eq!((kernel.path.to_str(), kernel.sha256), (Some("l"), None));
    assert!(kernel.build.is_empty());
}

#[test]
fn a_file_of_the_host_is_built_in_the_folder_of_the_file_that_says_so() {
    let base = "boot.kernel = { path = 'k', build = 'make' }\n[[block]]\nid = 'A'\n\
                path = 'a.img'\nbuild = 'make'\n[[block]]\npath = 'b.img'\n";
    let text = "extends = 'base/base.toml'\n[[block]]\nid = 'A'\nro = true\n";
    let vm = merged(&[("vms/vm.toml", text), ("vms/base/base.toml", base)], &[]);
    assert_eq!(
        vm.boot.kernel.as_ref().unwrap().folder,
        Path::new("vms/base")
    );
    assert_eq!(vm.block[0].folder, Path::new("vms/base"));
    assert_eq!(vm.block[1].folder, Path::new("vms/base"));
}

#[test]
fn a_key_of_a_file_of_the_host_may_be_set_where_the_file_is_a_path() {
    let digest = format!("boot.kernel.sha256={DIGEST}");
    let vm = merged(&[("vm.toml", "boot.kernel = 'k'\n")], &["--set", &digest]);
    let kernel = vm.boot.kernel.unwrap();
    assert_eq!(kernel.path, Path::new("k"));
    assert_eq!(kernel.sha256.unwrap().to_string(), DIGEST);
}
