//! The binary: parse, run, print the error, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    let code = launcher::cli::run(std::env::args_os()).unwrap_or_else(|error| {
        launcher::messages::say(&error);
        error.exit
    });
    ExitCode::from(code)
}
