//! `launcher stop`, `kill`, `reboot`, `pause` and `resume`: orders to one VM or to several at
//! once.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::Args;

use super::output::{complain, print};
use super::target::{Target, ask};
use super::{fleet, span};
use crate::control::messages::{How, Order, Stopped};
use crate::{Error, Result, exit};

/// Press the power button of VMs, and end those that take too long
///
/// A guest that has not powered off in time is ended by force, its disks flushed. Which of the
/// two it was is printed.
#[derive(Args)]
#[command(after_help = "Examples:\n  launcher stop web --timeout 2m\n  launcher stop --all fleet")]
pub(super) struct Stop {
    #[command(flatten)]
    vms: Vms,
    /// How long the guest has, such as 500ms, 30s or 2m [default: its `stop_timeout`]
    #[arg(long, value_name = "TIME", value_parser = span::parse)]
    timeout: Option<Duration>,
}

/// End VMs at once, by force; their disks are flushed
#[derive(Args)]
#[command(after_help = "Example:\n  launcher kill web")]
pub(super) struct Kill {
    #[command(flatten)]
    vms: Vms,
}

/// Reset VMs, as the button on a case does
#[derive(Args)]
#[command(after_help = "Example:\n  launcher reboot web")]
pub(super) struct Reboot {
    #[command(flatten)]
    vms: Vms,
}

/// Have the vCPUs of VMs stand still
#[derive(Args)]
#[command(after_help = "Example:\n  launcher pause web")]
pub(super) struct Pause {
    #[command(flatten)]
    vms: Vms,
}

/// Let the vCPUs of paused VMs run again
#[derive(Args)]
#[command(after_help = "Example:\n  launcher resume web")]
pub(super) struct Resume {
    #[command(flatten)]
    vms: Vms,
}

/// The VMs that an order goes to.
#[derive(Args)]
struct Vms {
    /// TOML files of VMs, the folders of their vm.toml, or their names
    /// [default: vm.toml]
    vm: Vec<PathBuf>,
    /// Those of a folder that run: of each *.toml in it, and the vm.toml of each folder in it
    #[arg(long, value_name = "DIR", conflicts_with = "vm")]
    all: Option<PathBuf>,
}

impl Stop {
    pub(super) fn run(self) -> Result<u8> {
        let timeout_ms = self.timeout.map(|timeout| timeout.as_millis() as u64);
        self.vms
            .each(|target| end(target, Order::Stop { timeout_ms }))
    }
}

impl Kill {
    pub(super) fn run(self) -> Result<u8> {
        self.vms.each(|target| end(target, Order::Kill))
    }
}

impl Reboot {
    pub(super) fn run(self) -> Result<u8> {
        self.vms
            .each(|target| obey(target, Order::Reboot, "reboots"))
    }
}

impl Pause {
    pub(super) fn run(self) -> Result<u8> {
        self.vms
            .each(|target| obey(target, Order::Pause, "is paused"))
    }
}

impl Resume {
    pub(super) fn run(self) -> Result<u8> {
        self.vms
            .each(|target| obey(target, Order::Resume, "runs again"))
    }
}

impl Vms {
    /// Does the same to every VM, all at once, and prints what comes of it in their order. The
    /// exit code is that of the first that failed.
    fn each(self, act: impl Fn(&Target) -> Result<String> + Sync) -> Result<u8> {
        let mut vms: Vec<_> = match self.all {
            Some(folder) => running(&folder)?.into_iter().map(Some).collect(),
            None => self.vm.into_iter().map(Some).collect(),
        };
        if vms.is_empty() {
            vms.push(None);
        }
        let act = |vm| Target::running(vm).and_then(|target| act(&target));
        if vms.len() == 1 {
            // The error of a single one is that of the command.
            print(&format!("{}\n", act(vms.pop().flatten())?))?;
            return Ok(exit::DONE);
        }
        let mut code = exit::DONE;
        thread::scope(|scope| {
            let all: Vec<_> = vms.into_iter().map(|vm| scope.spawn(|| act(vm))).collect();
            for one in all {
                let done = one
                    .join()
                    .unwrap_or_else(|_| Err(Error::failed("it was not tried to the end")));
                match done {
                    Ok(said) => print(&format!("{said}\n"))?,
                    Err(error) => {
                        complain(&error);
                        if code == exit::DONE {
                            code = error.exit;
                        }
                    }
                }
            }
            Ok(code)
        })
    }
}

/// The files of a folder's VMs that run, of which there must be one.
fn running(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for file in fleet::files(folder)? {
        if Target::of(Some(file.clone()))?.is_running() {
            files.push(file);
        }
    }
    match files.is_empty() {
        false => Ok(files),
        true => {
            let folder = folder.display();
            let mut error = Error::failed(format!("no VM of the folder {folder} is running"))
                .help(format!("start them with `launcher up --all {folder}`"));
            error.exit = exit::NOT_RUNNING;
            Err(error)
        }
    }
}

/// Has a VM ended, and tells how it did.
fn end(target: &Target, order: Order) -> Result<String> {
    let stopped: Stopped = ask(&mut target.connect_for_order()?, order, &mut |_| {})?;
    ended(&target.name(), &stopped)
}

/// How a VM ended; an error if its disks may lack something.
fn ended(name: &str, stopped: &Stopped) -> Result<String> {
    let why = match &stopped.why {
        Some(why) => format!(": {why}"),
        None => String::new(),
    };
    match stopped.how {
        How::Guest => Ok(format!("{name} has powered off{why}")),
        How::Forced => Ok(format!("{name} was ended by force{why}")),
        How::Crashed => Ok(format!("{name} has crashed{why}")),
        How::Failed => Err(Error::failed(format!("`{name}` has ended badly{why}"))),
    }
}

fn obey(target: &Target, order: Order, done: &str) -> Result<String> {
    target.connect_for_order()?.ask(order, &mut |_| {})?;
    Ok(format!("{} {done}", target.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_whether_the_guest_or_force_has_ended_a_vm() {
        let ended = |how, why: Option<&str>| {
            let stopped = Stopped {
                how,
                why: why.map(str::to_owned),
                exit_code: 0,
            };
            super::ended("web", &stopped)
        };
        assert_eq!(ended(How::Guest, None).unwrap(), "web has powered off");
        assert_eq!(
            ended(How::Forced, Some("it did not power off within 30s")).unwrap(),
            "web was ended by force: it did not power off within 30s"
        );
        assert_eq!(ended(How::Crashed, None).unwrap(), "web has crashed");
        let error = ended(How::Failed, Some("a.img: no space")).unwrap_err();
        assert_eq!(error.exit, 1);
        assert_eq!(
            error.to_string(),
            "error: `web` has ended badly: a.img: no space"
        );
    }
}
