//! `launcher completions`.

use clap::Args;
use clap_complete::Shell;

use super::output::print;
use crate::{Error, Result, exit};

/// Print a script that completes the command line in a shell
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher completions fish > ~/.config/fish/completions/launcher.fish\n  launcher completions bash > ~/.local/share/bash-completion/completions/launcher"
)]
pub(super) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> Result<u8> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::command(), "launcher", &mut script);
        let script = String::from_utf8(script)
            .map_err(|error| Error::failed(format!("cannot write the script: {error}")))?;
        print(&script)?;
        Ok(exit::DONE)
    }
}
