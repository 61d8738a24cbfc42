//! Power cuts: whatever part of what was not yet synchronised reaches the disk, the image is
//! valid and holds what was flushed.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::differential::{create, parallel, ring};
use super::point::{DataFile, Point};
use super::qemu::{self, Found};
use super::recording::{Cut, Recording};
use super::scene::{Scene, TOP};
use super::traffic::{Load, Subject};
use crate::random::Random;
use crate::{Buffer, Engine, Format, Image, Recorder, Ring, Segments, qcow2};

/// What is tested.
pub struct Cuts<'a> {
    /// The engine.
    pub format: &'a Format,
    /// Where images may be made.
    pub directory: &'a Path,
    /// Makes a point into one that the engine supports, or says that it has none like it.
    pub admit: &'a (dyn Fn(Point) -> Option<Point> + Sync),
    /// The line that runs one seed again.
    pub again: &'a (dyn Fn(u64) -> String + Sync),
    /// Our check looks at every state. QEMU's does at one of so many, and both must agree on it.
    pub sample: u64,
    /// States of each run; 0: one for each event.
    pub states: u64,
    /// Whether synchronising a file makes anything durable. Without that, no engine can keep its
    /// promises: a suite that finds nothing then is blind.
    pub barriers: bool,
}

/// Records a run for each seed, cuts the power at many times and in many ways, and looks at what
/// is left. Returns the number of states, and the values of all dimensions that were met.
///
/// # Errors
///
/// A line for each run that failed: how to run it again, and what was wrong in its first bad
/// state.
pub fn power_cuts(cuts: &Cuts<'_>, seeds: &[u64]) -> Result<(u64, BTreeSet<String>), String> {
    let count = AtomicU64::new(0);
    let met = Mutex::new(BTreeSet::new());
    parallel(seeds, cuts.again, |seed| {
        let Some(point) = (cuts.admit)(point(seed)) else {
            return Ok(());
        };
        if let Ok(mut met) = met.lock() {
            met.extend(point.values());
        }
        let directory = cuts.directory.join(format!("cut-{seed}"));
        fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
        let result = run_point(cuts, &point, &directory, &count);
        if result.is_ok() {
            let _ = fs::remove_dir_all(&directory);
        }
        result.map_err(|error| format!("{error}\n    {point:?}"))
    })?;
    let met = met.into_inner().map_err(|error| error.to_string())?;
    Ok((count.into_inner(), met))
}

/// A small image, for its whole content is looked at again and again.
fn point(seed: u64) -> Point {
    let mut random = Random::new(seed ^ 0xc0_7000);
    let mut point = Point::of(seed);
    point.cluster_size = random.of(&[512, 512, 4096, 4096, 64 << 10]);
    point.extended_l2 &= point.cluster_size >= 16 << 10;
    if point.version == 3 && point.cluster_size >= 16 << 10 {
        point.extended_l2 = random.chance(60);
    }
    point.huge = false;
    point.size = match point.cluster_size {
        512 => random.of(&[300 << 10, 600 << 10, 1200 << 10]),
        4096 => random.of(&[500 << 10, 1 << 20]),
        _ => (1 << 20) + (random.below(16) << 15),
    };
    point.size += random.below(8) * 4096;
    point.o_direct = false;
    point.sparse = true;
    point.overlap = false;
    point.delays = true;
    point.in_flight = random.of(&[4, 8, 16]);
    point
}

/// What such a run does: enough to make every table grow.
fn load(point: &Point, random: &mut Random) -> Load {
    let cluster = point.cluster_size;
    let largest = point.size * 5 / 2 / 4096 * 4096;
    let mut areas = Vec::from([0..largest, 0..largest]);
    for _ in 0..2 {
        let start = random.below(point.size) / cluster * cluster;
        areas.push(start..(start + 4 * cluster.max(4096)).min(largest));
    }
    Load {
        operations: random.of(&[30, 60, 100]),
        in_flight: point.in_flight,
        overlap: point.overlap,
        block: point.block_size.into(),
        cluster,
        most: 128 << 10,
        areas,
        writes: 95,
        flushes: random.of(&[30, 80, 200]),
        reopens: random.of(&[0, 10]),
        resizes: if point.resizes() { 40 } else { 0 },
        shrinks: point.shrinks,
        largest,
    }
}

fn run_point(
    cuts: &Cuts<'_>,
    point: &Point,
    directory: &Path,
    count: &AtomicU64,
) -> Result<(), String> {
    let mut scene = Scene::build(point, directory)?;
    let mut random = Random::new(point.seed ^ 0xc07);
    {
        let ring = ring(point.engine)?;
        if point.ours {
            create(&ring, cuts.format, &scene)?;
            scene.image.size = None;
            if point.snapshots > 0 {
                scene.snapshot()?;
            }
        }
    }
    let mut files = vec![scene.image.path.clone()];
    if point.data_file != DataFile::None {
        files.push(directory.join("top.data"));
    }
    let recorder = Recorder::new(true, Some(point.seed));
    let recording = {
        let ring = ring(point.engine)?;
        let subject = Subject {
            ring: &ring,
            recorder: &recorder,
            format: cuts.format,
            image: &scene.image,
        };
        let load = load(point, &mut random);
        let (content, versions) = (&scene.content, scene.versions);
        Recording::of(&subject, &load, point.seed, content, versions, &files)?
    };
    let mut states = State {
        cuts,
        ring: ring(Engine::Auto)?,
        scene: &scene,
        lazy: point.lazy_refcounts,
        image: scene.image.clone(),
    };
    // In another way than when it was recorded.
    states
        .image
        .options
        .retain(|(name, _)| *name != "cache_size");
    let all = match cuts.states {
        0 => recording.prefixes(cuts.barriers),
        states => {
            let cut = |_| recording.cut(&mut random, cuts.barriers);
            (0..states).map(cut).collect()
        }
    };
    for (number, cut) in (0..).zip(all) {
        // In the same place: an image may name what belongs to it by a whole path.
        recording.write(&cut, directory)?;
        count.fetch_add(1, Ordering::Relaxed);
        // So that the samples of all runs are of different kinds.
        let sample = (number + point.seed).is_multiple_of(cuts.sample.max(1));
        states
            .look(&recording, &cut, number, sample)
            .map_err(|error| {
                let steps = recording.describe(&cut);
                format!("state {number}, {cut:?}: {error}\n    the last steps were{steps}")
            })?;
    }
    scene.below_is_untouched()
}

/// What is left after a power cut, to be looked at.
struct State<'a> {
    cuts: &'a Cuts<'a>,
    ring: Ring,
    scene: &'a Scene,
    lazy: bool,
    image: Image,
}

impl State<'_> {
    fn look(
        &mut self,
        recording: &Recording,
        cut: &Cut,
        number: u64,
        sample: bool,
    ) -> Result<(), String> {
        match self.lazy {
            // Its refcounts are known to be behind until it was opened.
            true => drop(self.examine(sample)?),
            false => self.check(sample)?,
        }
        if sample && !self.lazy {
            self.convert(recording, cut)?;
        }
        // To open it for reading must do, unless it is to be repaired first.
        self.image.ro = !self.lazy && number.is_multiple_of(2);
        read(&self.ring, self.cuts.format, &self.image, recording, cut)?;
        if !self.image.ro {
            self.check(sample)
                .map_err(|error| format!("used and closed: {error}"))?;
        }
        match sample {
            true => self.snapshots(),
            false => Ok(()),
        }
    }

    /// Checks the image: leaked clusters are what a power cut may cost.
    fn check(&self, sample: bool) -> Result<(), String> {
        let (found, said) = self.examine(sample)?;
        match found.corruptions {
            0 => Ok(()),
            _ => Err(format!("it is corrupt: {said}")),
        }
    }

    /// What our check finds, which is what QEMU's does.
    fn examine(&self, sample: bool) -> Result<(Found, String), String> {
        let failed = |error: &dyn Display| format!("our check: {error}");
        let file = File::open(&self.image.path).map_err(|error| failed(&error))?;
        let report = qcow2::check(&file, &mut |_, _| {}).map_err(|error| failed(&error))?;
        if report.check_errors + report.overlaps > 0 {
            return Err(failed(&report));
        }
        let found = Found {
            corruptions: report.corruptions,
            leaks: report.leaks,
        };
        if sample {
            let (theirs, said) = qemu::examine(&self.scene.directory, TOP)?;
            if theirs != found {
                return Err(format!("the checks disagree: {said}\nours: {report}"));
            }
        }
        Ok((found, report.to_string()))
    }

    /// Lets QEMU read the image.
    fn convert(&self, recording: &Recording, cut: &Cut) -> Result<(), String> {
        qemu::img(
            &self.scene.directory,
            &format!("convert -f qcow2 -O raw {TOP} converted"),
        )?;
        let bytes =
            fs::read(self.scene.directory.join("converted")).map_err(|error| error.to_string())?;
        if !recording.history.allows_size(cut.time, bytes.len() as u64) {
            return Err(format!("to qemu-img it has {} bytes", bytes.len()));
        }
        let result = recording.history.check(cut.time, 0, &bytes);
        result.map_err(|error| format!("qemu-img convert: {error}"))
    }

    /// What the snapshots hold.
    fn snapshots(&self) -> Result<(), String> {
        for (name, content) in &self.scene.snapshots {
            let line = format!("convert -f qcow2 -l snapshot.name={name} -O raw {TOP} snapshot");
            qemu::img(&self.scene.directory, &line)?;
            let path = self.scene.directory.join("snapshot");
            let len = fs::metadata(&path)
                .map_err(|error| error.to_string())?
                .len();
            content
                .compare_raw(&path, 0..len.min(content.size))
                .map_err(|error| format!("snapshot {name}: {error}"))?;
        }
        Ok(())
    }
}

/// Opens what is left with the engine, compares all of it, uses it if it may, and closes it.
pub fn read(
    ring: &Ring,
    format: &Format,
    image: &Image,
    recording: &Recording,
    cut: &Cut,
) -> Result<(), String> {
    const PIECE: u64 = 256 << 10;
    let root = async {
        let opening = (format.open)(ring, image);
        let disk = opening
            .await
            .map_err(|error| format!("it does not open: {error}"))?;
        let (size, history) = (disk.size(), &recording.history);
        if !history.allows_size(cut.time, size) {
            return Err(format!("it has {size} bytes"));
        }
        let mut offset = 0;
        let mut found = vec![0; PIECE as usize];
        while offset < size {
            let len = PIECE.min(size - offset) as usize;
            let memory = Buffer::zeroed(len, 4096).map_err(|error| error.to_string())?;
            let memory = Segments::from_buffer(memory);
            let result = disk.read(offset, memory.clone()).await;
            result.map_err(|error| format!("read of {len} bytes at {offset}: {error}"))?;
            memory.copy_to(&mut found);
            history.check(cut.time, offset / 512, &found[..len])?;
            offset += len as u64;
        }
        if !image.ro && size >= 8192 {
            // It is a disk like any other now.
            let memory = Buffer::zeroed(4096, 4096).map_err(|error| error.to_string())?;
            let at = cut.time % (size / 4096) * 4096;
            let result = disk.write(at, Segments::from_buffer(memory)).await;
            result.map_err(|error| format!("write at {at}: {error}"))?;
        }
        let closed = disk.close().await;
        closed.map_err(|error| format!("it does not close: {error}"))
    };
    ring.block_on(root, || {})
}
