//! A run that was witnessed, and the files that a power cut may leave of it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::content::{Content, SECTOR};
use super::history::History;
use super::traffic::{self, Load, Subject};
use crate::random::Random;
use crate::{Effect, FileId, Step};

/// A file that was written to.
struct Written {
    name: PathBuf,
    /// What it held at first.
    bytes: Vec<u8>,
    steps: Vec<Step>,
}

/// What was done to the files, and to the disk in them.
pub struct Recording {
    files: Vec<Written>,
    /// What the disk may hold at any time.
    pub history: History,
    times: Vec<u64>,
}

/// Which of the steps that nothing made durable are found after the cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// All that began.
    All,
    /// None.
    None,
    /// Whole steps, each so many times of a hundred.
    Steps(u64),
    /// Single sectors, each so many times of a hundred.
    Sectors(u64),
    /// All but this one of the last ones.
    AllBut(u64),
    /// This one of the last ones only.
    Only(u64),
}

/// One power cut.
#[derive(Clone, Debug)]
pub struct Cut {
    /// What happened before this time has happened.
    pub time: u64,
    kept: Kept,
    seed: u64,
    /// Whether synchronising a file makes anything durable.
    barriers: bool,
}

impl Recording {
    /// Puts a disk under load and notes what becomes of the `files` that it lies in.
    pub fn of(
        subject: &Subject<'_>,
        load: &Load,
        seed: u64,
        content: &Content,
        versions: u32,
        files: &[PathBuf],
    ) -> Result<Recording, String> {
        let mut written = BTreeMap::<FileId, Written>::new();
        for path in files {
            let failed = |error: std::io::Error| format!("{}: {error}", path.display());
            let meta = fs::metadata(path).map_err(failed)?;
            let file = Written {
                name: path.file_name().unwrap_or_default().into(),
                bytes: fs::read(path).map_err(failed)?,
                steps: Vec::new(),
            };
            written.insert((meta.dev(), meta.ino()), file);
        }
        let outcome = traffic::run(subject, load, seed, content, versions)?;
        let mut times: Vec<u64> = outcome.acts.iter().map(|act| act.ended).collect();
        for step in subject.recorder.take() {
            times.extend([Some(step.began), step.ended].into_iter().flatten());
            match written.get_mut(&step.file) {
                Some(file) => file.steps.push(step),
                None if matches!(step.effect, Effect::None | Effect::Sync) => {}
                None => return Err(format!("another file was written to: {:?}", step.effect)),
            }
        }
        times.retain(|time| *time != u64::MAX);
        times.sort_unstable();
        let recording = Recording {
            files: written.into_values().collect(),
            history: History::new(content, outcome.acts),
            times,
        };
        recording.check_itself(files)?;
        Ok(recording)
    }

    /// Whether what was noted leads to what is there now.
    fn check_itself(&self, files: &[PathBuf]) -> Result<(), String> {
        let end = Cut {
            time: u64::MAX,
            kept: Kept::All,
            seed: 0,
            barriers: true,
        };
        for (name, bytes) in self.state(&end) {
            let path = files.iter().find(|path| path.ends_with(name));
            let found = path.and_then(|path| fs::read(path).ok());
            let found = found.ok_or_else(|| format!("{} is gone", name.display()))?;
            if found != bytes {
                let at = found.iter().zip(&bytes).position(|(a, b)| a != b);
                return Err(format!(
                    "{}: {} bytes, {} were noted; the first difference is at {at:?}: something was \
                     written past the ring, or by two overlapping writes at once",
                    name.display(),
                    found.len(),
                    bytes.len(),
                ));
            }
        }
        Ok(())
    }

    /// A power cut at random.
    pub fn cut(&self, random: &mut Random, barriers: bool) -> Cut {
        let flushed = self.history.flushed();
        let after = match flushed.is_empty() || random.chance(65) {
            true => self.times[random.below(self.times.len() as u64) as usize],
            false => random.of(flushed),
        };
        let kept = match random.below(10) {
            0 => Kept::All,
            1..3 => Kept::None,
            3 => Kept::Steps(random.of(&[20, 50, 80])),
            4..7 => Kept::Sectors(random.of(&[10, 50, 90])),
            7 => Kept::AllBut(random.below(8)),
            _ => Kept::Only(random.below(8)),
        };
        Cut {
            time: after + 1,
            kept,
            seed: random.number(),
            barriers,
        }
    }

    /// Power cuts just after every single event, with everything written that was asked for.
    pub fn prefixes(&self, barriers: bool) -> Vec<Cut> {
        let cut = |time: &u64| Cut {
            time: time + 1,
            kept: Kept::All,
            seed: 0,
            barriers,
        };
        self.times.iter().map(cut).collect()
    }

    /// What the files hold after a power cut.
    pub fn state(&self, cut: &Cut) -> Vec<(&Path, Vec<u8>)> {
        let mut random = Random::new(cut.seed);
        let mut files = Vec::new();
        for file in &self.files {
            files.push((&*file.name, file.after(cut, &mut random)));
        }
        files
    }

    /// The last steps before a power cut, for who looks for what went wrong.
    pub fn describe(&self, cut: &Cut) -> String {
        let mut lines = String::new();
        for file in &self.files {
            let horizon = file.horizon(cut);
            let began = file.steps.iter().filter(|step| step.began < cut.time);
            let last: Vec<_> = began.rev().take(24).collect();
            for step in last.into_iter().rev() {
                let what = match &step.effect {
                    Effect::Write { offset, bytes } => {
                        format!("write of {:#x} bytes at {offset:#x}", bytes.len())
                    }
                    Effect::Zero { offset, len, .. } => format!("{len:#x} zeroes at {offset:#x}"),
                    other => format!("{other:?}"),
                };
                let durable = match is_durable(step, horizon) {
                    true => ", durable",
                    false => "",
                };
                let (name, began, ended) = (file.name.display(), step.began, step.ended);
                let ended = ended.map_or("…".into(), |ended| ended.to_string());
                lines += &format!("\n      {name} {began}-{ended}: {what}{durable}");
            }
        }
        lines
    }

    /// Writes what the files hold after a power cut into another directory.
    pub fn write(&self, cut: &Cut, directory: &Path) -> Result<(), String> {
        for (name, bytes) in self.state(cut) {
            let path = directory.join(name);
            let written = fs::write(&path, bytes);
            written.map_err(|error| format!("{}: {error}", path.display()))?;
        }
        Ok(())
    }
}

/// Whether what was over before `horizon` is durable, and this was.
fn is_durable(step: &Step, horizon: Option<u64>) -> bool {
    step.ended.is_some_and(|ended| Some(ended) < horizon)
}

impl Written {
    /// When the last synchronisation that was over began: it holds for what was over then.
    fn horizon(&self, cut: &Cut) -> Option<u64> {
        let over = |step: &&Step| step.ended.is_some_and(|ended| ended < cut.time);
        let syncs = self.steps.iter().filter(|step| step.effect == Effect::Sync);
        let syncs = syncs.filter(|step| cut.barriers && over(step));
        syncs.map(|step| step.began).max()
    }

    fn after(&self, cut: &Cut, random: &mut Random) -> Vec<u8> {
        let began = self.steps.iter().filter(|step| step.began < cut.time);
        let horizon = self.horizon(cut);
        let durable = |step: &Step| is_durable(step, horizon);
        let open = began.clone().filter(|step| !durable(step));
        let open = open.filter(|step| !matches!(step.effect, Effect::None | Effect::Sync));
        let count = open.count() as u64;
        let (mut bytes, mut left) = (self.bytes.clone(), count);
        for step in began {
            if durable(step) {
                apply(&step.effect, &mut bytes, None);
                continue;
            }
            if matches!(step.effect, Effect::None | Effect::Sync) {
                continue;
            }
            left -= 1;
            let whole = match cut.kept {
                Kept::All => true,
                Kept::None => false,
                Kept::Steps(percent) => random.chance(percent),
                Kept::AllBut(which) => left != which % count,
                Kept::Only(which) => left == which % count,
                Kept::Sectors(percent) => {
                    let size = match step.effect {
                        // The file system knows of the new size, but the data is lost.
                        Effect::Write { offset, ref bytes } => offset + bytes.len() as u64,
                        _ => 0,
                    };
                    if size > bytes.len() as u64 && random.chance(50) {
                        resize(&mut bytes, size as usize);
                    }
                    apply(
                        &step.effect,
                        &mut bytes,
                        Some(&mut || random.chance(percent)),
                    );
                    continue;
                }
            };
            if whole {
                apply(&step.effect, &mut bytes, None);
            }
        }
        bytes
    }
}

/// As `Vec::resize`, which goes byte by byte where nothing is optimised.
fn resize(file: &mut Vec<u8>, size: usize) {
    match size.checked_sub(file.len()) {
        Some(more) => file.extend_from_slice(&vec![0; more]),
        None => file.truncate(size),
    }
}

/// Does to a file what a step did, to those sectors that are `kept`, or to all.
fn apply(effect: &Effect, file: &mut Vec<u8>, mut kept: Option<&mut dyn FnMut() -> bool>) {
    let (offset, len, grows, source) = match effect {
        Effect::Write { offset, bytes } => (*offset, bytes.len() as u64, true, Some(bytes)),
        Effect::Zero { offset, len, grows } => (*offset, *len, *grows, None),
        Effect::Resize(size) => {
            if kept.is_none_or(|kept| kept()) {
                resize(file, *size as usize);
            }
            return;
        }
        Effect::Sync | Effect::None => return,
    };
    let (mut at, end) = (offset, offset + len);
    let grow = |file: &mut Vec<u8>, to: u64| {
        if grows && file.len() < to as usize {
            resize(file, to as usize);
        }
    };
    if len == 0 && kept.as_mut().is_none_or(|kept| kept()) {
        grow(file, end);
    }
    while at < end {
        let next = match &mut kept {
            None => end,
            Some(kept) => {
                let next = (at / SECTOR * SECTOR + SECTOR).min(end);
                if !kept() {
                    at = next;
                    continue;
                }
                next
            }
        };
        grow(file, next);
        let until = next.min(file.len() as u64);
        if at < until {
            let to = &mut file[at as usize..until as usize];
            match source {
                Some(bytes) => {
                    to.copy_from_slice(&bytes[(at - offset) as usize..(until - offset) as usize]);
                }
                None => to.fill(0),
            }
        }
        at = next;
    }
}
