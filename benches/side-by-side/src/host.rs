//! Where it was measured.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::Result;
use crate::image::run;
use crate::measure::Options;

/// What figures depend on.
#[derive(Clone, Debug)]
pub struct Host {
    /// The machine, its kernel, the file system of the images.
    pub machine: String,
    /// Who is compared.
    pub programs: String,
    /// How long, how often, on what.
    pub rounds: String,
    /// What else the machine did before it began: processes that ran, over one minute.
    pub load: String,
}

impl Host {
    /// Looks. The folder is the images'.
    pub fn look(options: &Options, folder: &Path) -> Result<Host> {
        let first = |text: String| text.lines().next().unwrap_or_default().to_owned();
        let qemu = first(run(Command::new("qemu-storage-daemon").arg("--version"))?);
        let ours = first(run(Command::new(&options.launcher).arg("--version"))?);
        Ok(Host {
            machine: format!(
                "{} processors ({}), Linux {}, {}",
                std::thread::available_parallelism()?,
                processor().unwrap_or_else(|| "unknown".into()),
                rustix::system::uname().release().to_string_lossy(),
                file_system(folder)?,
            ),
            programs: format!(
                "{ours}{}; {qemu}, {}",
                match options.serve.is_empty() {
                    true => String::new(),
                    false => format!(" with {}", options.serve.join(" ")),
                },
                match options.iothread {
                    true => "export in an iothread",
                    false => "export in the main loop",
                }
            ),
            rounds: format!(
                "{} rounds of {:?} after {:?} to warm up, in turn; {} MiB of data; {} allocations",
                options.rounds,
                options.window,
                options.warm_up,
                options.area >> 20,
                options.fresh / crate::case::CLUSTER,
            ),
            load: load(),
        })
    }
}

/// Processes that ran, on average over the last minute.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let mut lines = text.lines();
    let line = lines.find(|line| line.starts_with("model name"))?;
    Some(line.split_once(": ")?.1.to_owned())
}

fn file_system(path: &Path) -> Result<String> {
    let kind = rustix::fs::statfs(path)?.f_type;
    Ok(match kind {
        0xef53 => "ext4".into(),
        0x0102_1994 => "tmpfs".into(),
        0x5846_5342 => "xfs".into(),
        0x9123_683e => "btrfs".into(),
        other => format!("file system {other:#x}"),
    })
}
