//! `benches/side-by-side/run`: the command line.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use side_by_side::case::{CLUSTER, Case};
use side_by_side::host::{Host, load};
use side_by_side::measure::{Options, Row};
use side_by_side::{Result, plot, table, watchdog};

/// Drive `launcher disk serve` and `qemu-storage-daemon` over vhost-user, in turn, and compare
#[derive(Parser)]
struct Arguments {
    /// The program that is measured
    #[arg(long, default_value = "target/release/launcher")]
    launcher: PathBuf,
    /// One more argument for `launcher disk serve`, such as `--serve=--poll-us=0`; may be given again
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    serve: Vec<String>,
    /// Only cases whose name contains one of these, such as `raw-read` or `d32-warm`
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    only: Vec<String>,
    /// Measurements of each side
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long one takes, after a quarter as much to warm up
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// MiB of the images that are full of data
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..1 << 20))]
    size: u64,
    /// Clusters of a new image, each of which a request allocates: a power of two
    #[arg(long, default_value_t = 16384, value_parser = clusters)]
    clusters: u64,
    /// Gives QEMU's export a thread of its own (`iothread`)
    #[arg(long)]
    iothread: bool,
    /// Where images go [default: the folder for temporary files]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Writes the table to a file, as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Writes a picture of the ratios to a file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    let seconds = text.parse().ok();
    let seconds = seconds.filter(|seconds| (0.01..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "expected a number from 0.01 to 3600".into())
}

fn clusters(text: &str) -> std::result::Result<u64, String> {
    let count = text.parse().ok();
    let count =
        count.filter(|count: &u64| count.is_power_of_two() && (16..=1 << 24).contains(count));
    count.ok_or_else(|| "expected a power of two from 16 to 16777216".into())
}

fn main() -> ExitCode {
    match compare() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare() -> Result<()> {
    let arguments = Arguments::parse();
    watchdog::catch_signals()?;
    let window = Duration::from_secs_f64(arguments.seconds);
    let options = Options {
        launcher: arguments.launcher,
        serve: arguments.serve,
        only: arguments.only,
        rounds: arguments.rounds as usize,
        window,
        warm_up: window / 4,
        area: arguments.size << 20,
        fresh: arguments.clusters * CLUSTER,
        iothread: arguments.iothread,
    };
    let within = arguments.dir.unwrap_or_else(std::env::temp_dir);
    let folder = tempfile::Builder::new()
        .prefix("side-by-side-")
        .tempdir_in(within.canonicalize()?)?;
    if options.cases().is_empty() {
        let names = Case::all().into_iter().map(|case| case.to_string());
        let names: Vec<_> = names.collect();
        return Err(format!("no case is called so; there are {}", names.join(", ")).into());
    }
    let host = Host::look(&options, folder.path())?;
    let (count, mut done) = (options.cases().len(), 0);
    let mut told = |row: &Row| {
        done += 1;
        let ratio = row.ratio().median;
        eprintln!("{done} of {count}: {}: {ratio:.2}", row.case);
    };
    let rows = options.run(folder.path(), &mut told)?;
    println!("{}load after: {}", table::text(&host, &rows), load());
    if let Some(path) = arguments.markdown {
        fs::write(path, table::markdown(&host, &rows))?;
    }
    if let Some(path) = arguments.svg {
        fs::write(path, plot::svg(&host, &rows))?;
    }
    Ok(())
}
