//! `launcher man`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_mangen::Man as Page;

use super::output::print;
use crate::{Error, Result, exit};

/// Print the manual page, or write those of all commands
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher man | man -l -\n  launcher man ~/.local/share/man/man1"
)]
pub(super) struct Man {
    /// The folder that a page for every command is written to [default: print launcher's own]
    dir: Option<PathBuf>,
}

impl Man {
    pub(super) fn run(self) -> Result<u8> {
        let mut command = super::command();
        command.build();
        let Some(dir) = self.dir else {
            let mut text = Vec::new();
            Page::new(command).render(&mut text).map_err(failed)?;
            print(&String::from_utf8(text).map_err(|error| failed(io::Error::other(error)))?)?;
            return Ok(exit::DONE);
        };
        let written = fs::create_dir_all(&dir).and_then(|()| write(&command, &dir));
        written.map_err(failed)?;
        Ok(exit::DONE)
    }
}

fn failed(error: io::Error) -> Error {
    Error::failed(format!("cannot write the manual: {error}"))
}

/// Writes the pages of a command and of all below it.
fn write(command: &Command, dir: &Path) -> io::Result<()> {
    Page::new(command.clone()).generate_to(dir)?;
    command
        .get_subcommands()
        .try_for_each(|command| write(command, dir))
}
