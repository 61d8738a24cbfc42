//! QEMU's side: `qemu-img` makes the images, checks what was written to them, and measures QEMU's
//! own block layer.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::rows::Row;
use crate::{MIB, Result};

/// What every write stores: the byte of the guest memory's buffers too.
pub(crate) const PATTERN: u8 = 0x5a;

/// What images are filled with beforehand, so that a write shows.
const FILL: u8 = 0xa5;

/// How QEMU does its I/O: `-i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aio {
    IoUring,
    /// Linux AIO, for O_DIRECT only.
    Native,
    /// What QEMU does unless told.
    Threads,
}

impl Aio {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Aio::IoUring => "io_uring",
            Aio::Native => "native",
            Aio::Threads => "threads",
        }
    }
}

/// The `qemu-img` that is installed.
pub(crate) struct Qemu {
    version: String,
    /// `bench` takes offsets modulo the size of the image less that of a request, as later
    /// versions do: such an image is made a request longer than what is to be used of it.
    spares_last: bool,
}

impl Qemu {
    /// Finds it, and by which rule its `bench` begins again at the start of an image.
    pub(crate) fn find(directory: &Path) -> Result<Qemu> {
        let version = qemu_img(["--version"])?;
        let version = version.lines().next().unwrap_or_default().to_owned();
        let path = directory.join("wrap.raw");
        std::fs::write(&path, [0; 3 * 4096])?;
        let mut bench = Command::new("qemu-img");
        bench.args(["bench", "-f", "raw", "-w", "-d", "1", "-c", "3"]);
        bench.arg("--pattern").arg(PATTERN.to_string()).arg(&path);
        output(&mut bench)?;
        let spares_last = std::fs::read(&path)?.last() != Some(&PATTERN);
        std::fs::remove_file(&path)?;
        Ok(Qemu {
            version,
            spares_last,
        })
    }

    /// As it prints it.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// The size of an image for a row: that of which `bench` uses just [`Row::area`].
    pub(crate) fn image_size(&self, row: &Row) -> u64 {
        row.area + if self.spares_last { row.len as u64 } else { 0 }
    }

    /// Makes an image; `options` are those of `-o`, `backing` is a raw image.
    pub(crate) fn create(
        &self,
        format: &str,
        path: &Path,
        size: u64,
        options: Option<&str>,
        backing: Option<&Path>,
    ) -> Result<()> {
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", format]);
        if let Some(options) = options {
            create.args(["-o", options]);
        }
        if let Some(backing) = backing {
            create.args(["-F", "raw", "-b"]).arg(backing);
        }
        create.arg(path).arg(size.to_string());
        output(&mut create).map(drop)
    }

    /// Writes all of `area` in order.
    pub(crate) fn fill(&self, format: &str, path: &Path, area: u64) -> Result<()> {
        let mut bench = Command::new("qemu-img");
        bench.args(["bench", "-w", "-f", format, "-s", "1M", "-d", "4"]);
        bench.arg("--pattern").arg(FILL.to_string());
        bench.arg("-c").arg((area / MIB as u64).to_string());
        output(bench.arg(path)).map(drop)
    }

    /// Makes the transfers of a row; how long they took, without start and end of the program.
    pub(crate) fn bench(
        &self,
        format: &str,
        path: &Path,
        row: &Row,
        aio: Aio,
        count: u64,
    ) -> Result<Duration> {
        let mut bench = Command::new("qemu-img");
        bench.args(["bench", "-f", format, "-i", aio.name()]);
        bench.args(["-t", if row.direct { "none" } else { "writeback" }]);
        for (flag, value) in [
            ("-c", count),
            ("-d", row.depth as u64),
            ("-s", row.len as u64),
            ("-S", row.step),
            ("-o", row.first),
        ] {
            bench.arg(flag).arg(value.to_string());
        }
        if row.write {
            bench.arg("-w").arg("--pattern").arg(PATTERN.to_string());
        }
        if let Some(interval) = row.flush {
            bench.arg("--flush-interval").arg(interval.to_string());
        }
        let printed = output(bench.arg(path))?;
        let seconds = printed
            .lines()
            .find_map(|line| line.strip_prefix("Run completed in "))
            .and_then(|rest| rest.strip_suffix(" seconds.")?.parse().ok())
            .ok_or_else(|| format!("qemu-img bench printed no time: {printed}"))?;
        // It counts milliseconds.
        Ok(Duration::from_secs_f64(seconds).max(Duration::from_millis(1)))
    }

    /// Fails unless the image is whole: no corruption, no leak.
    pub(crate) fn check(&self, format: &str, path: &Path) -> Result<()> {
        let mut check = Command::new("qemu-img");
        output(check.args(["check", "-q", "-f", format]).arg(path)).map(drop)
    }

    /// Fails unless two images, each with its format, hold the same.
    pub(crate) fn compare(&self, one: (&str, &Path), other: (&str, &Path)) -> Result<()> {
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-f", one.0, "-F", other.0]);
        output(compare.arg(one.1).arg(other.1)).map(drop)
    }
}

fn qemu_img<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<String> {
    output(Command::new("qemu-img").args(arguments))
}

/// What a command prints; an error is told as it tells it.
fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .map_err(|error| format!("qemu-img, which makes the images, does not run: {error}"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(printed);
    }
    let mut said = printed + &String::from_utf8_lossy(&output.stderr);
    said.truncate(said.trim_end().len());
    Err(format!("{command:?}: {}: {said}", output.status).into())
}
