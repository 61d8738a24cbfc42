//! `launcher status`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use clap::Args;

use super::output::{print, print_json, rough, table};
use super::ps::word;
use super::span;
use super::target::{Target, ask};
use crate::config::size;
use crate::control::messages::{DiskStatus, Latency, Order, Status};
use crate::{Error, Result, exit};

/// How often `--watch` looks.
const EVERY: Duration = Duration::from_secs(1);

/// Show how a running VM is: vCPUs, memory, and what its disks have done
#[derive(Args)]
#[command(after_help = "Example:\n  launcher status web --watch")]
pub(super) struct Show {
    /// TOML file of the VM, the folder of its vm.toml, or its name [default: vm.toml]
    vm: Option<PathBuf>,
    /// Print JSON; with --watch, one line a second
    #[arg(long)]
    json: bool,
    /// Again every second, until the VM ends
    #[arg(long)]
    watch: bool,
}

impl Show {
    pub(super) fn run(self) -> Result<u8> {
        let target = Target::running(self.vm)?;
        if !self.watch {
            let status = target.status()?;
            match self.json {
                true => print_json(&status)?,
                false => print(&shown(&status, None))?,
            }
            return Ok(exit::DONE);
        }
        let mut client = target.connect()?;
        let mut before: Option<Status> = None;
        loop {
            let status: Status = match ask(&mut client, Order::Status, &mut |_| {}) {
                Ok(status) => status,
                // It has ended between two looks.
                Err(_) if before.is_some() && !runs(&target) => return Ok(exit::DONE),
                Err(error) => return Err(error),
            };
            if self.json {
                let line = serde_json::to_string(&status)
                    .map_err(|error| Error::failed(format!("cannot write JSON: {error}")))?;
                print(&(line + "\n"))?;
            } else {
                let clear = match std::io::stdout().is_terminal() {
                    true => "\x1b[H\x1b[J",
                    false if before.is_some() => "\n",
                    false => "",
                };
                print(&format!("{clear}{}", shown(&status, before.as_ref())))?;
            }
            if super::output::is_unread() {
                return Ok(exit::DONE);
            }
            before = Some(status);
            thread::sleep(EVERY);
        }
    }
}

fn runs(target: &Target) -> bool {
    matches!(target.place().owner(), Ok(Some(_)))
}

/// A VM as people see it. With how it was before, what it has done since.
fn shown(status: &Status, before: Option<&Status>) -> String {
    let uptime = span::rough(Duration::from_millis(status.uptime_ms));
    let mut text = format!("{} is {} for {uptime}\n", status.name, word(status));
    let mut rows = vec![
        ["file".to_owned(), status.file.clone()],
        ["process".to_owned(), status.pid.to_string()],
        [
            "memory".to_owned(),
            format!(
                "{}; its process takes {} on the host",
                size::show(status.memory.size),
                rough(status.memory.resident)
            ),
        ],
    ];
    for (index, vcpu) in status.vcpus.iter().enumerate() {
        let time = span::rough(Duration::from_millis(vcpu.time_ms));
        let before = before.and_then(|before| {
            let passed = status.uptime_ms.checked_sub(before.uptime_ms)?.max(1);
            let used = vcpu.time_ms.checked_sub(before.vcpus.get(index)?.time_ms)?;
            Some(format!(", {:.0}% now", used as f64 * 100.0 / passed as f64))
        });
        let used = format!("{time} of processor time{}", before.unwrap_or_default());
        rows.push([format!("vCPU {index}"), used]);
    }
    text += &table(&rows);
    if !status.disks.is_empty() {
        text += &format!("\n{}{}", disks(&status.disks), latencies(&status.disks));
    }
    text
}

fn disks(disks: &[DiskStatus]) -> String {
    let heads = [
        "DISK", "FORMAT", "SIZE", "ON HOST", "READS", "READ", "WRITES", "WRITTEN", "FLUSHES",
        "DISCARDS", "ZEROES", "ERRORS", "REFUSED", "PATH",
    ];
    let mut rows = vec![heads.map(str::to_owned)];
    for disk in disks {
        let mut path = disk.path.clone();
        let away = disk.connected == Some(false);
        for (set, flag) in [
            (disk.ro, " (ro)"),
            (disk.ephemeral, " (ephemeral)"),
            (away, " (its server is gone: the guest waits for it)"),
        ] {
            path += if set { flag } else { "" };
        }
        // What another process serves, that process counts.
        let counted = |value: String| match disk.connected {
            None => value,
            Some(_) => "-".to_owned(),
        };
        rows.push([
            name(disk),
            disk.format.clone(),
            size::show(disk.size),
            counted(disk.host_size.map_or("?".to_owned(), rough)),
            counted(disk.reads.to_string()),
            counted(rough(disk.read_bytes)),
            counted(disk.writes.to_string()),
            counted(rough(disk.written_bytes)),
            counted(disk.flushes.to_string()),
            counted(disk.discards.to_string()),
            counted(disk.write_zeroes.to_string()),
            counted(disk.host_errors.to_string()),
            counted(disk.refused.to_string()),
            path,
        ]);
    }
    table(&rows)
}

fn name(disk: &DiskStatus) -> String {
    match &disk.id {
        Some(id) => format!("{} {id}", disk.index),
        None => disk.index.to_string(),
    }
}

/// How long requests took, below a blank line: rows only for what there was.
fn latencies(disks: &[DiskStatus]) -> String {
    let heads = ["DISK", "LATENCY OF", "P50", "P90", "P99", "P99.9", "MAX"];
    let mut rows = vec![heads.map(str::to_owned)];
    for disk in disks {
        for (what, count, latency) in [
            ("reads", disk.reads, &disk.read_latency),
            ("writes", disk.writes, &disk.write_latency),
            ("flushes", disk.flushes, &disk.flush_latency),
        ] {
            if count == 0 {
                continue;
            }
            let Latency {
                p50,
                p90,
                p99,
                p999,
                max,
            } = *latency;
            let [p50, p90, p99, p999, max] = [p50, p90, p99, p999, max].map(microseconds);
            rows.push([name(disk), what.to_owned(), p50, p90, p99, p999, max]);
        }
    }
    match rows.len() {
        1 => String::new(),
        _ => format!("\n{}", table(&rows)),
    }
}

/// A number of microseconds with the unit that fits.
fn microseconds(number: f64) -> String {
    match number {
        _ if number < 1e3 => format!("{number:.0}us"),
        _ if number < 1e6 => format!("{:.1}ms", number / 1e3),
        _ => format!("{:.1}s", number / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::messages::{MemoryStatus, State, VcpuStatus};

    fn disk() -> DiskStatus {
        DiskStatus {
            index: 0,
            id: Some("ROOT".into()),
            path: "/a.img".into(),
            format: "raw".into(),
            ro: true,
            ephemeral: false,
            size: 1 << 30,
            host_size: Some(3 << 19),
            connected: None,
            reads: 3,
            read_bytes: 12288,
            writes: 0,
            written_bytes: 0,
            flushes: 0,
            discards: 0,
            write_zeroes: 0,
            host_errors: 1,
            refused: 0,
            read_latency: Latency {
                p50: 90.0,
                p90: 1500.0,
                p99: 2e6,
                p999: 2e6,
                max: 2e6,
            },
            write_latency: Latency::default(),
            flush_latency: Latency::default(),
        }
    }

    fn status(uptime_ms: u64, time_ms: u64) -> Status {
        Status {
            name: "web".into(),
            file: "/vm.toml".into(),
            pid: 7,
            state: State::Running,
            booted: true,
            uptime_ms,
            vcpus: vec![VcpuStatus { time_ms }],
            memory: MemoryStatus {
                size: 1 << 29,
                resident: 3 << 19,
            },
            disks: vec![disk()],
        }
    }

    #[test]
    fn all_of_a_vm_is_shown_and_of_requests_those_that_there_were() {
        assert_eq!(
            shown(&status(61_000, 2000), None),
            "web is running for 1m 1s\n\
             file     /vm.toml\n\
             process  7\n\
             memory   512MiB; its process takes 1.5MiB on the host\n\
             vCPU 0   2s of processor time\n\
             \n\
             DISK    FORMAT  SIZE  ON HOST  READS  READ   WRITES  WRITTEN  FLUSHES  DISCARDS  \
             ZEROES  ERRORS  REFUSED  PATH\n\
             0 ROOT  raw     1GiB  1.5MiB   3      12KiB  0       0 bytes  0        0         \
             0       1       0        /a.img (ro)\n\
             \n\
             DISK    LATENCY OF  P50   P90    P99   P99.9  MAX\n\
             0 ROOT  reads       90us  1.5ms  2.0s  2.0s   2.0s\n"
        );
    }

    #[test]
    fn what_another_process_serves_that_one_counts() {
        let served = |connected| DiskStatus {
            id: None,
            path: "/a.sock".into(),
            format: "vhost-user".into(),
            size: 1 << 30,
            connected: Some(connected),
            ..DiskStatus::default()
        };
        let shown = disks(&[served(true), served(false)]);
        let rows: Vec<Vec<_>> = shown
            .lines()
            .skip(1)
            .map(|row| row.split_whitespace().collect())
            .collect();
        assert_eq!(rows[0][..4], ["0", "vhost-user", "1GiB", "-"]);
        assert_eq!(rows[0][12..], ["-", "/a.sock"]);
        let gone = "/a.sock (its server is gone: the guest waits for it)";
        assert_eq!(rows[1][13..].join(" "), gone);
    }

    #[test]
    fn what_a_vcpu_takes_now_is_what_it_took_since_the_last_look() {
        let text = shown(&status(2000, 750), Some(&status(1000, 500)));
        assert!(
            text.contains("vCPU 0   750ms of processor time, 25% now\n"),
            "{text}"
        );
        let rebooted = shown(&status(2000, 100), Some(&status(1000, 500)));
        assert!(rebooted.contains("100ms of processor time\n"), "{rebooted}");
    }
}
