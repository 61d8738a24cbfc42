//! `launcher ps`.

use std::thread;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::output::{print, print_json, rough, table};
use super::span;
use super::target::ask;
use crate::control::messages::{Order, State, Status};
use crate::control::{Client, Owner, Place};
use crate::{Error, Result, exit};

/// List the VMs that run
#[derive(Args)]
#[command(after_help = "Example:\n  launcher ps --json")]
pub(super) struct Ps {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A VM that runs.
#[derive(Serialize)]
struct Running {
    name: String,
    /// Process id of its `launcher up`.
    pid: u32,
    /// Its TOML file.
    file: String,
    /// Milliseconds of Unix time.
    started_ms: u64,
    /// How it is; none if it does not answer.
    status: Option<Status>,
    /// Why it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Ps {
    pub(super) fn run(self) -> Result<u8> {
        let running = running()?;
        match self.json {
            true => print_json(&running)?,
            false => print(&listing(&running))?,
        }
        Ok(exit::DONE)
    }
}

/// Every VM that runs. All are asked at once: one that does not answer holds up nobody.
fn running() -> Result<Vec<Running>> {
    let mut owned = Vec::new();
    for place in Place::all()? {
        match place.owner() {
            Ok(owner) => owned.extend(owner.map(|owner| (place, owner))),
            // What is wrong with one folder is no reason not to list the others.
            Err(error) => tracing::warn!("{error}"),
        }
    }
    Ok(thread::scope(|scope| {
        let asked: Vec<_> = owned
            .into_iter()
            .map(|(place, owner)| {
                let socket = place.socket();
                let status = scope.spawn(move || {
                    let mut client = Client::connect(&socket)?;
                    ask::<Status>(&mut client, Order::Status, &mut |_| {})
                });
                (owner, status)
            })
            .collect();
        let answered = asked.into_iter().map(|(owner, status)| {
            let broken = |_| Err(Error::failed("it was not asked to the end"));
            Running::of(owner, status.join().unwrap_or_else(broken))
        });
        answered.collect()
    }))
}

impl Running {
    fn of(owner: Owner, status: Result<Status>) -> Running {
        let (status, error) = match status {
            Ok(status) => (Some(status), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Running {
            name: owner.name,
            pid: owner.pid,
            file: owner.file.display().to_string(),
            started_ms: owner.started_ms,
            status,
            error,
        }
    }
}

/// What a VM is doing, in a word.
pub(super) fn word(status: &Status) -> &'static str {
    match status.state {
        State::Running if status.booted => "running",
        State::Running => "booting",
        State::Paused => "paused",
        State::Stopping => "stopping",
    }
}

/// The VMs as people see them.
fn listing(running: &[Running]) -> String {
    if running.is_empty() {
        return "no VM is running\n".to_owned();
    }
    let heads = [
        "NAME", "STATE", "UPTIME", "VCPUS", "MEMORY", "DISKS", "PID", "FILE",
    ];
    let mut rows = vec![heads.map(str::to_owned)];
    for vm in running {
        let cells = match &vm.status {
            Some(status) => [
                word(status).to_owned(),
                span::rough(Duration::from_millis(status.uptime_ms)),
                status.vcpus.len().to_string(),
                rough(status.memory.size),
                status.disks.len().to_string(),
            ],
            None => ["no answer", "", "", "", ""].map(str::to_owned),
        };
        let [state, uptime, vcpus, memory, disks] = cells;
        let (pid, file) = (vm.pid.to_string(), vm.file.clone());
        rows.push([
            vm.name.clone(),
            state,
            uptime,
            vcpus,
            memory,
            disks,
            pid,
            file,
        ]);
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::messages::{MemoryStatus, VcpuStatus};

    #[test]
    fn a_vm_is_a_row_and_one_that_does_not_answer_is_one_too() {
        let vm = |name: &str, status| Running {
            name: name.into(),
            pid: 7,
            file: "/vm.toml".into(),
            started_ms: 0,
            status,
            error: None,
        };
        let status = Status {
            name: "web".into(),
            file: "/vm.toml".into(),
            pid: 7,
            state: State::Running,
            booted: false,
            uptime_ms: 61_000,
            vcpus: vec![VcpuStatus { time_ms: 1 }; 2],
            memory: MemoryStatus {
                size: 1 << 29,
                resident: 1 << 20,
            },
            disks: Vec::new(),
        };
        assert_eq!(
            listing(&[vm("web", Some(status)), vm("db", None)]),
            "NAME  STATE      UPTIME  VCPUS  MEMORY  DISKS  PID  FILE\n\
             web   booting    1m 1s   2      512MiB  0      7    /vm.toml\n\
             db    no answer                                7    /vm.toml\n"
        );
        assert_eq!(listing(&[]), "no VM is running\n");
    }
}
