//! Rounds of measurements: everybody takes a turn in each.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::case::{BLOCK, Bar, CLUSTER, Case, Offsets};
use crate::client::{Client, Measured, Until};
use crate::image::Images;
use crate::processors::Processors;
use crate::server::{Server, Side};
use crate::statistics::Spread;
use crate::watchdog::interrupted;
use crate::{Result, content};

/// How many pieces are read back after a measurement.
const SAMPLE: u64 = 64;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program that serves.
    pub launcher: PathBuf,
    /// More arguments for `launcher disk serve`.
    pub serve: Vec<String>,
    /// Only cases whose name contains one of these; all if there is none.
    pub only: Vec<String>,
    /// Measurements of each side.
    pub rounds: usize,
    /// How long one takes.
    pub window: Duration,
    /// What comes before it.
    pub warm_up: Duration,
    /// Bytes of images that are full of data.
    pub area: u64,
    /// Bytes of images that are new: a power of two clusters, each of which is allocated.
    pub fresh: u64,
    /// Whether QEMU's export has a thread of its own.
    pub iothread: bool,
}

/// One side of a row.
#[derive(Clone, Debug)]
pub struct Column {
    /// Who served.
    pub side: Side,
    /// What was measured in each round.
    pub rounds: Vec<Measured>,
}

/// One row of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was measured.
    pub case: Case,
    /// With whom; ours is the first.
    pub columns: Vec<Column>,
}

impl Options {
    /// The cases that are asked for.
    pub fn cases(&self) -> Vec<Case> {
        let wanted = |case: &Case| {
            let name = case.to_string();
            self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
        };
        Case::all().into_iter().filter(wanted).collect()
    }

    /// Measures all cases, and tells of each when it is done. The folder is for images.
    pub fn run(&self, folder: &Path, told: &mut dyn FnMut(&Row)) -> Result<Vec<Row>> {
        let images = Images::new(folder, self.area, self.fresh);
        // The name of a socket may have 107 bytes: those of images may be longer.
        let sockets = tempfile::tempdir()?;
        let mut rows = Vec::new();
        // 0 is what images are made with.
        let mut measurement = 0;
        for case in self.cases() {
            let mut columns: Vec<_> = Side::all(&case, self.iothread)
                .into_iter()
                .map(|side| Column {
                    side,
                    rounds: Vec::new(),
                })
                .collect();
            let count = columns.len();
            for round in 0..self.rounds {
                // Whoever is first in one round is last in the next.
                for turn in 0..count {
                    let column = &mut columns[(round + turn) % count];
                    measurement += 1;
                    let side = column.side;
                    let measured = self.measure(&images, &case, side, measurement, sockets.path());
                    let failed = |error| format!("{case} with {}: {error}", side.name());
                    column.rounds.push(measured.map_err(failed)?);
                }
            }
            let row = Row { case, columns };
            told(&row);
            rows.push(row);
        }
        Ok(rows)
    }

    fn measure(
        &self,
        images: &Images,
        case: &Case,
        side: Side,
        measurement: u64,
        sockets: &Path,
    ) -> Result<Measured> {
        if interrupted() {
            return Err("interrupted".into());
        }
        let image = images.prepare(case)?;
        let mut server = Server::start(side, self, case, &image, sockets)?;
        let _kept = match case.apart {
            true => Some(Processors::own()?.keep()?),
            false => None,
        };
        let mut client = server.connect(case.depth * case.len)?;
        let offsets = Offsets::new(*case, images.area(case), measurement);
        let until = match case.allocating {
            true => Until::Done,
            false => Until::Time {
                warm_up: self.warm_up,
                window: self.window,
            },
        };
        let processor = || server.processor();
        let measured = client
            .drive(case, offsets.clone(), measurement, until, &processor)
            .and_then(|mut measured| {
                if case.allocating {
                    measured.flush = client.flush()?;
                }
                verify(&mut client, case, offsets, measured.made, measurement)?;
                Ok(measured)
            })
            .map_err(|error| server.error(&format!("did not serve: {error}")))?;
        drop(client);
        server.end()?;
        images.judge(case, &image)?;
        Ok(measured)
    }
}

/// Reads some of what the requests transferred, from the first to the last.
fn verify(
    client: &mut Client,
    case: &Case,
    offsets: Offsets,
    made: u64,
    measurement: u64,
) -> Result<()> {
    let step = (made / SAMPLE).max(1) as usize;
    for offset in offsets.take(made as usize).step_by(step) {
        let wrong = |at: u64| format!("the disk does not hold at {at} what was written there");
        let writers = content::written_by(client.read(case, offset)?, offset).map_err(wrong)?;
        if case.write && writers.iter().any(|writer| *writer != measurement) {
            return Err(wrong(offset).into());
        }
        if case.allocating {
            // The rest of the cluster was never written.
            let cluster = offset / CLUSTER * CLUSTER;
            let last = cluster + CLUSTER - BLOCK as u64;
            for beside in [cluster, offset - BLOCK as u64, offset + BLOCK as u64, last] {
                if client.read(case, beside)?.iter().any(|byte| *byte != 0) {
                    return Err(wrong(beside).into());
                }
            }
        }
    }
    Ok(())
}

impl Column {
    /// Requests a second.
    pub fn speed(&self) -> Spread {
        Spread::of(self.rounds.iter().map(speed))
    }

    /// Processor time of the server for a request, in microseconds.
    pub fn processor(&self) -> Spread {
        let each = self.rounds.iter();
        Spread::of(each.map(|it| it.processor.as_secs_f64() * 1e6 / it.requests.max(1) as f64))
    }
}

fn speed(measured: &Measured) -> f64 {
    measured.requests as f64 / measured.time.as_secs_f64()
}

impl Row {
    /// Ours.
    pub fn ours(&self) -> &Column {
        &self.columns[0]
    }

    /// The better QEMU: the one with the greater median.
    pub fn best(&self) -> &Column {
        let speed = |column: &&Column| column.speed().median;
        let faster = |a: &&Column, b: &&Column| speed(a).total_cmp(&speed(b));
        let best = self.columns[1..].iter().max_by(faster);
        best.unwrap_or(&self.columns[0])
    }

    /// How many times the requests of the better QEMU: of the medians, with the least and the
    /// greatest of the rounds.
    pub fn ratio(&self) -> Spread {
        let rounds = self.ours().rounds.iter().zip(&self.best().rounds);
        Spread {
            median: self.ours().speed().median / self.best().speed().median,
            ..Spread::of(rounds.map(|(ours, theirs)| speed(ours) / speed(theirs)))
        }
    }

    /// Our processor time for a request as a multiple of the better QEMU's.
    pub fn processor_ratio(&self) -> f64 {
        self.ours().processor().median / self.best().processor().median
    }

    /// What it must reach, and whether it does.
    pub fn verdict(&self) -> (Bar, bool) {
        let bar = self.case.bar();
        (bar, bar.is_none_or(|bar| self.ratio().median >= bar))
    }
}
