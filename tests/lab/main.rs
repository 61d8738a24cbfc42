//! The lab: real Linux guests, booted by the built `launcher`.
//!
//! `cargo test --test lab [-- [FILTER]… [--list] [--exact] [--skip FILTER] [--test-threads N] [--repeat N]]`
//!
//! Where the host's KVM boots a stock kernel the cases run right here. Elsewhere this same program is
//! carried into one outer machine (`scripts/outer`) and runs all of them there; its lines are passed on as
//! they come. Nothing is ever skipped: a machine that can do neither fails.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "all of this is test code, which clippy cannot see without #[test]"
)]

mod blocks;
mod boot;
mod client;
mod configs;
mod console;
mod control;
mod disks;
mod errors;
mod from_block;
mod guest;
mod hang;
mod kills;
mod lifecycle;
mod machine;
mod outer;
mod qcow2;
mod resize;
mod runner;
mod stream;
mod vhost;

use std::process::ExitCode;

fn main() -> ExitCode {
    let options = match runner::Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("error: {message}");
            return ExitCode::from(2);
        }
    };
    let all = [
        boot::CASES,
        configs::CASES,
        from_block::CASES,
        disks::CASES,
        blocks::CASES,
        lifecycle::CASES,
        console::CASES,
        errors::CASES,
        qcow2::CASES,
        kills::CASES,
        resize::CASES,
        control::CASES,
        machine::CASES,
        vhost::CASES,
    ]
    .concat();
    let cases = options.select(&all);
    let filtered = all.len().saturating_sub(cases.len());
    if options.list {
        for case in &cases {
            println!("{}: test", case.name);
        }
        return ExitCode::SUCCESS;
    }
    let inside = std::env::var_os(guest::FILES).is_some();
    let passed = if cases.is_empty() || inside {
        runner::run(&cases, filtered, options.threads)
    } else {
        match outer::prepare(&cases) {
            Ok(()) if outer::kvm_boots() => runner::run(&cases, filtered, options.threads),
            Ok(()) => outer::run(&cases, filtered),
            Err(message) => {
                println!("error: {message}");
                runner::summary(0, cases.len(), filtered, std::time::Duration::ZERO);
                false
            }
        }
    };
    if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(101)
    }
}
