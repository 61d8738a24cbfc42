//! `launcher up`.

mod detach;
mod several;

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use formats::Engine;

use super::choice::Chosen;
use super::{fleet, span};
use crate::config::{ConsoleMode, Vm};
use crate::control::messages::{Event, Stopped};
use crate::control::{Laid, Owner, Server};
use crate::vm::{self, UpOptions};
use crate::{Error, Result, config, lock, sources};
use detach::Ready;

/// Boot a VM and stay with it until it ends, or boot several and leave them running
///
/// Of several VMs all files are read, and what they name is fetched, built and compared, before
/// the first starts. Each then runs in a process of its own, as with --detach. The exit code is
/// that of the first that failed.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher up vm.toml\n  launcher up --detach --wait boot vm.toml\n  launcher up vm.toml -p ci --set memory=2GiB\n  launcher up web.toml db.toml\n  launcher up --all fleet --wait boot"
)]
pub(super) struct Up {
    /// TOML files of VMs, or the folders of their vm.toml [default: vm.toml]
    vm: Vec<PathBuf>,
    /// Boot every VM of a folder: each *.toml in it, and the vm.toml of each folder in it
    #[arg(long, value_name = "DIR", conflicts_with = "vm")]
    all: Option<PathBuf>,
    #[command(flatten)]
    chosen: Chosen,
    /// Return once the VM runs, and leave it running
    #[arg(short, long)]
    detach: bool,
    /// With --detach or of several, return only once each guest is up; see `console.ready`
    #[arg(long, value_name = "WHAT")]
    wait: Option<Wait>,
    /// How long to wait for that
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = span::parse)]
    wait_timeout: Duration,
    /// Name of the VM, instead of its file's
    #[arg(long)]
    name: Option<String>,
    /// Listen at another control socket as well
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Boot only what the VM's lock file has; see `launcher lock`. If anything differs, all of it
    /// is said, and nothing is booted (exit code 2)
    #[arg(long)]
    locked: bool,
    /// Have every disk as with `ephemeral = true`: what the guest writes is dropped at exit. A disk
    /// with `ro = true` stays as it is; `sparse = false` is set aside, as nothing is allocated for
    /// an image that is not written. Every image must exist
    #[arg(long)]
    ephemeral: bool,
    /// Go on where the host cannot boot an unmodified kernel
    #[arg(long)]
    force: bool,
    /// The pipe to the process that started this one detached
    #[arg(long, hide = true, value_name = "FD", conflicts_with = "detach")]
    ready: Option<i32>,
}

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Wait {
    /// The guest's init or login prompt, or `console.ready`
    Boot,
}

impl Up {
    pub(super) fn run(mut self) -> Result<u8> {
        let several = match &self.all {
            Some(folder) => Some(fleet::files(folder)?),
            None if self.vm.len() > 1 => {
                let files = std::mem::take(&mut self.vm).into_iter();
                Some(files.map(|vm| super::file(Some(vm))).collect())
            }
            None => None,
        };
        match several {
            Some(files) => several::start(&self, &files),
            None if self.detach => detach::start(&self, self.vm.first().map(|vm| &**vm)),
            None if self.wait.is_some() => Err(Error::usage(
                "`--wait` is given without `--detach`, expected both",
            )
            .help("a VM in the foreground shows when its guest is up")),
            None => self.stay(),
        }
    }

    /// With --locked, refuses a VM that is not as its lock has it.
    fn check_lock(&self, vm: &Vm) -> Result<()> {
        match self.locked {
            true => lock::check(vm, &self.lock(vm)?),
            false => Ok(()),
        }
    }

    /// Where the VM's lock is.
    fn lock(&self, vm: &Vm) -> Result<lock::Place> {
        lock::Place::of(&vm.file, &self.chosen.choice())
    }

    /// Runs the VM in this process.
    fn stay(self) -> Result<u8> {
        let engine = engine()?;
        let ready = self.ready.map(Ready::inherited).transpose()?;
        let file = super::file(self.vm.first().cloned());
        let mut vm = config::load(&file, &self.chosen.choice())?;
        if let Some(name) = &self.name {
            vm.rename(name)?;
        }
        sources::ensure(&vm)?;
        sources::verify(&vm)?;
        if self.locked {
            let lock = self.lock(&vm)?;
            lock::hold(&mut vm, &lock)?;
        }
        if self.ephemeral {
            // After the check: the lock is of what the file says.
            vm.drop_what_is_written()?;
        }
        let place = super::place(&vm)?;
        let claim = place.claim(&owner(&vm, self.chosen.laid()))?;
        let detached = ready.is_some();
        let kept = detached || vm.console.mode == ConsoleMode::Socket;
        let options = UpOptions {
            force: self.force,
            engine,
            detached,
            console_log: kept.then(|| place.console_log()),
        };
        let mut server = None;
        let ended = vm::run(
            &vm,
            &options,
            Box::new(|subject| {
                let started = Server::start(&claim, self.socket.as_deref(), subject)?;
                let publisher = started.publisher();
                server = Some(started);
                let mut waiting = ready.map(|ready| ready.running(&place)).transpose()?;
                Ok(Box::new(move |event| {
                    if event == Event::Booted
                        && let Some(waiting) = waiting.take()
                    {
                        waiting.booted();
                    }
                    publisher.publish(event);
                }))
            }),
        );
        if let Some(server) = server {
            let exit_code = match &ended.result {
                Ok(code) => *code,
                Err(error) => error.exit,
            };
            server.close(Stopped {
                how: ended.how,
                why: ended.why,
                exit_code,
            });
        }
        ended.result
    }
}

/// This process, as the owner of a VM.
pub(super) fn owner(vm: &Vm, laid: Laid) -> Owner {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    Owner {
        pid: std::process::id(),
        name: vm.name.clone(),
        file: std::fs::canonicalize(&vm.file).unwrap_or_else(|_| vm.file.clone()),
        started_ms: now.map_or(0, |now| now.as_millis().try_into().unwrap_or(u64::MAX)),
        laid,
    }
}

/// The environment variable that sets how disks do their I/O.
const VARIABLE: &str = "LAUNCHER_IO";

/// How disks do their I/O, as the environment has it.
pub(super) fn engine() -> Result<Engine> {
    match std::env::var_os(VARIABLE) {
        None => Ok(Engine::Auto),
        Some(value) => engine_of(&value.to_string_lossy()),
    }
}

fn engine_of(word: &str) -> Result<Engine> {
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
        assert_eq!(engine_of("auto").unwrap(), Engine::Auto);
        assert_eq!(engine_of("io_uring").unwrap(), Engine::IoUring);
        assert_eq!(engine_of("threads").unwrap(), Engine::Threads);
        let error = engine_of("thread").unwrap_err();
        assert_eq!(error.exit, 2);
        assert_eq!(
            error.to_string(),
            "error: LAUNCHER_IO is \"thread\", expected auto, io_uring or threads"
        );
    }
}
