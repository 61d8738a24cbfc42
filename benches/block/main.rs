//! Measures the block device: a driver in this process, against a plain io_uring loop that makes
//! the same transfers. `benches/README.md` says how to run and how to read it.

mod count;
mod driver;
mod plain;

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use formats::{Engine, Image};
use launcher::devices::GuestMemory;
use launcher::devices::virtio::blk::{Blk, BlkOptions};

use count::{Counting, Thread};
use driver::Driver;
use plain::Plain;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: usize = 1 << 20;

/// What is transferred, and how.
#[derive(Clone, Copy, Debug)]
struct Workload {
    write: bool,
    random: bool,
    /// Bytes in a request.
    len: usize,
    /// Requests in flight in each virtqueue.
    depth: usize,
    queues: usize,
}

/// Where the image lies.
struct Place {
    name: &'static str,
    path: PathBuf,
    direct: bool,
}

/// What the command line asks for.
struct Options {
    filters: Vec<String>,
    rounds: usize,
    /// How long one measurement takes, about.
    time: Duration,
    image_size: usize,
    /// Requests over which the heap must not grow.
    heap_requests: u64,
    directory: PathBuf,
}

const USAGE: &str = "\
usage: cargo bench --bench block -- [--quick] [--rounds N] [--heap N] [--dir DIRECTORY] [FILTER]…
  --quick   shows that it works, in a few seconds; the figures mean little
  --rounds  measurements of each side, 7 unless told
  --heap    requests over which the heap is watched, a million unless told
  --dir     where the image on disk goes (default: below the build directory)
  FILTER    only rows whose name contains one of these, such as `tmpfs randread`";

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
        let mut options = Options {
            filters: Vec::new(),
            rounds: 7,
            time: Duration::from_millis(300),
            image_size: 256 * MIB,
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
                    options.heap_requests = 20_000;
                }
                "--rounds" => options.rounds = arguments.next().ok_or(USAGE)?.parse()?,
                "--heap" => options.heap_requests = arguments.next().ok_or(USAGE)?.parse()?,
                "--dir" => options.directory = arguments.next().ok_or(USAGE)?.into(),
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

impl Workload {
    /// All of them, for one number of virtqueues.
    fn all(queues: usize) -> impl Iterator<Item = Workload> {
        let work = move |random, write, len, depth| Workload {
            write,
            random,
            len,
            depth,
            queues,
        };
        [1, 32]
            .into_iter()
            .flat_map(move |depth| [false, true].map(|write| work(true, write, 4096, depth)))
            .chain([false, true].map(|write| work(false, write, MIB, 8)))
    }

    fn name(&self) -> String {
        format!(
            "{}{} {} qd{} q{}",
            if self.random { "rand" } else { "seq" },
            if self.write { "write" } else { "read" },
            if self.len == MIB { "1m" } else { "4k" },
            self.depth,
            self.queues
        )
    }

    /// What the device must reach, as a share of the plain loop.
    fn bar(&self) -> Option<f64> {
        match (self.random, self.depth) {
            (false, _) => Some(0.95),
            (true, 32) => Some(0.85),
            (true, _) => None,
        }
    }

    /// The offsets of `count` requests; the same for the same seed.
    fn offsets(
        &self,
        seed: u64,
        count: u64,
        image_size: usize,
    ) -> impl Iterator<Item = u64> + use<> {
        let places = (image_size / self.len) as u64;
        let (random, len) = (self.random, self.len as u64);
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..count).map(move |at| {
            if !random {
                return at % places * len;
            }
            // Marsaglia's xorshift.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % places * len
        })
    }

    fn speed(&self, requests: u64, time: Duration) -> f64 {
        let rate = requests as f64 / time.as_secs_f64();
        match self.random {
            true => rate,
            false => rate * self.len as f64 / 1e6,
        }
    }
}

/// The median, and the least and the greatest.
fn spread(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let middle = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
    (middle, values[0], values[values.len() - 1])
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
            path: place.path.clone(),
            ro: false,
            sparse: true,
            o_direct: place.direct,
            block_size: 512,
            lock: true,
            size: None,
            backing: Vec::new(),
            format_written: true,
            options: Vec::new(),
        },
        format,
        id: None,
        queues: queues as u16,
        engine: Engine::Auto,
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

    /// Growth of the heap over many requests, in bytes; and allocations for each.
    fn heap(&mut self) -> Result<(i64, f64)> {
        let count = self.options.heap_requests;
        let warm = self.offsets(1, count / 10);
        self.driver.run(warm)?;
        let offsets = self.offsets(2, count);
        let (allocations, growth) = Counting::during(|| self.driver.run(offsets))?;
        Ok((growth, allocations as f64 / count as f64))
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
        .map(|work| (format!("{} {}", place.name, work.name()), work))
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
            let (growth, allocations) = pair.heap()?;
            // A vector or a table that finds its final size late is no leak; a byte in sixteen
            // requests would be one.
            let verdict = if growth < options.heap_requests as i64 / 16 {
                "met"
            } else {
                "MISSED"
            };
            heap.push(format!(
                "| {name:<28} | {growth:>6} | {verdict:<6} | {allocations:>6.3} |"
            ));
        }
    }
    Ok(blk.close()?)
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
    let shared = tempfile::tempdir_in("/dev/shm")?;
    let disk = tempfile::tempdir_in(&options.directory)?;
    let place = |name, directory: &Path, direct| Place {
        name,
        path: directory.join(format!("{name}.img")),
        direct,
    };
    let places = [
        place("tmpfs", shared.path(), false),
        place("disk", disk.path(), false),
        place("direct", disk.path(), true),
    ];
    println!(
        "{} processors, Linux {}, disk: {}; {} rounds of {:?} for each side, in turn",
        std::thread::available_parallelism()?,
        rustix::system::uname().release().to_string_lossy(),
        file_system(disk.path())?,
        options.rounds,
        options.time,
    );
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
            if let Err(error) = measure(&options, place, &memory, queues, &mut heap) {
                println!("| {:<28} | not measured: {error}", place.name);
            }
        }
        std::fs::remove_file(&place.path)?;
    }
    println!(
        "\n| {:<28} | growth | bar    | allocations |\n|{}",
        format!("heap, {} requests", options.heap_requests),
        "---|".repeat(4)
    );
    for row in heap {
        println!("{row}");
    }
    println!("\ncpu us, syscalls: of the disk's thread for each request (plain: of the loop's);");
    println!("interr., notif., allocations: for each request");
    println!(
        "system calls counted: {}",
        Thread::named("")?.system_calls()?.means()
    );
    Ok(())
}
