//! The command line: one file a command.

mod check;
mod doctor;
mod formats;
pub mod log;
mod output;
mod up;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::{Result, exit};

/// Boots virtual machines on Linux/KVM. A VM is one TOML file.
#[derive(Parser)]
#[command(
    name = "launcher",
    version,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Up(up::Up),
    Check(check::Check),
    Formats(formats::Formats),
    Doctor(doctor::Doctor),
}

/// Parses the command line, does what it says and returns the exit code.
///
/// Help and usage errors are printed here; any other error is the caller's to print.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Result<u8> {
    let large_files = ignore_file_size_signal();
    let parsed = Cli::command()
        .after_help(epilogue())
        .try_get_matches_from(arguments)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            // A reader that is gone needs no help.
            let _ = error.print();
            return Ok(match error.use_stderr() {
                true => exit::USAGE,
                false => exit::DONE,
            });
        }
    };
    log::init()?;
    if let Err(error) = large_files {
        tracing::warn!("SIGXFSZ cannot be ignored: {error}");
    }
    match cli.command {
        Command::Up(up) => up.run(),
        Command::Check(check) => check.run(),
        Command::Formats(formats) => formats.run(),
        Command::Doctor(doctor) => doctor.run(),
    }
}

/// Has a write past RLIMIT_FSIZE fail with EFBIG, as any other failing write does: the signal
/// that comes with it would end the process, and a VM with it.
fn ignore_file_size_signal() -> io::Result<()> {
    // SAFETY: to ignore a signal changes no memory of this process and runs no handler.
    match unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// What stands below the list of commands.
fn epilogue() -> String {
    let codes = exit::ALL
        .iter()
        .map(|(code, meaning)| format!("  {code:>2}  {meaning}\n"));
    format!(
        "Environment:\n  \
         LAUNCHER_LOG  error, warn, info, debug or trace: what is logged [default: warn]\n  \
         LAUNCHER_IO   auto, io_uring or threads: how disks do their I/O [default: auto]\n\n\
         Exit codes:\n{}\nExample:\n  launcher up vm.toml",
        codes.collect::<String>()
    )
}

/// The file that a VM's argument means: none is `vm.toml`, a folder its `vm.toml`.
fn file(vm: Option<PathBuf>) -> PathBuf {
    match vm {
        None => PathBuf::from("vm.toml"),
        Some(folder) if folder.is_dir() => folder.join("vm.toml"),
        Some(file) => file,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_help_ends_with_an_example() {
        let mut cli = Cli::command().after_help(epilogue());
        cli.build();
        let all = cli.get_subcommands().cloned().chain([cli.clone()]);
        for mut command in all.collect::<Vec<_>>() {
            let help = command.render_long_help().to_string();
            let (_, example) = help.rsplit_once("Example:\n").unwrap();
            assert!(example.trim_start().starts_with("launcher "), "{help}");
        }
    }

    #[test]
    fn every_exit_code_is_listed() {
        let help = epilogue();
        for code in [
            "   0  done\n",
            "   2  wrong usage",
            "  33  the guest crashed",
            "  34  ",
        ] {
            assert!(help.contains(code), "{help}");
        }
    }

    #[test]
    fn a_vm_is_its_file_or_the_vm_toml_of_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        assert_eq!(file(None), PathBuf::from("vm.toml"));
        assert_eq!(file(Some(path.clone())), path.join("vm.toml"));
        assert_eq!(file(Some(path.join("web.toml"))), path.join("web.toml"));
    }
}
