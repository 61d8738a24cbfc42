//! The binary from outside: what it prints where, and how it exits.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// `launcher` in a folder, with no input and no settings of the one who runs the tests.
fn launcher(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_launcher"));
    command
        .args(arguments)
        .current_dir(folder)
        .env_remove("LAUNCHER_LOG")
        .stdin(Stdio::null());
    command
}

/// Its exit code, standard output and standard error.
fn run(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    told(launcher(folder, arguments).output().unwrap())
}

fn told(output: Output) -> (i32, String, String) {
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// A folder with these files.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

const GOOD: &str = "[boot]\nkernel = \"no-such-vmlinuz\"\n";

#[test]
fn check_says_ok_of_a_right_file() {
    let folder = folder(&[("vm.toml", GOOD)]);
    let (code, out, err) = run(folder.path(), &["check", "--quick", "vm.toml"]);
    assert_eq!((code, &*out, &*err), (0, "vm.toml: ok\n", ""));
}

#[test]
fn check_without_a_file_means_vm_toml_here_and_a_folder_means_its_own() {
    let folder = folder(&[("vm.toml", GOOD), ("web/vm.toml", GOOD)]);
    let checked = |vm: &[_]| run(folder.path(), &[&["check", "--quick"], vm].concat()).1;
    assert_eq!(checked(&[]), "vm.toml: ok\n");
    assert_eq!(checked(&["web"]), "web/vm.toml: ok\n");
}

#[test]
fn check_shows_the_mistakes_of_every_file_without_colour_and_exits_2() {
    let folder = folder(&[
        (
            "a.toml",
            "cpus = 0\n[boot]\nkernel = 'k'\ninitramfs = 'i'\n",
        ),
        ("b.toml", GOOD),
        ("c.toml", "boot.kernel = \"k\n"),
    ]);
    let (code, out, err) = run(
        folder.path(),
        &["check", "--quick", "a.toml", "b.toml", "c.toml"],
    );
    assert_eq!((code, &*out), (2, "b.toml: ok\n"));
    assert_eq!(
        err,
        r#"error: `cpus` is 0, expected a whole number, 1 to 254
 --> a.toml:1:8
  |
1 | cpus = 0
  |        ^

error: unknown key `initramfs` in `[boot]`
 --> a.toml:4:1
  |
4 | initramfs = 'i'
  | ^^^^^^^^^
  |
  = help: known here: kernel, initrd, from_block, cmdline

error: invalid basic string, expected `"`
 --> c.toml:1:17
  |
1 | boot.kernel = "k
  |                 ^
"#
    );
}

#[test]
fn a_missing_file_is_a_configuration_error() {
    let folder = folder(&[]);
    for command in ["check", "up"] {
        let (code, out, err) = run(folder.path(), &[command]);
        assert_eq!((code, &*out), (2, ""));
        assert!(
            err.starts_with("error: cannot read vm.toml: No such file"),
            "{err}"
        );
    }
}

#[test]
fn up_shows_the_mistakes_of_its_file_before_it_looks_at_the_host() {
    let folder = folder(&[("vm.toml", "cpus = 0\n[boot]\nkernel = 'k'\n")]);
    let (code, _, err) = run(folder.path(), &["up"]);
    assert_eq!(code, 2);
    assert!(err.starts_with("error: `cpus` is 0, expected"), "{err}");
}

#[test]
fn up_refuses_what_doctor_finds_hopeless_in_the_same_words() {
    let folder = folder(&[("vm.toml", GOOD)]);
    let (_, out, _) = run(folder.path(), &["doctor", "--json"]);
    let checks: serde_json::Value = serde_json::from_str(&out).unwrap();
    let hopeless = checks.as_array().unwrap().iter().find(|check| {
        check["state"] == "failed" && (check["name"] == "kvm" || check["name"] == "hardware")
    });
    let (code, _, err) = run(folder.path(), &["up"]);
    assert_ne!(code, 0);
    match hopeless {
        Some(check) => assert!(err.contains(check["detail"].as_str().unwrap()), "{err}"),
        None => assert!(err.contains("no-such-vmlinuz"), "{err}"),
    }
}

#[test]
fn doctor_exits_1_exactly_if_a_check_failed() {
    let folder = folder(&[]);
    let (code, out, err) = run(folder.path(), &["doctor"]);
    assert_eq!(err, "");
    assert_eq!(code, i32::from(out.contains("FAIL")), "{out}");
    assert!(out.lines().any(|line| line.contains("io_uring")), "{out}");
    assert!(out.is_ascii(), "no terminal, no signs: {out}");
}

#[test]
fn formats_are_listed_for_people_and_for_programs() {
    let folder = folder(&[]);
    let (code, out, _) = run(folder.path(), &["formats", "--json"]);
    let formats: serde_json::Value = serde_json::from_str(&out).unwrap();
    let (_, listing, _) = run(folder.path(), &["formats"]);
    assert_eq!(code, 0);
    for format in formats.as_array().unwrap() {
        let name = format["name"].as_str().unwrap();
        assert!(
            listing.lines().any(|line| line.starts_with(name)),
            "{listing}"
        );
    }
    assert!(!listing.is_empty());
}

/// Those of a default build are in the reference, which is held to be right; a plug-in vanishes
/// silently from a build that does not name it.
#[test]
fn the_formats_are_those_of_the_reference_and_those_asked_for_by_feature() {
    let page = include_str!("../docs/vm-toml.md");
    let (_, section) = page.split_once("\n## Disk formats\n").unwrap();
    let section = section.split("\n#").next().unwrap();
    let rows = section.lines().filter_map(|row| row.strip_prefix("| `"));
    let mut expected: Vec<_> = rows.filter_map(|row| row.split('`').next()).collect();
    expected.retain(|name| *name != "format");
    assert!(expected.contains(&"raw"), "{expected:?}");
    if cfg!(feature = "qcow2-rs") {
        expected.push("qcow2-rs");
        expected.sort_unstable();
    }
    let (_, out, _) = run(folder(&[]).path(), &["formats", "--json"]);
    let formats: serde_json::Value = serde_json::from_str(&out).unwrap();
    let formats = formats.as_array().unwrap().iter();
    let names: Vec<_> = formats
        .map(|format| format["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, expected);
}

#[test]
fn a_key_is_explained_with_what_it_takes_its_default_and_an_example() {
    let folder = folder(&[]);
    let (code, out, err) = run(folder.path(), &["explain", "sparse"]);
    assert_eq!((code, &*err), (0, ""));
    assert_eq!(
        out,
        "block.sparse

true: thin, space that the guest discards is freed. false: fully allocated at
start, no discard.

Takes:    true or false
Default:  true

Example:
  [[block]]
  sparse = false
"
    );
    let (_, out, _) = run(folder.path(), &["explain", "console.mode"]);
    assert!(
        out.contains("\n  \"off\"     The guest has no serial port.\n"),
        "{out}"
    );
    let (_, out, _) = run(folder.path(), &["explain", "[boot]"]);
    assert!(
        out.contains("Keys:\n  boot.kernel      The kernel: a bzImage"),
        "{out}"
    );
}

#[test]
fn explain_lists_all_keys_and_knows_the_nearest_of_a_wrong_one() {
    let folder = folder(&[]);
    let (code, out, _) = run(folder.path(), &["explain"]);
    assert_eq!(code, 0);
    for key in ["memory ", "boot.kernel ", "block.qcow2.cluster_size "] {
        assert!(out.lines().any(|line| line.starts_with(key)), "{out}");
    }
    let (code, out, err) = run(folder.path(), &["explain", "block.spars"]);
    assert_eq!((code, &*out), (2, ""));
    assert_eq!(
        err,
        "error: no key of a VM's file is called \"block.spars\"\n\
         help: did you mean `block.sparse`?\n"
    );
    let (code, _, err) = run(folder.path(), &["explain", "colour"]);
    assert_eq!(code, 2);
    assert!(
        err.ends_with("help: `launcher explain` lists all keys\n"),
        "{err}"
    );
}

#[test]
fn wrong_usage_exits_2_and_help_exits_0() {
    let folder = folder(&[]);
    for wrong in [
        &["frobnicate"][..],
        &["up", "a", "b"],
        &["up", "--forse"],
        &[],
    ] {
        let (code, out, err) = run(folder.path(), wrong);
        assert_eq!((code, &*out), (2, ""));
        assert!(!err.is_empty());
    }
    for right in [&["--help"][..], &["up", "--help"], &["-h"], &["--version"]] {
        let (code, out, err) = run(folder.path(), right);
        assert_eq!((code, &*err), (0, ""));
        assert!(out.contains("launcher"), "{out}");
    }
}

#[test]
fn a_reader_that_is_gone_is_no_failure() {
    let folder = folder(&[("vm.toml", GOOD)]);
    for arguments in [
        &["formats"][..],
        &["check", "--quick"],
        &["--help"],
        &["doctor", "--json"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = launcher(folder.path(), arguments)
            .stdout(writer)
            .output()
            .unwrap();
        let (code, _, err) = told(output);
        assert!(!err.contains("panicked") && !err.contains("error"), "{err}");
        assert!(
            code == 0 || arguments[0] == "doctor",
            "{arguments:?} exits {code}"
        );
    }
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let folder = folder(&[("vm.toml", GOOD)]);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = launcher(folder.path(), &["check", "--quick"])
        .stdout(full)
        .output()
        .unwrap();
    let (code, _, err) = told(output);
    assert_eq!(code, 1);
    assert!(
        err.starts_with("error: cannot write to standard output: No space left"),
        "{err}"
    );
}

#[test]
fn a_file_past_its_limit_is_a_failure_and_no_signal() {
    let folder = folder(&[("vm.toml", GOOD)]);
    let out = File::create(folder.path().join("out")).unwrap();
    let mut command = launcher(folder.path(), &["check", "--quick"]);
    let limit = || {
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the pointer is to a whole `rlimit`.
        match unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &none) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec there is one system call; nothing is allocated or locked.
    unsafe { command.pre_exec(limit) };
    let (code, _, err) = told(command.stdout(out).output().unwrap());
    assert_eq!(code, 1);
    assert!(
        err.starts_with("error: cannot write to standard output: File too large"),
        "{err}"
    );
}

#[test]
fn errors_that_cannot_be_written_keep_their_exit_code() {
    let folder = folder(&[]);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let status = launcher(folder.path(), &["check"])
        .stderr(full)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn a_wrong_level_of_the_log_is_a_usage_error() {
    let folder = folder(&[]);
    let output = launcher(folder.path(), &["formats"])
        .env("LAUNCHER_LOG", "loud")
        .output();
    let (code, _, err) = told(output.unwrap());
    assert_eq!(code, 2);
    assert!(
        err.starts_with("error: LAUNCHER_LOG is \"loud\", expected error, warn,"),
        "{err}"
    );
}

#[test]
fn completions_are_scripts_that_know_every_command() {
    let folder = folder(&[]);
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (code, out, err) = run(folder.path(), &["completions", shell]);
        assert_eq!((code, &*err), (0, ""), "{shell}");
        for word in ["console", "resize", "shrink"] {
            assert!(out.contains(word), "{shell} does not complete {word}");
        }
    }
    let (_, script, _) = run(folder.path(), &["completions", "bash"]);
    fs::write(folder.path().join("script"), script).unwrap();
    let mut bash = Command::new("bash");
    let read = bash.args(["-n", "script"]).current_dir(folder.path());
    assert_eq!(
        told(read.output().unwrap()),
        (0, String::new(), String::new())
    );
    assert_eq!(run(folder.path(), &["completions", "cmd"]).0, 2);
}

#[test]
fn the_manual_has_a_page_for_every_command() {
    let folder = folder(&[]);
    let (code, page, err) = run(folder.path(), &["man"]);
    assert_eq!((code, &*err), (0, ""));
    assert!(
        page.contains(".TH launcher 1") && page.contains(".SH NAME"),
        "{page}"
    );
    assert_eq!(run(folder.path(), &["man", "man/man1"]).0, 0);
    for name in [
        "launcher",
        "launcher-up",
        "launcher-disk",
        "launcher-disk-resize",
    ] {
        let page = folder.path().join(format!("man/man1/{name}.1"));
        let page = fs::read_to_string(page).unwrap();
        assert!(page.contains(&name.replace('-', "\\-")), "{page}");
    }
    fs::write(folder.path().join("file"), "").unwrap();
    let (code, _, err) = run(folder.path(), &["man", "file"]);
    assert_eq!(code, 1);
    assert!(err.starts_with("error: cannot write the manual: "), "{err}");
}
