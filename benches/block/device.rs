//! The device against a plain io_uring loop that makes the same transfers.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use formats::{Engine, Image};
use launcher::devices::GuestMemory;
use launcher::devices::virtio::blk::{Blk, BlkOptions};

use crate::count::{Counting, Thread};
use crate::driver::{self, Driver};
use crate::plain::Plain;
use crate::workload::Workload;
use crate::{MIB, Options, Result, spread};

/// Where the image lies.
struct Place {
    name: &'static str,
    path: PathBuf,
    direct: bool,
}

fn create_image(path: &Path, size: usize) -> Result<()> {
    let mut file = File::create(path)?;
    let mut block = vec![0u8; MIB];
    for number in 0..size / MIB {
        block.fill(number as u8 | 1);
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

fn open(place: &Place, queues: usize) -> Result<Blk> {
    let format = formats::find("sparse-raw").ok_or("no format `sparse-raw`")?;
    Ok(Blk::open(BlkOptions {
        ephemeral: false,
        image: Image {
            o_direct: place.direct,
            ..Image::new(place.path.clone())
        },
        format,
        id: None,
        queues: queues as u16,
        engine: Engine::Auto,
        poll: None,
        cpus: Vec::new(),
    })
    .map_err(|error| error.to_string())?)
}

/// Both sides of one row.
struct Pair<'a> {
    options: &'a Options,
    work: &'a Workload,
    plain: Plain<'a>,
    driver: Driver<'a>,
    /// The disk's.
    thread: Thread,
    own_thread: Thread,
}

impl Pair<'_> {
    fn offsets(&self, seed: u64, count: u64) -> impl Iterator<Item = u64> + use<> {
        self.work.offsets(seed, count, self.options.image_size)
    }

    /// What was written is put on the disk, outside of the time measured.
    fn settle(&self) -> Result<()> {
        if self.work.write {
            self.plain.file().sync_data()?;
        }
        Ok(())
    }

    fn run_plain(&mut self, seed: u64, count: u64) -> Result<Duration> {
        let offsets = self.offsets(seed, count);
        let start = Instant::now();
        self.plain.run(offsets)?;
        let time = start.elapsed();
        self.settle()?;
        Ok(time)
    }

    fn run_driver(&mut self, seed: u64, count: u64) -> Result<Duration> {
        let offsets = self.offsets(seed, count);
        let start = Instant::now();
        self.driver.run(offsets)?;
        let time = start.elapsed();
        self.settle()?;
        Ok(time)
    }

    /// Number of requests that take both sides about the time of one measurement, or longer.
    fn calibrate(&mut self) -> Result<u64> {
        let mut count = (self.work.depth * self.work.queues * 4) as u64;
        loop {
            let slower = self.run_plain(0, count)?.max(self.run_driver(0, count)?);
            let share = self.options.time.as_secs_f64() / slower.as_secs_f64().max(1e-6);
            if share < 1.5 {
                return Ok(count);
            }
            count = (count as f64 * share.min(10.0)) as u64;
        }
    }

    /// The row of the table.
    fn measure(&mut self) -> Result<String> {
        let count = self.calibrate()?;
        let (mut plain, mut own, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let (mut notifications, mut interrupts) = (0, 0);
        let (mut own_time, mut plain_time) = (0, 0);
        for round in 1..=self.options.rounds as u64 {
            let before = self.own_thread.time()?;
            let reference = self.run_plain(round, count)?;
            plain_time += self.own_thread.time()? - before;
            let (before, signals_before) = (self.thread.time()?, self.driver.signals());
            let time = self.run_driver(round, count)?;
            let signals = self.driver.signals();
            own_time += self.thread.time()? - before;
            notifications += signals.0 - signals_before.0;
            interrupts += signals.1 - signals_before.1;
            plain.push(self.work.speed(count, reference));
            own.push(self.work.speed(count, time));
            ratios.push(reference.as_secs_f64() / time.as_secs_f64());
        }
        // Apart, for counting them slows them down.
        let calls = self.thread.system_calls()?;
        let before = calls.value()?;
        self.run_driver(0, count)?;
        let calls = (calls.value()? - before) as f64 / count as f64;

        let (plain, ..) = spread(&mut plain);
        let (own, ..) = spread(&mut own);
        let (ratio, least, most) = spread(&mut ratios);
        let unit = if self.work.random { "IOPS" } else { "MB/s" };
        let verdict = match self.work.bar() {
            Some(bar) if ratio >= bar => format!(">= {bar:.2} met"),
            Some(bar) => format!(">= {bar:.2} MISSED"),
            None => String::new(),
        };
        let each = |total: u64| total as f64 / (count * self.options.rounds as u64) as f64;
        let mut row = String::new();
        write!(
            row,
            "{own:>9.0} | {plain:>9.0} | {unit} | {ratio:>5.2} | {:>11} | {verdict:<14}",
            format!("{least:.2}-{most:.2}")
        )?;
        write!(
            row,
            " | {:>7.2} | {:>7.2} | {calls:>8.3} | {:>8.3} | {:>8.3} |",
            each(own_time) / 1e3,
            each(plain_time) / 1e3,
            each(interrupts),
            each(notifications)
        )?;
        Ok(row)
    }
}

/// A row of the table of [`print_heap`]: growth of the heap over many requests, in bytes; and
/// allocations for each. `offsets` makes so many of a seed.
pub(crate) fn heap_row<I: Iterator<Item = u64>>(
    options: &Options,
    name: &str,
    driver: &mut Driver<'_>,
    offsets: impl Fn(u64, u64) -> I,
) -> Result<String> {
    let count = options.heap_requests;
    driver.run(offsets(1, count / 10))?;
    let measured = offsets(2, count);
    let (allocations, growth) = Counting::during(|| driver.run(measured))?;
    // A vector or a table that finds its final size late is no leak; a byte in sixteen requests
    // would be one.
    let verdict = match growth < count as i64 / 16 {
        true => "met",
        false => "MISSED",
    };
    let allocations = allocations as f64 / count as f64;
    Ok(format!(
        "| {name:<28} | {growth:>6} | {verdict:<6} | {allocations:>6.3} |"
    ))
}

pub(crate) fn print_heap(options: &Options, rows: &[String]) {
    if rows.is_empty() {
        return;
    }
    println!(
        "\n| {:<28} | growth | bar    | allocations |\n|{}",
        format!("heap, {} requests", options.heap_requests),
        "---|".repeat(4)
    );
    for row in rows {
        println!("{row}");
    }
}

/// Measures the rows of one image with one number of virtqueues.
fn measure(
    options: &Options,
    place: &Place,
    memory: &Arc<GuestMemory>,
    queues: usize,
    heap: &mut Vec<String>,
) -> Result<()> {
    let rows: Vec<_> = Workload::all(queues)
        .map(|work| (work.name_at(place.name), work))
        .filter(|(name, _)| options.wants(name))
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    let mut blk = open(place, queues)?;
    for (name, work) in &rows {
        let mut pair = Pair {
            options,
            work,
            plain: Plain::new(&place.path, place.direct, memory, work)?,
            driver: Driver::new(&mut blk, memory, work)?,
            thread: Thread::named("disk ")?,
            own_thread: Thread::named("")?,
        };
        println!("| {name:<28} | {}", pair.measure()?);
        if work.depth == 32 && queues == 1 && !(work.write && place.direct) {
            let offsets = |seed, count| work.offsets(seed, count, options.image_size);
            heap.push(heap_row(options, name, &mut pair.driver, offsets)?);
        }
    }
    Ok(blk.close()?)
}

/// Prints the tables.
pub(crate) fn tables(options: &Options, disk: &Path) -> Result<()> {
    let shared = tempfile::tempdir_in("/dev/shm")?;
    let place = |name, directory: &Path, direct| Place {
        name,
        path: directory.join(format!("{name}.img")),
        direct,
    };
    let mut places = vec![
        place("tmpfs", shared.path(), false),
        place("disk", disk, false),
        place("direct", disk, true),
    ];
    places.retain(|place| {
        let mut works = [1, 4].into_iter().flat_map(Workload::all);
        works.any(|work| options.wants(&work.name_at(place.name)))
    });
    if places.is_empty() {
        return Ok(());
    }
    let memory = driver::guest_memory()?;
    println!(
        "\n| {:<28} | {:>9} | {:>9} | unit | ratio | {:>11} | {:<14} | {:>7} | {:>7} | {:>8} | {:>8} | {:>8} |",
        "",
        "launcher",
        "plain",
        "least-most",
        "bar",
        "cpu us",
        "plain",
        "syscalls",
        "interr.",
        "notif."
    );
    println!("|{}", "---|".repeat(12));
    let mut heap = Vec::new();
    for place in &places {
        create_image(&place.path, options.image_size)?;
        for queues in [1, 4] {
            if let Err(error) = measure(options, place, &memory, queues, &mut heap) {
                println!("| {:<28} | not measured: {error}", place.name);
            }
        }
        std::fs::remove_file(&place.path)?;
    }
    print_heap(options, &heap);
    println!("\ncpu us, syscalls: of the disk's thread for each request (plain: of the loop's);");
    println!("interr., notif., allocations: for each request");
    println!(
        "system calls counted: {}",
        Thread::named("")?.system_calls()?.means()
    );
    Ok(())
}
