//! `launcher`, run in a folder as a user runs it.

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// `launcher` with these arguments, not started yet; what it runs is found in `run_time`. It has
/// no input, and no settings of the one who runs the tests.
pub(crate) fn launcher(folder: &Path, run_time: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_launcher"));
    command
        .args(arguments)
        .current_dir(folder)
        .env_remove("LAUNCHER_LOG")
        .env("XDG_RUNTIME_DIR", run_time)
        .stdin(Stdio::null());
    command
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Done {
        Done {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}
