//! What the tests of images share: QEMU's tools, which judge them.

pub(super) mod damage;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};

fn run(program: &str, args: &[&OsStr]) -> Output {
    let mut command = Command::new(program);
    command.args(args).env("LC_ALL", "C");
    command
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Runs `qemu-img` with these words, of which `IMAGE` is the image, or else with the image after
/// them; returns what it says.
pub(super) fn qemu_img(words: &str, image: &Path) -> String {
    let mut args: Vec<&OsStr> = words.split_whitespace().map(OsStr::new).collect();
    match args.iter_mut().find(|word| **word == "IMAGE") {
        Some(word) => *word = image.as_ref(),
        None => args.push(image.as_ref()),
    }
    let output = run("qemu-img", &args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "qemu-img {words} {image:?}: {said}"
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Creates an image with QEMU.
pub(super) fn qemu_create(options: &str, image: &Path, size: &str) {
    let mut args: Vec<&OsStr> = ["create", "-q", "-f", "qcow2"].map(OsStr::new).into();
    if !options.is_empty() {
        args.extend(["-o", options].map(OsStr::new));
    }
    args.extend([image.as_os_str(), OsStr::new(size)]);
    let output = run("qemu-img", &args);
    assert!(output.status.success(), "{options}: {output:?}");
}

/// Runs commands of `qemu-io` on an image, one after another.
pub(super) fn qemu_io(commands: &[&str], image: &Path) -> String {
    let mut args: Vec<&OsStr> = ["-f", "qcow2"].map(OsStr::new).into();
    for command in commands {
        args.extend(["-c", command].map(OsStr::new));
    }
    args.push(image.as_os_str());
    let output = run("qemu-io", &args);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{commands:?}: {output:?}");
    assert!(!said.contains("verification failed"), "{said}");
    said
}

/// The numbers that `qemu-img check` counts, whatever it finds; empty if it can check nothing.
pub(super) fn qemu_check(image: &Path) -> BTreeMap<String, u64> {
    let args = ["check", "--output=json", "-f", "qcow2"].map(OsStr::new);
    let output = run("qemu-img", &[&args[..], &[image.as_os_str()]].concat());
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    // One number a line: `    "leaks": 3,`
    said.lines()
        .filter_map(|line| {
            let (name, value) = line.trim().trim_end_matches(',').split_once(": ")?;
            Some((name.trim_matches('"').to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// Asserts that the disks of two images read alike.
pub(super) fn assert_same_disk(one: &Path, other: &Path) {
    let args = ["compare", "-f", "qcow2", "-F", "qcow2"].map(OsStr::new);
    let images = [one.as_os_str(), other.as_os_str()];
    let output = run("qemu-img", &[&args[..], &images].concat());
    assert!(output.status.success(), "{output:?}");
}

/// Asserts that QEMU finds nothing wrong with an image.
pub(super) fn assert_sound(image: &Path) {
    let found = qemu_check(image);
    assert_eq!(found.get("check-errors"), Some(&0), "{found:?}");
    for wrong in ["corruptions", "leaks"] {
        assert_eq!(found.get(wrong), None, "{image:?}: {found:?}");
    }
}
