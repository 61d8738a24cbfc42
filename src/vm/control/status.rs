//! How a VM is: read from memory and the host's counters, without a wait for anything.

use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use super::{Control, Disk};
use crate::control::messages::{DiskStatus, Latency, MemoryStatus, Status, VcpuStatus};
use crate::devices::virtio::blk::{Counters, Percentiles};
use crate::vm::devices::DiskHandle;

impl Control {
    pub(super) fn status_now(&self) -> Status {
        let times = self.life.gate().map(|gate| gate.times());
        let vcpus = times
            .unwrap_or_default()
            .into_iter()
            .map(|time| VcpuStatus {
                time_ms: millis(time),
            });
        let disks = self.disks.iter().enumerate();
        Status {
            name: self.name.clone(),
            file: self.file.display().to_string(),
            pid: std::process::id(),
            state: self.life.state(),
            booted: self.life.booted(),
            uptime_ms: millis(self.life.uptime()),
            vcpus: vcpus.collect(),
            memory: MemoryStatus {
                size: self.memory,
                resident: resident(),
            },
            disks: disks.map(|(index, disk)| disk.status(index)).collect(),
        }
    }
}

impl Disk {
    fn status(&self, index: usize) -> DiskStatus {
        let mut status = DiskStatus {
            index,
            id: self.block.id.clone(),
            path: self.path.display().to_string(),
            format: self.block.format.clone(),
            ro: self.block.ro,
            ephemeral: self.block.ephemeral,
            size: self.handle.size(),
            ..DiskStatus::default()
        };
        match &self.handle {
            DiskHandle::Own(disk) => {
                status.host_size = host_size(&self.path);
                count(&mut status, disk.counters());
            }
            DiskHandle::Served(disk) => status.connected = Some(disk.is_connected()),
        }
        status
    }
}

/// What a disk has done.
fn count(status: &mut DiskStatus, counters: &Counters) {
    status.reads = counters.reads.value();
    status.read_bytes = counters.read_bytes.value();
    status.writes = counters.writes.value();
    status.written_bytes = counters.written_bytes.value();
    status.flushes = counters.flushes.value();
    status.discards = counters.discards.value();
    status.write_zeroes = counters.write_zeroes.value();
    status.host_errors = counters.host_errors.value();
    status.refused = counters.refused.value();
    status.read_latency = latency(counters.read_latency.percentiles());
    status.write_latency = latency(counters.write_latency.percentiles());
    status.flush_latency = latency(counters.flush_latency.percentiles());
}

fn latency(times: Percentiles) -> Latency {
    // To the tenth of a microsecond: the buckets are no finer.
    let micros = |time: Duration| (time.as_nanos() as f64 / 100.0).round() / 10.0;
    Latency {
        p50: micros(times.p50),
        p90: micros(times.p90),
        p99: micros(times.p99),
        p999: micros(times.p999),
        max: micros(times.max),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Bytes of host memory that this process takes.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|line| line.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

/// Bytes that a file takes on the host; a server on the network is not asked.
fn host_size(path: &Path) -> Option<u64> {
    let wanted = StatxFlags::BLOCKS | StatxFlags::TYPE;
    let stat = statx(CWD, path, AtFlags::STATX_DONT_SYNC, wanted).ok()?;
    let regular = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile;
    regular.then_some(stat.stx_blocks * 512)
}
