//! `launcher doctor`.

use std::io::IsTerminal;

use clap::Args;

use super::output::{print, print_json, table};
use crate::vm::host::{self, Check, State};
use crate::{Result, exit};

/// Check whether this host can run VMs, and say what to do
#[derive(Args)]
#[command(after_help = "Example:\n  launcher doctor")]
pub(super) struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self) -> Result<u8> {
        let checks = host::checks();
        match self.json {
            true => print_json(&checks)?,
            false => print(&list(&checks, signs()))?,
        }
        let failed = checks.iter().any(|check| check.state == State::Failed);
        Ok(if failed { exit::FAILED } else { exit::DONE })
    }
}

/// What stands for ok, warning and failed: one character each where people see it.
type Signs = [&'static str; 3];

const CHARACTERS: Signs = ["✓", "!", "✗"];
const WORDS: Signs = ["ok", "warn", "FAIL"];

fn signs() -> Signs {
    // The first that is set and not empty decides, as for the C library.
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .filter_map(std::env::var_os)
        .find(|value| !value.is_empty())
        .unwrap_or_default();
    let locale = locale.to_string_lossy().to_ascii_lowercase();
    let utf8 = locale.ends_with("utf-8") || locale.ends_with("utf8");
    match utf8 && std::io::stdout().is_terminal() {
        true => CHARACTERS,
        false => WORDS,
    }
}

/// The checks as people see them, each piece of advice below its line.
fn list(checks: &[Check], [ok, warning, failed]: Signs) -> String {
    let mut rows = Vec::new();
    for check in checks {
        let sign = match check.state {
            State::Ok => ok,
            State::Warning => warning,
            State::Failed => failed,
        };
        rows.push([sign, check.name, &check.detail].map(str::to_owned));
        for advice in &check.advice {
            rows.push(["", "", advice].map(str::to_owned));
        }
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_stands_below_its_check() {
        let check = |name, state, detail: &str, advice: &[&str]| Check {
            name,
            state,
            detail: detail.to_owned(),
            advice: advice.iter().map(|advice| (*advice).to_owned()).collect(),
        };
        let checks = [
            check("kvm", State::Ok, "version 12", &[]),
            check(
                "io_uring",
                State::Warning,
                "refused",
                &["allow it", "or not"],
            ),
            check("memory", State::Failed, "none", &["buy some"]),
        ];
        assert_eq!(
            list(&checks, CHARACTERS),
            "✓  kvm       version 12\n\
             !  io_uring  refused\n             allow it\n             or not\n\
             ✗  memory    none\n             buy some\n"
        );
        assert!(list(&checks, WORDS).starts_with("ok    kvm       version 12\nwarn  io_uring"));
    }
}
