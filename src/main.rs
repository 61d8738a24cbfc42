//! The binary: parse, run, print the error, exit code.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let code = launcher::cli::run(std::env::args_os()).unwrap_or_else(|error| {
        // Nobody is left to tell if standard error is gone.
        let _ = writeln!(std::io::stderr(), "{error}");
        error.exit
    });
    ExitCode::from(code)
}
