//! A format against raw, behind the device, and against QEMU, without one.

use std::path::Path;
use std::time::Duration;

use crate::device::{self, heap_row};
use crate::driver;
use crate::qemu::{Aio, Qemu};
use crate::rows::{Holds, Row};
use crate::run::{Bench, Side, named};
use crate::{Options, Result, spread};

/// A time so short that the number of requests does not matter: `--quick`.
const COARSE: Duration = Duration::from_millis(20);

/// The sides of a row that are compared with each other, and their times.
struct Half {
    /// Requests in each run.
    count: u64,
    sides: Vec<(Side, Vec<Duration>)>,
}

impl Half {
    /// With a number of requests that takes the fastest about the time of a measurement, but
    /// nobody many times as long.
    fn calibrated(bench: &Bench<'_>, sides: &[Side]) -> Result<Half> {
        let mut count = bench.row.possible((bench.row.depth * 16).max(64) as u64);
        while !sides.is_empty() && bench.options.time >= COARSE {
            let (mut fastest, mut slowest) = (f64::MAX, 0.0f64);
            for side in sides {
                let time = bench.run(*side, count)?.as_secs_f64();
                bench.remove(*side)?;
                (fastest, slowest) = (fastest.min(time), slowest.max(time));
            }
            let wanted = bench.options.time.as_secs_f64();
            let share = (wanted / fastest).min(6.0 * wanted / slowest);
            let next = bench.row.possible((count as f64 * share.min(16.0)) as u64);
            if share < 1.5 || next <= count {
                break;
            }
            count = next;
        }
        let sides = sides.iter().map(|side| (*side, Vec::new())).collect();
        Ok(Half { count, sides })
    }

    /// Runs each side once; whoever was first is last the next time. With `compared`, all must
    /// leave the same on their new images.
    fn round(&mut self, bench: &Bench<'_>, compared: bool) -> Result<()> {
        let mut kept = None;
        for (side, times) in &mut self.sides {
            times.push(bench.run(*side, self.count)?);
            if let Some(kept) = kept {
                bench.check_same(kept, *side)?;
            }
            if compared && kept.is_none() {
                bench.sync(*side)?;
                kept = Some(*side);
            } else {
                bench.remove(*side)?;
            }
        }
        if let Some(kept) = kept {
            bench.remove(kept)?;
        }
        if !self.sides.is_empty() {
            self.sides.rotate_left(1);
        }
        Ok(())
    }

    fn times(&self, side: Side) -> Option<&[Duration]> {
        let (_, times) = self.sides.iter().find(|(other, _)| *other == side)?;
        Some(times)
    }

    fn speed(&self, row: &Row, side: Side) -> Option<f64> {
        let times = self.times(side)?.iter();
        let mut speeds: Vec<_> = times.map(|time| row.speed(self.count, *time)).collect();
        Some(spread(&mut speeds).0)
    }

    /// The faster of QEMU's.
    fn best_of_qemu(&self, row: &Row) -> Option<Side> {
        let speeds = self.sides.iter().filter_map(|(side, _)| match side {
            Side::Qemu(_) => Some((*side, self.speed(row, *side)?)),
            _ => None,
        });
        let best = speeds.max_by(|(_, one), (_, other)| one.total_cmp(other));
        best.map(|(side, _)| side)
    }

    /// Median of the rounds' ratios with the least and the greatest, what it must be, and the
    /// number of requests.
    fn ratio(&self, ours: Side, other: Option<Side>, bar: Option<f64>) -> String {
        let other = other.and_then(|other| self.times(other));
        let Some((ours, other)) = self.times(ours).zip(other) else {
            return format!("{:>5} | {:>11} | {:<14} | {:>8}", "", "", "", "");
        };
        let mut ratios: Vec<_> = ours
            .iter()
            .zip(other)
            .map(|(ours, other)| other.as_secs_f64() / ours.as_secs_f64())
            .collect();
        let (ratio, least, most) = spread(&mut ratios);
        let verdict = match bar {
            Some(bar) if ratio >= bar => format!(">= {bar:.2} met"),
            Some(bar) => format!(">= {bar:.2} MISSED"),
            None => String::new(),
        };
        let range = format!("{least:.2}-{most:.2}");
        format!(
            "{ratio:>5.2} | {range:>11} | {verdict:<14} | {:>8}",
            self.count
        )
    }
}

/// The row of the table.
fn measure(bench: &Bench<'_>) -> Result<String> {
    bench.prepare()?;
    let [device, disk] = Side::halves(bench.row);
    let mut device = Half::calibrated(bench, &device)?;
    let mut disk = Half::calibrated(bench, &disk)?;
    for round in 0..bench.options.rounds {
        device.round(bench, round == 0)?;
        disk.round(bench, round == 0)?;
    }
    let row = bench.row;
    let shown = |half: &Half, side| match half.speed(row, side) {
        Some(speed) => format!("{speed:>9.0}"),
        None => format!("{:>9}", ""),
    };
    Ok(format!(
        "{} | {} | {} | {} | {} | {} | {} | {} | {} |",
        shown(&device, Side::Device),
        shown(&device, Side::Raw),
        device.ratio(Side::Device, Some(Side::Raw), row.raw_bar()),
        shown(&disk, Side::Direct),
        shown(&disk, Side::Qemu(Aio::IoUring)),
        shown(&disk, Side::Qemu(Aio::Native)),
        shown(&disk, Side::Qemu(Aio::Threads)),
        disk.ratio(Side::Direct, disk.best_of_qemu(row), Some(row.qemu_bar())),
        row.unit(),
    ))
}

fn print_head(options: &Options, qemu: &Qemu) {
    println!("\n{}", qemu.version());
    if let Some(options) = &options.create {
        println!("images made with -o {options}");
    }
    println!(
        "\n| {:<44} | {:>9} | {:>9} | {:>5} | {:>11} | {:<14} | {:>8} | {:>9} | {:>9} | {:>9} | {:>9} | {:>5} | {:>11} | {:<14} | {:>8} | unit |",
        "",
        "device",
        "raw",
        "ratio",
        "least-most",
        "bar",
        "requests",
        "direct",
        "io_uring",
        "native",
        "threads",
        "ratio",
        "least-most",
        "bar",
        "requests"
    );
    println!("|{}", "---|".repeat(16));
}

/// Prints the tables. An image that is not whole, or not as it must be, is an error in the end.
pub(crate) fn tables(options: &Options, disk: &Path) -> Result<()> {
    let rows: Vec<_> = Row::all(options.area)
        .into_iter()
        .map(|row| (row.name(&options.format), row))
        .filter(|(name, row)| {
            options.wants(name) && !(row.holds == Holds::Backing && options.format == "raw")
        })
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    let (format, raw) = (named(&options.format)?, named("raw")?);
    let qemu = Qemu::find(disk)?;
    let memory = driver::guest_memory()?;
    print_head(options, &qemu);
    let directory = tempfile::tempdir_in(disk)?;
    let (mut heap, mut failed) = (Vec::new(), 0);
    for (name, row) in &rows {
        let bench = Bench {
            options,
            qemu: &qemu,
            format: &format,
            raw: &raw,
            memory: &memory,
            row,
            directory: directory.path(),
        };
        match measure(&bench) {
            Ok(row) => println!("| {name:<44} | {row}"),
            Err(error) => {
                failed += 1;
                println!("| {name:<44} | not measured: {error}");
                bench.clear()?;
                continue;
            }
        }
        if row.watches_heap() {
            heap.push(bench.with_driver(Side::Device, |driver| {
                heap_row(options, name, driver, |_, count| row.offsets(count))
            })?);
        }
    }
    device::print_heap(options, &heap);
    match failed {
        0 => Ok(()),
        _ => Err(format!("{failed} rows could not be measured").into()),
    }
}
