//! Measures the block device with a driver in this process: raw images against a plain io_uring
//! loop that makes the same transfers, and another format against raw and against QEMU.
//! `benches/README.md` says how to run and how to read it.

mod compare;
mod count;
mod device;
mod direct;
mod driver;
mod plain;
mod qemu;
mod rows;
mod run;
mod workload;

use std::path::{Path, PathBuf};
use std::time::Duration;

use count::Counting;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: usize = 1 << 20;

/// What the command line asks for.
struct Options {
    filters: Vec<String>,
    rounds: usize,
    /// How long one measurement takes, about.
    time: Duration,
    image_size: usize,
    /// Bytes that are used of an image that QEMU uses too: a power of two.
    area: u64,
    /// The format that is compared with raw and with QEMU.
    format: String,
    /// Options for `qemu-img create -o` when it makes such images.
    create: Option<String>,
    /// Requests over which the heap must not grow.
    heap_requests: u64,
    directory: PathBuf,
}

const USAGE: &str = "\
usage: cargo bench --bench block -- [--quick] [--rounds N] [--heap N] [--dir DIRECTORY]
                                    [--format NAME] [--create OPTIONS] [FILTER]…
  --quick   shows that it works, in a few seconds; the figures mean little
  --rounds  measurements of each side, 7 unless told
  --heap    requests over which the heap is watched, a million unless told
  --dir     where images on disk go (default: below the build directory)
  --format  what is compared with raw and with QEMU, qcow2 unless told; such as raw, too
  --create  makes these images with qemu-img create -o OPTIONS
  FILTER    only rows whose name contains one of these, such as `tmpfs randread`";

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
        let mut options = Options {
            filters: Vec::new(),
            rounds: 7,
            time: Duration::from_millis(300),
            image_size: 256 * MIB,
            area: 1 << 30,
            format: "qcow2".into(),
            create: None,
            heap_requests: 1_000_000,
            directory: env!("CARGO_TARGET_TMPDIR").into(),
        };
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                // Cargo's own.
                "--bench" => {}
                "--quick" => {
                    options.rounds = 1;
                    options.time = Duration::from_millis(10);
                    options.image_size = 64 * MIB;
                    options.area = 64 << 20;
                    options.heap_requests = 20_000;
                }
                "--rounds" => options.rounds = arguments.next().ok_or(USAGE)?.parse()?,
                "--heap" => options.heap_requests = arguments.next().ok_or(USAGE)?.parse()?,
                "--dir" => options.directory = arguments.next().ok_or(USAGE)?.into(),
                "--format" => options.format = arguments.next().ok_or(USAGE)?,
                "--create" => options.create = Some(arguments.next().ok_or(USAGE)?),
                flag if flag.starts_with('-') => return Err(USAGE.into()),
                filter => options.filters.push(filter.into()),
            }
        }
        if options.rounds == 0 {
            return Err(USAGE.into());
        }
        Ok(options)
    }

    fn wants(&self, name: &str) -> bool {
        let mut filters = self.filters.iter();
        self.filters.is_empty() || filters.any(|filter| name.contains(filter.as_str()))
    }
}

/// The median, and the least and the greatest.
fn spread(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let middle = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
    (middle, values[0], values[values.len() - 1])
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

fn main() -> Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    let disk = tempfile::tempdir_in(options.directory.canonicalize()?)?;
    println!(
        "{} processors, Linux {}, disk: {}; {} rounds of {:?} for each side, in turn",
        std::thread::available_parallelism()?,
        rustix::system::uname().release().to_string_lossy(),
        file_system(disk.path())?,
        options.rounds,
        options.time,
    );
    device::tables(&options, disk.path())?;
    compare::tables(&options, disk.path())
}
