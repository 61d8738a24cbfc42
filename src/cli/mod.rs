//! The command line: one file a command, or a few that are alike.

mod check;
mod choice;
mod completions;
mod config;
mod console;
mod disk;
mod doctor;
mod explain;
mod fleet;
mod formats;
mod init;
mod lock;
pub mod log;
mod logs;
mod man;
mod orders;
mod output;
mod prepare;
mod ps;
mod reset;
mod schema;
mod span;
mod status;
mod target;
mod up;
mod wait;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::Vm;
use crate::control::Place;
use crate::{Result, exit};

/// Boot virtual machines on Linux/KVM: a VM is one TOML file
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
    Ps(ps::Ps),
    Status(status::Show),
    Console(console::Console),
    Logs(logs::Logs),
    Stop(orders::Stop),
    Kill(orders::Kill),
    Reboot(orders::Reboot),
    Pause(orders::Pause),
    Resume(orders::Resume),
    Wait(wait::Wait),
    Disk(disk::Disk),
    Reset(reset::Reset),
    Init(init::Init),
    Check(check::Check),
    Config(config::Config),
    Explain(explain::Explain),
    Schema(schema::Schema),
    Lock(lock::Lock),
    Prepare(prepare::Prepare),
    Formats(formats::Formats),
    Doctor(doctor::Doctor),
    Completions(completions::Completions),
    Man(man::Man),
}

/// The command line as a whole: what manual, completions and reference are made of.
pub fn command() -> clap::Command {
    Cli::command().after_help(epilogue())
}

/// Parses the command line, does what it says and returns the exit code.
///
/// Help and usage errors are printed here; any other error is the caller's to print.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Result<u8> {
    let large_files = ignore_file_size_signal();
    let parsed = command()
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
        Command::Ps(ps) => ps.run(),
        Command::Status(status) => status.run(),
        Command::Console(console) => console.run(),
        Command::Logs(logs) => logs.run(),
        Command::Stop(stop) => stop.run(),
        Command::Kill(kill) => kill.run(),
        Command::Reboot(reboot) => reboot.run(),
        Command::Pause(pause) => pause.run(),
        Command::Resume(resume) => resume.run(),
        Command::Wait(wait) => wait.run(),
        Command::Disk(disk) => disk.run(),
        Command::Reset(reset) => reset.run(),
        Command::Init(init) => init.run(),
        Command::Check(check) => check.run(),
        Command::Config(config) => config.run(),
        Command::Explain(explain) => explain.run(),
        Command::Schema(schema) => schema.run(),
        Command::Lock(lock) => lock.run(),
        Command::Prepare(prepare) => prepare.run(),
        Command::Formats(formats) => formats.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(),
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

/// Where a VM's socket and logs are.
fn place(vm: &Vm) -> Result<Place> {
    Place::of(vm.named.then_some(&*vm.name), &vm.file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_help_ends_with_an_example() {
        fn check(command: &mut clap::Command) {
            let help = command.render_long_help().to_string();
            let (_, examples) = help.rsplit_once("\nExample").unwrap();
            let (_, examples) = examples.split_once(":\n").unwrap();
            for example in examples.lines() {
                assert!(example.starts_with("  launcher "), "{help}");
            }
            command.get_subcommands_mut().for_each(check);
        }
        let mut cli = command();
        cli.build();
        check(&mut cli);
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
