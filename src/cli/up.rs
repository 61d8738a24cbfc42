//! `launcher up`.

use std::path::PathBuf;

use clap::Args;
use formats::Engine;

use crate::vm::{self, UpOptions};
use crate::{Error, Result, config};

/// Boot a VM and stay with it until it ends
#[derive(Args)]
#[command(after_help = "Example:\n  launcher up vm.toml")]
pub(super) struct Up {
    /// TOML file of the VM, or the folder of its vm.toml [default: vm.toml]
    vm: Option<PathBuf>,
    /// Go on where the host cannot boot an unmodified kernel
    #[arg(long)]
    force: bool,
}

impl Up {
    pub(super) fn run(self) -> Result<u8> {
        let engine = match std::env::var_os(VARIABLE) {
            None => Engine::Auto,
            Some(value) => engine(&value.to_string_lossy())?,
        };
        let vm = config::load(&super::file(self.vm))?;
        let force = self.force;
        vm::run(&vm, &UpOptions { force, engine })
    }
}

/// The environment variable that sets how disks do their I/O.
const VARIABLE: &str = "LAUNCHER_IO";

fn engine(word: &str) -> Result<Engine> {
    match word {
        "auto" | "" => Ok(Engine::Auto),
        "io_uring" => Ok(Engine::IoUring),
        "threads" => Ok(Engine::Threads),
        _ => Err(Error::usage(format!(
            "{VARIABLE} is {word:?}, expected auto, io_uring or threads"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_one_of_three_words() {
        assert_eq!(engine("auto").unwrap(), Engine::Auto);
        assert_eq!(engine("io_uring").unwrap(), Engine::IoUring);
        assert_eq!(engine("threads").unwrap(), Engine::Threads);
        let error = engine("thread").unwrap_err();
        assert_eq!(error.exit, 2);
        assert_eq!(
            error.to_string(),
            "error: LAUNCHER_IO is \"thread\", expected auto, io_uring or threads"
        );
    }
}
