//! `launcher disk bench`.

mod load;
mod places;
mod report;
mod scratch;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use formats::{Disk, Engine, Format, Image, Ring};

use self::load::Load;
use self::places::Places;
use self::report::{Report, Row};
use super::image::ring;
use super::which::{Found, Which};
use crate::cli::output::{print, print_json};
use crate::config::size;
use crate::error::text;
use crate::{Error, Result, exit};

const MIB: u64 = 1 << 20;
/// Requests of the sequential rows: so long, so many at once.
const SEQUENTIAL: (u64, usize) = (MIB, 8);
/// Most bytes in flight.
const MOST_IN_FLIGHT: u64 = 256 * MIB;

/// Measure how fast a disk is, for reading, and with --write for writing
///
/// Requests go to the format as a guest's do, by one thread and one io_uring, but with no guest and
/// no virtqueue in between: what is measured is the image, its format and what it lies on. Reads
/// go to where the disk holds data, through the page cache as warm as it is, or past it with
/// --o-direct. The image is opened read-only, under a lock that keeps writers out, and is never
/// written to: with --write a new image of the same format is made beside it, written to, and gone
/// when the command ends.
#[derive(Args)]
#[command(after_help = "Examples:\n  launcher disk bench disk.qcow2\n  \
                  launcher disk bench vm.toml ROOT --o-direct --write\n  \
                  launcher disk bench /dev/sdb --format raw --size 64KiB --depth 1,8,64 --json")]
pub(super) struct Bench {
    /// The image; or, before an INDEX, the TOML file of a VM, the folder of its vm.toml, or its
    /// name
    #[arg(value_name = "PATH|VM")]
    what: PathBuf,
    /// A disk of that VM: its index over `[[block]]` from 0, or its id
    #[arg(value_name = "INDEX|ID")]
    disk: Option<String>,
    /// Format of the image [default: the one that its extension stands for]
    #[arg(short, long, conflicts_with = "disk")]
    format: Option<String>,
    /// O_DIRECT: the host's page cache is passed by
    #[arg(long)]
    o_direct: bool,
    /// Measure writes too, on a new image beside this one, which has at most 256 MiB
    #[arg(long)]
    write: bool,
    /// Requests in flight of the random rows, 1 to 1024
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,32",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    depth: Vec<u16>,
    /// Bytes of a request of the random rows: a power of two, 512 to 1MiB
    #[arg(long, default_value = "4KiB", value_parser = length)]
    size: u64,
    /// How long each row is measured, after a quarter as much to warm up: 0.01 to 3600
    #[arg(long, value_name = "N", default_value = "2", value_parser = seconds)]
    seconds: Duration,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Bench {
    pub(super) fn run(self) -> Result<u8> {
        let found = self.found()?;
        let report = self.measured(&found)?;
        match self.json {
            true => print_json(&report)?,
            false => print(&report.shown(self.write))?,
        }
        Ok(exit::DONE)
    }

    fn found(&self) -> Result<Found> {
        let path = &self.what;
        let lone = self.disk.is_none();
        if lone && self.format.is_none() && path.extension().is_some_and(|it| it == "toml") {
            let shown = path.display();
            let message =
                format!("`{shown}` is the file of a VM, expected an image, or a disk too");
            let help = format!("name the disk: `launcher disk bench {shown} 0`");
            return Err(Error::usage(message).help(help));
        }
        let mut found = Which::of(&self.what, self.disk.clone(), self.format.clone()).find()?;
        found.image.o_direct |= self.o_direct;
        Ok(found)
    }

    fn measured(&self, found: &Found) -> Result<Report> {
        let most = self.depth.iter().copied().max().unwrap_or(1);
        if self.size * u64::from(most) > MOST_IN_FLIGHT {
            let (size, limit) = (size::show(self.size), size::show(MOST_IN_FLIGHT));
            return Err(Error::usage(format!(
                "`--depth` is {most} with requests of {size}, expected at most {limit} in flight"
            )));
        }
        let path = found.path().display();
        let ring = ring()?;
        let mut report = ring.block_on(self.reads(&ring, found), || {})?;
        if self.write {
            let len = report.size.min(scratch::MOST);
            let writes = self.writes(&ring, found, len);
            let rows = ring.block_on(writes, || {}).map_err(|error| {
                error.help(format!(
                    "writes are measured on a new image beside `{path}`, which itself is untouched"
                ))
            })?;
            report.rows.extend(rows);
        }
        Ok(report)
    }

    async fn reads(&self, ring: &Ring, found: &Found) -> Result<Report> {
        let (image, format) = (&found.image, found.format);
        let disk = open(ring, image, format, |error| found.refused(error)).await?;
        let failed = |error: &std::io::Error| failed("read", image, error);
        let size = disk.size();
        self.fits(&*disk, image)?;
        let places = Places::of(&*disk).await.map_err(|error| failed(&error))?;
        let mut report = Report {
            path: found.path().display().to_string(),
            format: format.name,
            size,
            data: places.data(),
            o_direct: image.o_direct,
            engine: match ring.engine() {
                Engine::Threads => "threads",
                Engine::Auto | Engine::IoUring => "io_uring",
            },
            rows: Vec::new(),
        };
        let mut load = Load::new(ring, disk, self.seconds);
        for depth in &self.depth {
            let offsets = places.random(self.size);
            let measured = load.read(self.size, (*depth).into(), offsets).await;
            report.rows.push(Row::of(
                "random read",
                self.size,
                (*depth).into(),
                &measured.map_err(|error| failed(&error))?,
            ));
        }
        let (len, depth) = SEQUENTIAL;
        if size >= len {
            let measured = load.read(len, depth, places.sequential(len)).await;
            let measured = measured.map_err(|error| failed(&error))?;
            report
                .rows
                .push(Row::of("sequential read", len, depth, &measured));
        }
        load.close().await.map_err(|error| failed(&error))?;
        Ok(report)
    }

    /// On new images: each is without a name as soon as it is open, so that nothing stays.
    async fn writes(&self, ring: &Ring, found: &Found, size: u64) -> Result<Vec<Row>> {
        let image = &found.image;
        let failed = |error: &std::io::Error| failed("write", image, error);
        let mut rows = Vec::new();
        let places = Places::all(size);
        let most = usize::from(self.depth.iter().copied().max().unwrap_or(1));
        let disk = scratch::made(ring, found, size).await?;
        let mut load = Load::new(ring, disk, self.seconds);
        let new = places.once(self.size);
        let measured = load.write_new(self.size, most, new).await;
        let measured = measured.map_err(|error| failed(&error))?;
        rows.push(Row::of("random write, new", self.size, most, &measured));
        load.close().await.map_err(|error| failed(&error))?;

        let disk = scratch::made(ring, found, size).await?;
        let mut load = Load::new(ring, disk, self.seconds);
        let (len, depth) = SEQUENTIAL;
        if size >= len {
            // It is full of data before anything is measured that overwrites.
            let filling = places.sequential(len).take((size / len) as usize);
            let filled = load.write_new(len, depth, filling).await;
            filled.map_err(|error| failed(&error))?;
        }
        for depth in &self.depth {
            let offsets = places.random(self.size);
            let measured = load.write(self.size, (*depth).into(), offsets).await;
            let measured = measured.map_err(|error| failed(&error))?;
            rows.push(Row::of(
                "random write",
                self.size,
                (*depth).into(),
                &measured,
            ));
        }
        if size >= len {
            let measured = load.write(len, depth, places.sequential(len)).await;
            let measured = measured.map_err(|error| failed(&error))?;
            rows.push(Row::of("sequential write", len, depth, &measured));
        }
        load.close().await.map_err(|error| failed(&error))?;
        Ok(rows)
    }

    /// An error if a request would be no whole number of the image's blocks, or longer than it.
    fn fits(&self, disk: &dyn Disk, image: &Image) -> Result<()> {
        let (size, limits) = (disk.size(), disk.limits());
        let (path, shown) = (image.path.display(), size::show(self.size));
        let least = limits.alignment.max(image.block_size);
        if !self.size.is_multiple_of(least.into()) {
            return Err(Error::usage(format!(
                "`--size` is {shown}, expected {} or more, which `{path}` is made of",
                size::show(least.into())
            )));
        }
        match size >= self.size {
            true => Ok(()),
            false => Err(Error::usage(format!(
                "`--size` is {shown}, expected at most the size of `{path}`, {}",
                size::show(size)
            ))),
        }
    }
}

async fn open(
    ring: &Ring,
    image: &Image,
    format: &Format,
    refused: impl Fn(formats::OpenError) -> Error,
) -> Result<Box<dyn Disk>> {
    (format.open)(ring, image).await.map_err(refused)
}

fn failed(what: &str, image: &Image, error: &std::io::Error) -> Error {
    let (path, why) = (image.path.display(), text(error));
    Error::failed(format!(
        "cannot measure how `{path}` does: a {what} failed: {why}"
    ))
}

fn length(text: &str) -> std::result::Result<u64, String> {
    let bytes = size::parse(text)?;
    match bytes.is_power_of_two() && (512..=MIB).contains(&bytes) {
        true => Ok(bytes),
        false => Err("expected a power of two from 512 to 1MiB".into()),
    }
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds = text.parse().ok();
    let seconds = seconds.filter(|seconds| (0.01..=3600.0).contains(seconds));
    let wrong = || "expected a number from 0.01 to 3600".to_owned();
    seconds.map(Duration::from_secs_f64).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_a_power_of_two() {
        assert_eq!(length("4KiB"), Ok(4096));
        assert_eq!(length("512"), Ok(512));
        for wrong in ["0", "256", "3KiB", "2MiB", "4kb", ""] {
            assert!(length(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_time_is_a_number_of_seconds() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["0", "-1", "nan", "inf", "1s", "3601"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
