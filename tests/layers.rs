//! Files over files, profiles and `--set` from outside, and what `config show` says of them.

#![allow(clippy::unwrap_used)]

mod program;

use std::fs;
use std::path::Path;

use launcher::config::{self, Choice, Vm};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::program::{Done, launcher};

/// Runs `launcher` in a folder to its end.
fn run(folder: &Path, arguments: &[&str]) -> Done {
    launcher(folder, folder, arguments).output().unwrap().into()
}

/// What it prints when all is well.
#[track_caller]
fn printed(folder: &Path, arguments: &[&str]) -> String {
    let Done { code, out, err } = run(folder, arguments);
    assert_eq!((code, &*err), (0, ""), "{out}");
    out
}

/// A folder with a VM that extends another file.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write(
        "base.toml",
        "memory = \"1GiB\"\n[boot]\nkernel = \"vmlinuz\"\n\n[[block]]\nid = \"ROOT\"\n\
         path = \"root.img\"\nsize = \"1MiB\"\nroot = true\n\n[profile.ci]\ncpus = 2\n",
    );
    write(
        "web/vm.toml",
        "extends = [\"../base.toml\"]\nname = \"web\"\n\n[[block]]\npath = \"data.img\"\n\
         size = \"2MiB\" # mine\nid = \"DATA\"\n\n[profile.ci]\nlifecycle.on_reboot = \"stop\"\n",
    );
    folder
}

#[test]
fn check_takes_profiles_and_values() {
    let folder = folder();
    let line = [
        "check",
        "--quick",
        "web",
        "-p",
        "ci",
        "--set",
        "memory=2GiB",
    ];
    assert_eq!(printed(folder.path(), &line), "web/vm.toml: ok\n");
    let Done { code, err, .. } = run(
        folder.path(),
        &["check", "--quick", "web", "-p", "cii", "--set", "cpus=two"],
    );
    assert_eq!(code, 2);
    assert_eq!(
        err,
        "error: unknown profile `cii`\n--> web/vm.toml\n = help: did you mean `ci`? the profiles are \
         ci\n\nerror: `cpus` is two, expected a whole number, 1 to 254\n --> --set:1:6\n  |\n\
         1 | cpus=two\n  |      ^^^\n"
    );
}

#[test]
fn up_takes_profiles_and_values_and_hands_them_on_when_detached() {
    let folder = folder();
    for detach in [&[][..], &["--detach"]] {
        let line = [
            "up",
            "web",
            "-p",
            "ci",
            "-p",
            "none",
            "--set",
            "boot.kernel=here",
            "--set",
            "cpus=0",
        ];
        let Done { code, err, .. } = run(folder.path(), &[&line, detach].concat());
        assert_eq!(code, 2);
        assert!(err.contains("unknown profile `none`"), "{err}");
        assert!(!err.contains("unknown profile `ci`"), "{err}");
        assert!(
            err.contains("`cpus` is 0") && err.contains(" --> --set:1:6"),
            "{err}"
        );
    }
}

#[test]
fn show_prints_each_value_with_the_line_it_comes_from() {
    let folder = folder();
    let line = [
        "config",
        "show",
        "web",
        "-p",
        "ci",
        "--set",
        "boot.cmdline=quiet",
    ];
    let folder_of = fs::canonicalize(folder.path()).unwrap();
    let shown = printed(folder.path(), &line);
    let shown = shown.replace(folder_of.to_str().unwrap(), "DIR");
    // How far right a comment is depends on how long the folder's name is.
    let blanks = |line: &str| match line.rsplit_once("  # ") {
        Some((value, origin)) => format!("{}  # {origin}\n", value.trim_end()),
        None => format!("{line}\n"),
    };
    let shown: String = shown.lines().map(blanks).collect();
    assert_eq!(
        shown,
        r#"name = "web"  # web/vm.toml:2
cpus = 2  # web/../base.toml:12
memory = "1GiB"  # web/../base.toml:1

[boot]
kernel = "DIR/web/../vmlinuz"  # web/../base.toml:3
cmdline = "quiet"  # --set

[[block]]
path = "DIR/web/../root.img"  # web/../base.toml:7
# format = "sparse-raw"  # the one that the extension of `path` or `url` stands for
ro = false  # default
root = true  # web/../base.toml:9
sparse = true  # default
o_direct = false  # default
block_size = 512  # default
id = "ROOT"  # web/../base.toml:6
lock = true  # default
queues = 1  # default
size = "1MiB"  # web/../base.toml:8
ephemeral = false  # default

[[block]]
path = "DIR/web/data.img"  # web/vm.toml:5
# format = "sparse-raw"  # the one that the extension of `path` or `url` stands for
ro = false  # default
root = false  # default
sparse = true  # default
o_direct = false  # default
block_size = 512  # default
id = "DATA"  # web/vm.toml:7
lock = true  # default
queues = 1  # default
size = "2MiB"  # web/vm.toml:6
ephemeral = false  # default

[console]
mode = "stdio"  # default

[lifecycle]
on_reboot = "stop"  # web/vm.toml:10
stop_timeout = "30s"  # default
"#
    );
}

#[test]
fn show_prints_json_with_the_origin_of_each_value() {
    let folder = folder();
    let line = ["config", "show", "web", "--json", "--set", "cpus=4"];
    let json: Value = serde_json::from_str(&printed(folder.path(), &line)).unwrap();
    let from = |file: &str, line: u32| json!({ "from": "file", "file": file, "line": line });
    assert_eq!(
        json["cpus"],
        json!({ "value": 4, "origin": { "from": "set" } })
    );
    assert_eq!(json["name"]["origin"], from("web/vm.toml", 2));
    assert_eq!(
        json["block"][0]["root"],
        json!({ "value": true, "origin": from("web/../base.toml", 9) })
    );
    assert_eq!(
        json["block"][1]["ro"],
        json!({ "value": false, "origin": { "from": "default" } })
    );
    assert_eq!(json["block"][1]["format"]["origin"]["from"], "derived");
    assert_eq!(
        json["boot"]["initrd"],
        json!({ "value": null, "origin": { "from": "default" } })
    );
}

/// A VM as far as it does not depend on where its file is.
fn what_holds(vm: &Vm) -> String {
    let mut vm = vm.clone();
    vm.file.clear();
    (vm.extends, vm.profile, vm.named) = (Vec::new(), Vec::new(), true);
    format!("{vm:#?}")
}

#[test]
fn what_show_prints_loads_to_the_same_vm() {
    let folder = folder();
    let folder = fs::canonicalize(folder.path()).unwrap();
    let rich = "extends = \"../base.toml\"\ncpus = 3\n[console]\nready = \"a \\\"quote\\\" # and \\\\ more\"\n\
        log = \"logs/é.log\"\nmode = \"socket\"\n[lifecycle]\nstop_timeout = \"1500ms\"\n\
        [[block]]\nid = \"A # b\"\npath = \"a.raw\"\nformat = \"raw\"\nsparse = false\nsize = 1536\n\
        [[block]]\npath = \"b\\n'\\\"\\\"\\\"\\u0001.img\"\nephemeral = true\nblock_size = 4096\n\
        [[block]]\npath = \"c.qcow2\"\nro = true\nbacking = [\"d.qcow2\", \"e.raw\"]\nqueues = 2\n\
        [block.qcow2]\ncluster_size = \"2MiB\"\nlazy_refcounts = true\nrefcount_bits = 64\n\
        compression_type = \"zstd\"\ndata_file = \"data\"\n";
    fs::write(folder.join("web/rich.toml"), rich).unwrap();
    for (name, line, choice) in [
        ("web/vm.toml", &[][..], Choice::default()),
        ("web/rich.toml", &[], Choice::default()),
        (
            "web/rich.toml",
            &["-p", "ci", "--set", "block.3.qcow2.cache_size=1MiB"],
            Choice {
                profiles: vec!["ci".into()],
                set: vec!["block.3.qcow2.cache_size=1MiB".into()],
                ..Choice::default()
            },
        ),
    ] {
        let file = folder.join(name);
        let shown = [&["config", "show", file.to_str().unwrap()], line].concat();
        let shown = printed(&folder, &shown);
        let elsewhere = folder.join("elsewhere/shown.toml");
        fs::create_dir_all(elsewhere.parent().unwrap()).unwrap();
        fs::write(&elsewhere, &shown).unwrap();
        let one = config::load(&file, &choice).unwrap();
        let other = config::load(&elsewhere, &Choice::default()).unwrap();
        let (one, other) = (what_holds(&one), what_holds(&other));
        // Where its values come from is another file, and another folder.
        let elsewhere = ["file: ", "folder: "];
        let same = |line: &&str| !elsewhere.iter().any(|key| line.contains(key));
        let places = |vm: &str| vm.lines().filter(same).collect::<String>();
        assert_eq!(places(&one), places(&other), "{shown}");
    }
}

/// The disks of the folder's VM, so that they can be resized.
fn with_images(folder: &Path) {
    for (image, size) in [("root.img", 1 << 20), ("web/data.img", 2 << 20)] {
        let file = fs::File::create(folder.join(image)).unwrap();
        file.set_len(size).unwrap();
    }
}

#[test]
fn resize_saves_into_the_entry_of_the_vm_s_own_file() {
    let folder = folder();
    with_images(folder.path());
    let file = folder.path().join("web/vm.toml");
    let before = fs::read_to_string(&file).unwrap();
    printed(
        folder.path(),
        &["disk", "resize", "web/vm.toml", "1", "4MiB", "--save"],
    );
    let after = fs::read_to_string(&file).unwrap();
    assert_eq!(after, before.replace("\"2MiB\"", "\"4MiB\""));
    assert_eq!(
        fs::metadata(folder.path().join("web/data.img"))
            .unwrap()
            .len(),
        4 << 20
    );
}

#[test]
fn resize_does_not_save_into_a_file_that_others_extend() {
    let folder = folder();
    with_images(folder.path());
    let before = fs::read_to_string(folder.path().join("base.toml")).unwrap();
    let line = ["disk", "resize", "web/vm.toml", "ROOT", "4MiB", "--save"];
    let Done { code, err, .. } = run(folder.path(), &line);
    assert_eq!(code, 1);
    assert_eq!(
        err,
        "error: disk 0 is not web/vm.toml's own: its size is for web/../base.toml:8 to say\n\
         help: nothing was changed; leave out `--save` to resize all the same, and write the new size \
         yourself\n"
    );
    assert_eq!(
        fs::metadata(folder.path().join("root.img")).unwrap().len(),
        1 << 20
    );
    assert_eq!(
        fs::read_to_string(folder.path().join("base.toml")).unwrap(),
        before
    );
}

#[test]
fn resize_says_which_file_has_another_size() {
    let folder = folder();
    with_images(folder.path());
    let Done { code, err, .. } = run(
        folder.path(),
        &["disk", "resize", "web/vm.toml", "ROOT", "4MiB"],
    );
    assert_eq!(code, 0);
    assert_eq!(
        err,
        "note: the `size` of disk ROOT in web/../base.toml is 1MiB: the next `launcher up` refuses the \
         larger image\nhelp: write a `[[block]]` with `id = \"ROOT\"` and `size = \"4MiB\"` into \
         web/vm.toml, or change it there\n"
    );
}

#[test]
fn show_needs_a_path_that_is_text() {
    use std::os::unix::ffi::OsStrExt;
    let folder = folder();
    let odd = folder.path().join(std::ffi::OsStr::from_bytes(b"\xff"));
    fs::create_dir(&odd).unwrap();
    fs::write(odd.join("vm.toml"), "boot.kernel = 'k'\n").unwrap();
    let Done { code, out, err } = run(&odd, &["config", "show"]);
    assert_eq!((code, &*out), (1, ""));
    assert_eq!(
        err,
        "error: the path of vm.toml is not UTF-8, which TOML and JSON are\n"
    );
}

#[test]
fn a_file_that_others_of_a_folder_extend_need_be_no_vm_for_up_all() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("base.toml", "memory = \"64MiB\"\n");
    write("half.toml", "extends = \"base.toml\"\ncpus = 1\n");
    for name in ["a.toml", "b.toml"] {
        write(name, "extends = \"half.toml\"\nboot.kernel = \"none\"\n");
    }
    let Done { code, err, .. } = run(folder.path(), &["up", "--all", "."]);
    assert_ne!(code, 0);
    assert!(
        !err.contains("base.toml") && !err.contains("half.toml"),
        "{err}"
    );
    // One that nobody extends is to be a VM.
    write("c.toml", "cpus = 1\n");
    let Done { code, err, .. } = run(folder.path(), &["up", "--all", "."]);
    assert_eq!(code, 2);
    assert_eq!(err.matches("error: ").count(), 1, "{err}");
    assert!(
        err.starts_with("error: `kernel` is missing") && err.contains("c.toml"),
        "{err}"
    );
}
