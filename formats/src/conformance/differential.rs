//! Random operations on every kind of image, against a flat model, judged by QEMU.

use std::collections::BTreeSet;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::point::Point;
use super::scene::Scene;
use super::traffic::{self, Subject};
use crate::{Engine, Format, Image, Recorder, Ring};

/// What is tested.
pub struct Suite<'a> {
    /// The engine.
    pub format: &'a Format,
    /// Where images may be made: a directory on a disk, for the sake of O_DIRECT.
    pub directory: &'a Path,
    /// Makes a point into one that the engine supports, or says that it has none like it.
    pub admit: &'a (dyn Fn(Point) -> Option<Point> + Sync),
    /// The line that runs one seed again.
    pub again: &'a (dyn Fn(u64) -> String + Sync),
}

/// A seed takes no longer than this.
const MOST: Duration = Duration::from_secs(300);

/// The seeds to run: the one in the variable `one`, those in `many` (a count, or `FROM..TO`), or
/// `count` of them.
pub fn seeds(one: &str, many: &str, count: u64) -> Result<Vec<u64>, String> {
    let number = |text: &str| {
        let number = text.trim().parse::<u64>();
        number.map_err(|_| format!("`{text}` is not a number of seeds"))
    };
    if let Ok(seed) = std::env::var(one) {
        return Ok(vec![number(&seed)?]);
    }
    let range = match std::env::var(many) {
        Err(_) => 1..count + 1,
        Ok(text) => match text.split_once("..") {
            Some((from, to)) => number(from)?..number(to)?,
            None => 1..number(&text)? + 1,
        },
    };
    Ok(range.collect())
}

/// Runs the seeds. Returns the values of all dimensions that were met, for the test to see
/// whether any is missing.
///
/// # Errors
///
/// A line for each seed that failed: how to run it again, and what was wrong.
pub fn differential(suite: &Suite<'_>, seeds: &[u64]) -> Result<BTreeSet<String>, String> {
    let met = Mutex::new(BTreeSet::new());
    let direct = direct_block_size(suite.directory);
    parallel(seeds, suite.again, |seed| {
        let point = (suite.admit)(fitted(Point::of(seed), direct));
        let Some(point) = point else { return Ok(()) };
        if let Ok(mut met) = met.lock() {
            met.extend(point.values());
        }
        let directory = suite.directory.join(format!("seed-{seed}"));
        std::fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
        let result = run_point(suite.format, &point, &directory);
        // What failed stays to be looked at.
        if result.is_ok() {
            let _ = std::fs::remove_dir_all(&directory);
        }
        result.map_err(|error| format!("{error}\n    {point:?}"))
    })?;
    met.into_inner().map_err(|error| error.to_string())
}

/// Runs one job for each seed, on more threads than there are processors: what is waited for is
/// the disk for the most part.
pub(super) fn parallel(
    seeds: &[u64],
    again: &(dyn Fn(u64) -> String + Sync),
    job: impl Fn(u64) -> Result<(), String> + Sync,
) -> Result<(), String> {
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(4, |count| 2 * count.get().min(8));
    std::thread::scope(|scope| {
        let (report, running) = mpsc::channel();
        for thread in 0..threads {
            let (next, failures, job, report) = (&next, &failures, &job, report.clone());
            scope.spawn(move || {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let _ = report.send((thread, Some(*seed)));
                    let result = catch_unwind(AssertUnwindSafe(|| job(*seed)));
                    let _ = report.send((thread, None));
                    let error = match result {
                        Ok(Ok(())) => continue,
                        Ok(Err(error)) => error,
                        Err(panic) => format!("panicked: {}", words(&*panic)),
                    };
                    let line = format!("{}\n    {error}", again(*seed));
                    eprintln!("FAILED: {line}");
                    if let Ok(mut failures) = failures.lock() {
                        failures.push(line);
                    }
                }
            });
        }
        drop(report);
        watch(threads, &running, again);
    });
    let failures = failures.into_inner().map_err(|error| error.to_string())?;
    match failures.len() {
        0 => Ok(()),
        count => Err(format!(
            "{count} of {} failed:\n{}",
            seeds.len(),
            failures.join("\n")
        )),
    }
}

fn words(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("?")
}

/// Ends the process with the line of a seed that hangs.
fn watch(
    threads: usize,
    running: &mpsc::Receiver<(usize, Option<u64>)>,
    again: &(dyn Fn(u64) -> String + Sync),
) {
    let mut since: Vec<Option<(u64, Instant)>> = vec![None; threads];
    loop {
        match running.recv_timeout(Duration::from_secs(1)) {
            Ok((thread, seed)) => since[thread] = seed.map(|seed| (seed, Instant::now())),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
        for (seed, start) in since.iter().flatten() {
            if start.elapsed() > MOST {
                // Past what tests do to the output of their threads.
                let line = format!("\nFAILED: {}\n    hangs\n", again(*seed));
                let _ = std::io::stderr().write_all(line.as_bytes());
                std::process::exit(101);
            }
        }
    }
}

/// The smallest block that O_DIRECT takes here, if there is O_DIRECT.
fn direct_block_size(directory: &Path) -> Option<u32> {
    let path = directory.join("direct");
    let _ = std::fs::write(&path, [0; 8192]);
    let format = crate::find("raw")?;
    let ring = Ring::new(Engine::Auto).ok()?;
    let found = [512, 4096].into_iter().find(|block_size| {
        let image = Image {
            ro: true,
            o_direct: true,
            block_size: *block_size,
            lock: false,
            ..Image::new(path.clone())
        };
        ring.block_on((format.open)(&ring, &image), || {}).is_ok()
    });
    let _ = std::fs::remove_file(path);
    if found.is_none() {
        eprintln!("O_DIRECT is not tested, {} has none", directory.display());
    }
    found
}

/// A point as the host can have it.
fn fitted(mut point: Point, direct: Option<u32>) -> Point {
    match direct {
        Some(block_size) if u64::from(block_size) <= point.cluster_size && point.o_direct => {
            if block_size > point.block_size {
                point.block_size = block_size;
                point.size = point.size.next_multiple_of(block_size.into());
            }
        }
        _ => point.o_direct = false,
    }
    point
}

/// A ring of the engine that a point names, or of the one that there is.
pub(super) fn ring(engine: Engine) -> Result<Ring, String> {
    let ring = Ring::new(engine).or_else(|error| {
        eprintln!("io_uring is not tested, it is refused here: {error}");
        Ring::new(Engine::Threads)
    });
    ring.map_err(|error| error.to_string())
}

/// Makes the files of a point, uses the image in two rounds with QEMU between them, and
/// compares.
fn run_point(format: &Format, point: &Point, directory: &Path) -> Result<(), String> {
    let mut scene = Scene::build(point, directory)?;
    let ring = ring(point.engine)?;
    if point.ours {
        create(&ring, format, &scene)?;
        scene.image.size = None;
    }
    for round in 0..2 {
        let load = scene.load();
        let recorder = Recorder::new(false, point.delays.then_some(point.seed));
        let subject = Subject {
            ring: &ring,
            recorder: &recorder,
            format,
            image: &scene.image,
        };
        let header = scene.header()?;
        let seed = point.seed << 1 | round;
        let outcome = traffic::run(&subject, &load, seed, &scene.content, scene.versions)?;
        (scene.content, scene.versions) = (outcome.content, outcome.versions);
        let after = scene.header()?;
        if let Some(at) = (0..header.len()).find(|at| after.get(*at) != header.get(*at)) {
            return Err(format!("byte {at} of the header was changed"));
        }
        if round == 0 && (scene.snapshots.len() as u32) < point.snapshots {
            scene.snapshot()?;
        } else if round == 0 && point.sparse && !point.huge {
            scene.used_by_qemu(4)?;
        }
    }
    scene.verify()
}

/// Our engine creates the image.
pub(super) fn create(ring: &Ring, format: &Format, scene: &Scene) -> Result<(), String> {
    let root = async {
        let opening = (format.open)(ring, &scene.image);
        let disk = opening
            .await
            .map_err(|error| format!("it is not created: {error}"))?;
        disk.close().await.map_err(|error| error.to_string())
    };
    ring.block_on(root, || {})
}
