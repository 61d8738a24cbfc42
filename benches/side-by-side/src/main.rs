//! `benches/side-by-side/run`: the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use side_by_side::measure::{Options, Row};
use side_by_side::{Result, watchdog};

/// Drive `launcher disk serve` and `qemu-storage-daemon` over vhost-user, in turn, and compare
#[derive(Parser)]
struct Arguments {
    /// The program that is measured
    #[arg(long, default_value = "target/release/launcher")]
    launcher: PathBuf,
    /// Only cases whose name contains one of these, such as `raw-read` or `d32-warm`
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    only: Vec<String>,
    /// Measurements of each side
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long one takes, after a quarter as much to warm up
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// MiB of the images that are full of data
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    size: u64,
    /// Clusters of a new image, each of which a request allocates: a power of two
    #[arg(long, default_value_t = 65536)]
    clusters: u64,
    /// Gives QEMU's export a thread of its own (`iothread`)
    #[arg(long)]
    iothread: bool,
    /// Where images go [default: the folder for temporary files]
    #[arg(long)]
    dir: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    watchdog::catch_signals()?;
    let window = Duration::from_secs_f64(arguments.seconds);
    let options = Options {
        launcher: arguments.launcher,
        only: arguments.only,
        rounds: arguments.rounds,
        window,
        warm_up: window / 4,
        area: arguments.size << 20,
        fresh: arguments.clusters * side_by_side::case::CLUSTER,
        iothread: arguments.iothread,
    };
    let within = arguments.dir.unwrap_or_else(std::env::temp_dir);
    let folder = tempfile::Builder::new()
        .prefix("side-by-side-")
        .tempdir_in(within.canonicalize()?)?;
    let mut told = |row: &Row| {
        print!("{:<26}", row.case.to_string());
        for column in &row.columns {
            let (speed, processor) = (column.speed(), column.processor());
            print!(
                " {:<8} {:>8.0} ({:.0}-{:.0}, {:.2} us)",
                column.side.name(),
                speed.median,
                speed.least,
                speed.greatest,
                processor.median
            );
        }
        println!(" ratio {:.2}", row.ratio().median);
    };
    options.run(folder.path(), &mut told)?;
    Ok(())
}
