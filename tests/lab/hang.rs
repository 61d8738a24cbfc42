//! What a `launcher` that does not get on is doing: for the transcript of a case that waited in vain.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

/// How long the process is watched.
const WATCH: Duration = Duration::from_millis(500);
/// Lines of the kernel's trace that are kept: the last ones.
const TRACED: usize = 60;

/// The process's threads, with the time each takes in half a second, and what KVM counts and traces of its VM
/// in that time. What the machine does not tell is left out.
pub(crate) fn describe(pid: u32) -> String {
    let _ = Command::new("mount")
        .args(["-t", "debugfs", "debugfs", "/sys/kernel/debug"])
        .output();
    let tracing = Path::new("/sys/kernel/debug/tracing");
    let before = (threads(pid), counters(pid));
    let traced = fs::write(tracing.join("events/kvm/enable"), "1").is_ok();
    thread::sleep(WATCH);
    let _ = fs::write(tracing.join("events/kvm/enable"), "0");
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
        let _ = fs::write(tracing.join("trace"), "");
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
    let prefix = format!("{pid}-");
    let all = fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten();
    for vm in all
        .flatten()
        .filter(|vm| vm.file_name().to_string_lossy().starts_with(&prefix))
    {
        for counter in fs::read_dir(vm.path()).into_iter().flatten().flatten() {
            if let Ok(value) = fs::read_to_string(counter.path()) {
                let name = counter.file_name().to_string_lossy().into_owned();
                counters.push((name, value.trim().to_owned()));
            }
        }
    }
    counters.sort();
    counters
}
