//! The harness itself: it finds what is wrong with a disk, and nothing wrong with a right one.

use std::cell::Cell;
use std::fs;
use std::path::Path;

use formats::conformance::{Content, Load, Point, Random, Recording, Scene, Subject, read, run};
use formats::{Disk, Engine, Format, Image, Limits, Opening, Pending, Recorder, Ring, Segments};

use super::directory;

/// What is wrong with a [`Broken`] disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The last sector of a long write goes astray.
    LosesTail,
    /// Two sectors of a write change places.
    Swaps,
    /// A discard brings back what was overwritten long ago.
    Exposes,
    /// Zeroes are not written.
    KeepsZeroed,
    /// What it holds is lost when it is closed.
    ForgetsAtClose,
    /// New space is not zero.
    GrowsDirty,
    /// A flush does nothing: only a power cut tells.
    NeverFlushes,
}

/// A raw image behind a disk that is right most of the time.
struct Broken {
    inner: Box<dyn Disk>,
    fault: Fault,
    count: Cell<u64>,
}

impl Broken {
    fn now(&self) -> bool {
        self.count.set(self.count.get() + 1);
        self.count.get().is_multiple_of(9)
    }
}

fn memory(byte: u8, len: usize) -> Segments {
    let buffer = formats::Buffer::zeroed(len, 512).unwrap();
    let segments = Segments::from_buffer(buffer);
    segments.fill(byte);
    segments
}

impl Disk for Broken {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, offset: u64, to: Segments) -> Pending<'_> {
        self.inner.read(offset, to)
    }

    fn write(&self, offset: u64, from: Segments) -> Pending<'_> {
        let len = from.len();
        match self.fault {
            Fault::LosesTail if len > 512 && self.now() => {
                self.inner.write(offset, from.slice(0, len - 512))
            }
            Fault::Swaps if len > 512 && self.now() => Box::pin(async move {
                self.inner.write(offset, from.slice(512, 512)).await?;
                self.inner.write(offset + 512, from.slice(0, 512)).await?;
                let rest = from.slice(1024, len);
                match rest.is_empty() {
                    true => Ok(()),
                    false => self.inner.write(offset + 1024, rest).await,
                }
            }),
            _ => self.inner.write(offset, from),
        }
    }

    fn flush(&self) -> Pending<'_> {
        match self.fault {
            Fault::NeverFlushes => Box::pin(async { Ok(()) }),
            _ => self.inner.flush(),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> Pending<'_> {
        match self.fault {
            Fault::Exposes if self.now() => self.inner.write(offset, memory(7, len as usize)),
            _ => self.inner.discard(offset, len),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Pending<'_> {
        match self.fault {
            Fault::KeepsZeroed if self.now() => Box::pin(async { Ok(()) }),
            _ => self.inner.write_zeroes(offset, len, unmap),
        }
    }

    fn resize(&self, size: u64) -> Pending<'_> {
        Box::pin(async move {
            let from = self.inner.size();
            self.inner.resize(size).await?;
            match self.fault == Fault::GrowsDirty && size > from {
                true => self.inner.write(from, memory(9, 512)).await,
                false => Ok(()),
            }
        })
    }

    fn close(self: Box<Self>) -> Pending<'static> {
        Box::pin(async move {
            if self.fault == Fault::ForgetsAtClose {
                self.inner
                    .write(self.count.get() % 7 * 512, memory(3, 512))
                    .await?;
            }
            self.inner.close().await
        })
    }
}

fn open_broken<'a>(fault: Fault, ring: &'a Ring, image: &'a Image) -> Opening<'a> {
    Box::pin(async move {
        let format = formats::find("sparse-raw").unwrap();
        let inner = (format.open)(ring, image).await?;
        Ok(Box::new(Broken {
            inner,
            fault,
            count: Cell::new(0),
        }) as Box<dyn Disk>)
    })
}

fn broken(fault: Fault) -> Format {
    let open: for<'a> fn(&'a Ring, &'a Image) -> Opening<'a> = match fault {
        Fault::LosesTail => |ring, image| open_broken(Fault::LosesTail, ring, image),
        Fault::Swaps => |ring, image| open_broken(Fault::Swaps, ring, image),
        Fault::Exposes => |ring, image| open_broken(Fault::Exposes, ring, image),
        Fault::KeepsZeroed => |ring, image| open_broken(Fault::KeepsZeroed, ring, image),
        Fault::ForgetsAtClose => |ring, image| open_broken(Fault::ForgetsAtClose, ring, image),
        Fault::GrowsDirty => |ring, image| open_broken(Fault::GrowsDirty, ring, image),
        Fault::NeverFlushes => |ring, image| open_broken(Fault::NeverFlushes, ring, image),
    };
    Format {
        name: "broken",
        extensions: &[],
        description: "a disk that is right most of the time",
        abilities: &[],
        options: &[],
        open,
        create: |_| Ok(()),
    }
}

pub(crate) fn image(path: &Path) -> Image {
    Image::new(path)
}

/// What is done to a raw image.
fn load(random: &mut Random) -> Load {
    Load {
        operations: 400,
        in_flight: random.of(&[1, 16, 32]),
        overlap: random.chance(50),
        block: 512,
        cluster: 4096,
        most: 1 << 20,
        areas: vec![0..4 << 20, 0..64 << 10, 1 << 20..(1 << 20) + 8192],
        writes: 60,
        flushes: 20,
        reopens: 10,
        resizes: 15,
        shrinks: random.chance(50),
        largest: 4 << 20,
    }
}

/// Puts a raw image under load.
fn raw_run(format: &Format, engine: Engine, seed: u64) -> Result<(), String> {
    let directory = directory();
    let path = directory.path().join("a.raw");
    let size = 2 << 20;
    fs::File::create(&path).unwrap().set_len(size).unwrap();
    let mut random = Random::new(seed);
    let load = load(&mut random);
    let recorder = Recorder::new(false, random.chance(80).then_some(seed));
    let ring = Ring::new(engine).unwrap();
    let subject = Subject {
        ring: &ring,
        recorder: &recorder,
        format,
        image: &image(&path),
    };
    let outcome = run(&subject, &load, seed, &Content::empty(size), 0)?;
    outcome.content.compare_raw(&path, 0..outcome.content.size)
}

/// Cuts the power while a raw image is under load.
fn raw_cuts(format: &Format, barriers: bool, seed: u64) -> Result<(), String> {
    let directory = directory();
    let path = directory.path().join("a.raw");
    let after = directory.path().join("after");
    fs::create_dir(&after).unwrap();
    let size = 1 << 20;
    fs::File::create(&path).unwrap().set_len(size).unwrap();
    let mut random = Random::new(seed);
    let load = Load {
        operations: 60,
        overlap: false,
        most: 64 << 10,
        reopens: 0,
        // To make a file longer and to write there are two things to the host.
        resizes: 0,
        ..load(&mut random)
    };
    let recorder = Recorder::new(true, Some(seed));
    let ring = Ring::new(Engine::Auto).unwrap();
    let subject = Subject {
        ring: &ring,
        recorder: &recorder,
        format,
        image: &image(&path),
    };
    let content = Content::empty(size);
    let recording = Recording::of(
        &subject,
        &load,
        seed,
        &content,
        0,
        std::slice::from_ref(&path),
    )?;
    // Another ring, which nobody witnesses.
    let ring = Ring::new(Engine::Auto).unwrap();
    for _ in 0..40 {
        let cut = recording.cut(&mut random, barriers);
        recording.write(&cut, &after)?;
        let image = image(&after.join("a.raw"));
        read(&ring, format, &image, &recording, &cut)?;
    }
    Ok(())
}

#[test]
fn a_right_disk_passes_on_both_engines() {
    for seed in 0..12 {
        for engine in [Engine::Auto, Engine::Threads] {
            for format in ["sparse-raw", "raw"] {
                raw_run(formats::find(format).unwrap(), engine, seed)
                    .unwrap_or_else(|error| panic!("seed {seed}, {engine:?}, {format}: {error}"));
            }
        }
    }
}

#[test]
fn every_kind_of_broken_disk_is_found() {
    for fault in [
        Fault::LosesTail,
        Fault::Swaps,
        Fault::Exposes,
        Fault::KeepsZeroed,
        Fault::ForgetsAtClose,
        Fault::GrowsDirty,
    ] {
        let format = broken(fault);
        let found = (0..8).find_map(|seed| raw_run(&format, Engine::Auto, seed).err());
        let error = found.unwrap_or_else(|| panic!("{fault:?} was not found"));
        assert!(error.contains("holds"), "{fault:?}: {error}");
    }
}

#[test]
fn a_right_disk_survives_power_cuts() {
    let format = formats::find("sparse-raw").unwrap();
    for seed in 0..6 {
        raw_cuts(format, true, seed).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

#[test]
fn a_disk_that_never_flushes_is_found_out_by_power_cuts_alone() {
    let format = broken(Fault::NeverFlushes);
    assert_eq!(raw_run(&format, Engine::Auto, 1), Ok(()));
    let found = (0..6).find_map(|seed| raw_cuts(&format, true, seed).err());
    assert!(found.unwrap().contains("expected one of"));
}

#[test]
fn a_host_that_makes_nothing_durable_is_found_out() {
    let format = formats::find("sparse-raw").unwrap();
    let found = (0..6).find_map(|seed| raw_cuts(format, false, seed).err());
    assert!(found.unwrap().contains("expected one of"));
}

#[test]
fn the_images_that_qemu_makes_hold_what_the_model_says() {
    let directory = directory();
    let points = (1..).map(Point::of).filter(|point| !point.ours);
    let count = std::env::var("QCOW2_SCENES").map_or(24, |count| count.parse().unwrap());
    for mut point in points.take(count) {
        // To allocate everything is what our engine does when it opens an image.
        point.sparse = true;
        let place = directory.path().join(point.seed.to_string());
        fs::create_dir(&place).unwrap();
        let result = Scene::build(&point, &place).and_then(|mut scene| scene.verify());
        if let Err(error) = result {
            panic!("{error}\n{point:?}\n{}", directory.keep().display());
        }
        fs::remove_dir_all(&place).unwrap();
    }
}

#[test]
fn the_usual_seeds_meet_every_value_of_the_matrix() {
    let met: Vec<_> = (1..=200)
        .flat_map(|seed| Point::of(seed).values())
        .collect();
    let mut missing = Point::matrix();
    missing.retain(|value| !met.contains(value));
    assert!(missing.is_empty(), "{missing:?}");
}
