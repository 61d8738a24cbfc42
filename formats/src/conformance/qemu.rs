//! qemu-img and qemu-io, the judges.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Output};

/// Runs a program in `directory`.
pub fn run<S: AsRef<OsStr>>(
    directory: &Path,
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<Output, String> {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(directory);
    command.output().map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!(
            "`{program}` is not here: scripts/install-packages installs it (Debian: qemu-utils)"
        ),
        _ => format!("{program}: {error}"),
    })
}

/// Runs a program that must succeed; what it wrote to standard output.
pub fn done<S: AsRef<OsStr>>(
    directory: &Path,
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<String, String> {
    let arguments: Vec<_> = arguments
        .into_iter()
        .map(|argument| argument.as_ref().to_owned())
        .collect();
    let output = run(directory, program, &arguments)?;
    let line = || {
        let words: Vec<_> = arguments.iter().map(|it| it.to_string_lossy()).collect();
        format!("{program} {}", words.join(" "))
    };
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{}: {}: {}", line(), output.status, text(&output))),
    }
}

/// Runs qemu-img, which must succeed.
pub fn img(directory: &Path, line: &str) -> Result<String, String> {
    done(directory, "qemu-img", line.split_whitespace())
}

/// Runs commands of qemu-io on an image; every one must succeed.
pub fn io(directory: &Path, image: &str, commands: &[String]) -> Result<String, String> {
    // Without `-d unmap` a discard does nothing at all.
    let mut arguments = vec!["-f", "qcow2", "-d", "unmap"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    let said = done(directory, "qemu-io", &arguments)?;
    // Its exit status tells of the last one only.
    match said.contains("failed") || said.contains("rror") {
        true => Err(format!("qemu-io {}: {said}", arguments.join(" "))),
        false => Ok(said),
    }
}

/// All that a program wrote.
pub fn text(output: &Output) -> String {
    let both = [&output.stderr[..], &output.stdout].concat();
    String::from_utf8_lossy(&both).trim().to_owned()
}

/// What a check of an image counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// What may have damaged data, or will.
    pub corruptions: u64,
    /// Clusters that nothing refers to.
    pub leaks: u64,
}

impl Found {
    /// Nothing.
    pub const NOTHING: Found = Found {
        corruptions: 0,
        leaks: 0,
    };
}

/// What `qemu-img check` finds in an image, which it does not repair, and what it says.
///
/// # Errors
///
/// It could not check all of it.
pub fn examine(directory: &Path, image: &str) -> Result<(Found, String), String> {
    let arguments = ["check", "-f", "qcow2", image];
    let output = run(directory, "qemu-img", arguments)?;
    let said = text(&output);
    let failed = || format!("qemu-img check: {}: {said}", output.status);
    let count = |what: &str| {
        let line = said.lines().find_map(|line| line.strip_suffix(what));
        match line {
            None | Some("No") => Ok(0),
            Some(count) => count.parse().map_err(|_| failed()),
        }
    };
    let found = Found {
        corruptions: count(" errors were found on the image.")?,
        leaks: count(" leaked clusters were found on the image.")?,
    };
    match (output.status.code(), found) {
        (Some(0), Found::NOTHING) => {}
        (Some(2), found) if found.corruptions > 0 => {}
        (Some(3), found) if found.corruptions == 0 && found.leaks > 0 => {}
        _ => return Err(failed()),
    }
    Ok((found, said))
}

/// Checks an image without repairing it: anything but leaks is an error.
pub fn check(directory: &Path, image: &str) -> Result<(Found, String), String> {
    match examine(directory, image)? {
        (found, said) if found.corruptions > 0 => Err(format!("qemu-img check: {said}")),
        leaks_at_most => Ok(leaks_at_most),
    }
}
