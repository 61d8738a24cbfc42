//! What a `launcher` that does not get on is doing: for the transcript of a case that waited in vain.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// How long the process is watched.
const WATCH: Duration = Duration::from_millis(500);
/// Lines of the kernel's trace that are kept: the last ones.
const TRACED: usize = 60;

/// Page faults that KVM reflects to a guest in a second when it is lost: it faults on an instruction that KVM
/// has to emulate, finds nothing wrong, and tries again. A guest that gets on has none of them.
const LOST: u64 = 2000;

/// Tells whether a guest is lost in emulation, by KVM's count of page faults reflected to it.
pub(crate) struct Watch {
    pid: u32,
    since: Instant,
    faults: u64,
}

impl Watch {
    pub(crate) fn new(pid: u32) -> Self {
        mount_debugfs();
        Watch {
            pid,
            since: Instant::now(),
            faults: reflected(pid),
        }
    }

    /// Whether it was lost for all the time since the last call, or since the first.
    pub(crate) fn is_lost(&mut self) -> bool {
        let (now, faults) = (Instant::now(), reflected(self.pid));
        let took = now - self.since;
        let grown = faults.saturating_sub(self.faults);
        (self.since, self.faults) = (now, faults);
        took >= Duration::from_secs(1) && grown > LOST * took.as_secs()
    }
}

fn reflected(pid: u32) -> u64 {
    let counter = |vm: PathBuf| fs::read_to_string(vm.join("pf_guest")).ok();
    let counts = vms(pid).filter_map(counter);
    counts.filter_map(|n| n.trim().parse::<u64>().ok()).sum()
}

/// The folders in which KVM counts what the process's VMs do.
fn vms(pid: u32) -> impl Iterator<Item = PathBuf> {
    let prefix = format!("{pid}-");
    let all = fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten();
    all.flatten()
        .filter(move |vm| vm.file_name().to_string_lossy().starts_with(&prefix))
        .map(|vm| vm.path())
}

fn mount_debugfs() {
    if !Path::new("/sys/kernel/debug/kvm").exists() {
        let _ = Command::new("mount")
            .args(["-t", "debugfs", "debugfs", "/sys/kernel/debug"])
            .output();
    }
}

/// The process's threads, with the time each takes in half a second, and what KVM counts and traces of its VM
/// in that time. What the machine does not tell is left out.
pub(crate) fn describe(pid: u32) -> String {
    mount_debugfs();
    let tracing = Path::new("/sys/kernel/debug/tracing");
    let before = (threads(pid), counters(pid));
    let traced = fs::write(tracing.join("events/kvm/enable"), "1").is_ok();
    thread::sleep(WATCH);
    // At once: events are disabled one by one, and the trace would end with those that are the last.
    let _ = fs::write(tracing.join("tracing_on"), "0");
    let mut text = format!("---- threads, and again after {WATCH:?}\n{}", before.0);
    let _ = writeln!(text, "{}---- KVM's counters that changed", threads(pid));
    for (counter, after) in counters(pid) {
        let earlier = before.1.iter().find(|(name, _)| *name == counter);
        if let Some((_, earlier)) = earlier
            && *earlier != after
        {
            let _ = writeln!(text, "{counter}: {earlier} -> {after}");
        }
    }
    if traced {
        let lines = fs::read_to_string(tracing.join("trace")).unwrap_or_default();
        let lines: Vec<_> = lines.lines().collect();
        let _ = writeln!(text, "---- KVM's trace: {} lines", lines.len());
        for line in &lines[lines.len().saturating_sub(TRACED)..] {
            let _ = writeln!(text, "{line}");
        }
        let _ = fs::write(tracing.join("events/kvm/enable"), "0");
        let _ = fs::write(tracing.join("trace"), "");
        let _ = fs::write(tracing.join("tracing_on"), "1");
    }
    text
}

/// A line a thread: its name, its state and times (proc(5): utime, stime in ticks), and where it sleeps.
fn threads(pid: u32) -> String {
    let mut text = String::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        let Some((_, fields)) = stat.rsplit_once(')') else {
            continue;
        };
        let fields: Vec<_> = fields.split_whitespace().collect();
        let field = |n: usize| fields.get(n).copied().unwrap_or("?");
        let _ = writeln!(
            text,
            "{:<16} {} user {} system {}  {}  {}",
            read("comm").trim(),
            field(0),
            field(11),
            field(12),
            read("syscall").trim(),
            read("wchan").trim()
        );
    }
    text
}

/// What KVM counts of the process's VM: exits, interrupts, halts.
fn counters(pid: u32) -> Vec<(String, String)> {
    let mut counters = Vec::new();
    for vm in vms(pid) {
        for counter in fs::read_dir(vm).into_iter().flatten().flatten() {
            if let Ok(value) = fs::read_to_string(counter.path()) {
                let name = counter.file_name().to_string_lossy().into_owned();
                counters.push((name, value.trim().to_owned()));
            }
        }
    }
    counters.sort();
    counters
}
