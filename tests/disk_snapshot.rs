//! `launcher disk snapshot` from outside.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use formats::{Engine, HostFile, Image, Ring};
use tempfile::TempDir;

/// Exit code, standard output and standard error of a command.
fn told(folder: &Path, program: &str, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder);
    let output = command
        .env_remove("LAUNCHER_LOG")
        .env("XDG_RUNTIME_DIR", folder)
        .stdin(Stdio::null());
    let output = output.output().unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn snapshot(folder: &Path, arguments: &str) -> (i32, String, String) {
    let words = "disk snapshot ".to_owned() + arguments;
    let words: Vec<_> = words.split_whitespace().collect();
    told(folder, env!("CARGO_BIN_EXE_launcher"), &words)
}

#[track_caller]
fn done(folder: &Path, arguments: &str) -> String {
    let (code, out, err) = snapshot(folder, arguments);
    assert_eq!((code, &*err), (0, ""), "{arguments}");
    out
}

#[track_caller]
fn qemu(folder: &Path, line: &str) {
    let (program, arguments) = line.split_once(' ').unwrap();
    let arguments: Vec<_> = arguments.split_whitespace().collect();
    let (code, out, err) = told(folder, program, &arguments);
    assert_eq!(code, 0, "{line}: {out}{err}");
    assert!(!out.contains("failed"), "{out}");
}

const VM: &str = "\
[boot]
kernel = 'k'
[[block]]
path = 'a.qcow2'
id = 'ROOT'
[[block]]
path = 'b.img'
[[block]]
path = 'c.qcow2'
ro = true
[[block]]
path = 'd.qcow2'
lock = false
";

fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("vm.toml"), VM).unwrap();
    for name in ["a", "c", "d"] {
        qemu(
            folder.path(),
            &format!("qemu-img create -q -f qcow2 {name}.qcow2 1M"),
        );
    }
    folder
}

#[test]
fn a_disk_is_brought_back_to_what_it_was() {
    let folder = folder();
    let folder = folder.path();
    let write = |byte: &str| {
        let commands = format!("write -q -P {byte} 0 1M");
        let (code, _, err) = told(
            folder,
            "qemu-io",
            &["-f", "qcow2", "-c", &commands, "a.qcow2"],
        );
        assert_eq!((code, &*err), (0, ""));
    };
    let holds = |byte: &str| {
        let commands = format!("read -P {byte} 0 1M");
        let (_, out, _) = told(
            folder,
            "qemu-io",
            &["-f", "qcow2", "-c", &commands, "a.qcow2"],
        );
        assert!(!out.contains("failed"), "{out}");
        qemu(folder, "qemu-img check -q a.qcow2");
    };
    write("1");
    assert!(
        done(folder, "create vm.toml 0 fresh").starts_with("created snapshot `fresh`, id 1, in ")
    );
    write("2");
    done(folder, "create . ROOT later");
    write("3");
    assert!(done(folder, "apply vm.toml ROOT fresh").contains("is as in snapshot `fresh` of 2"));
    holds("1");
    done(folder, "apply --id --path a.qcow2 2");
    holds("2");
    let list = done(folder, "list vm.toml 0");
    let lines: Vec<_> = list.lines().collect();
    assert!(lines[0].starts_with("SNAPSHOT ID  NAME   DATE "), "{list}");
    assert!(lines[1].starts_with("1            fresh  2"), "{list}");
    assert!(lines[2].ends_with(" UTC  1MiB  -"), "{list}");
    assert!(done(folder, "delete vm.toml 0 fresh").starts_with("deleted snapshot `fresh`, id 1"));
    let json = done(folder, "list --json --path a.qcow2");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 1);
    assert_eq!(
        (&json[0]["id"], &json[0]["name"]),
        (&"2".into(), &"later".into())
    );
    assert_eq!(json[0]["disk_size"], 1 << 20);
    done(folder, "delete --path a.qcow2 later");
    assert_eq!(done(folder, "list --path a.qcow2"), "no snapshots\n");
    holds("2");
}

#[test]
fn while_the_image_is_in_use_it_is_only_listed() {
    let folder = folder();
    let folder = folder.path();
    done(folder, "create vm.toml 0 fresh");
    let ring = Ring::new(Engine::Threads).unwrap();
    let image = Image::new(folder.join("a.qcow2"));
    let held = HostFile::open(&ring, &image).unwrap();
    for order in [
        "create vm.toml 0 b",
        "apply vm.toml 0 fresh",
        "delete vm.toml 0 fresh",
    ] {
        let (code, out, err) = snapshot(folder, order);
        assert_eq!((code, &*out), (1, ""));
        let holder = format!("process {} (", std::process::id());
        assert!(err.contains(&holder) && err.contains("a.qcow2"), "{err}");
    }
    assert!(done(folder, "list vm.toml 0").contains("1            fresh"));
    drop(held);
    done(folder, "delete vm.toml 0 fresh");
}

#[test]
fn mistakes_say_what_is_expected() {
    let folder = folder();
    let folder = folder.path();
    done(folder, "create vm.toml 0 fresh");
    for (order, code, message) in [
        (
            "create vm.toml 0 fresh",
            1,
            "it has a snapshot of that name already",
        ),
        (
            "apply vm.toml 0 other",
            1,
            "cannot apply snapshot `other` to",
        ),
        (
            "create vm.toml 7 a",
            2,
            "has no disk \"7\", expected its index or its `id`",
        ),
        (
            "create vm.toml fresh",
            2,
            "required arguments were not provided",
        ),
        (
            "create --path a.qcow2 0 x",
            2,
            "'--path <IMAGE>' cannot be used with '[INDEX|ID]'",
        ),
        ("list vm.toml", 2, "required arguments were not provided"),
        (
            "list vm.toml 1",
            2,
            "which has no snapshots, expected qcow2",
        ),
        (
            "create vm.toml 2 a",
            1,
            "the image of a disk with `ro = true`",
        ),
        (
            "create vm.toml 3 a",
            1,
            "the image of a disk with `lock = false`",
        ),
        ("list --path vm.toml", 2, "does not tell the image's format"),
        (
            "list --path vm.toml --format qcow2",
            1,
            "cannot list the snapshots of `vm.toml`: ",
        ),
        (
            "list --path a.qcow2 --format qcow",
            2,
            "`--format` is \"qcow\"",
        ),
        (
            "list --path no.qcow2",
            2,
            "cannot open `no.qcow2`: No such file",
        ),
        ("list no.toml 0", 2, "cannot read no.toml"),
        ("create", 2, "required arguments were not provided"),
    ] {
        let (found, out, err) = snapshot(folder, order);
        assert_eq!((found, &*out), (code, ""), "{order}: {err}");
        assert!(
            err.starts_with("error: ") && err.contains(message),
            "{order}: {err}"
        );
    }
    // By the image's own name a read-only disk is no matter.
    done(folder, "create --path c.qcow2 a");
    assert!(done(folder, "list vm.toml 2").contains("1            a "));
}

#[test]
fn a_snapshot_of_another_size_comes_with_a_note_on_size() {
    let folder = folder();
    let folder = folder.path();
    done(folder, "create vm.toml 0 small");
    qemu(folder, "qemu-img resize -q a.qcow2 2M");
    let text = VM.replace("id = 'ROOT'", "size = '2MiB'");
    fs::write(folder.join("vm.toml"), text).unwrap();
    let (code, _, err) = snapshot(folder, "apply vm.toml 0 small");
    assert_eq!(code, 0);
    assert_eq!(
        err,
        "note: the disk has 1MiB again, but its `size` is 2MiB: the next `launcher up` grows it \
         to that\n"
    );
}
