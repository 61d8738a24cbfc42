//! Images: made, brought to a known state, and judged by `qemu-img`.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Advice, fadvise};

use crate::case::{Case, Format};
use crate::{Result, content};

/// Images of one run, in a folder of its own.
pub struct Images {
    folder: PathBuf,
    /// Bytes of those that are full of data.
    area: u64,
    /// Bytes of those that are new for each measurement.
    fresh: u64,
    /// Which image is how in the page cache.
    cached: RefCell<Option<(PathBuf, Cache)>>,
}

/// What the page cache holds of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cache {
    /// Nothing.
    Empty,
    /// All of it, in pages.
    Small,
    /// All of it, in units as large as the kernel likes.
    Large,
}

impl Cache {
    fn of(case: &Case) -> Cache {
        match (case.direct, case.is_long()) {
            (true, _) => Cache::Empty,
            (false, false) => Cache::Small,
            (false, true) => Cache::Large,
        }
    }
}

impl Images {
    /// None is made yet.
    pub fn new(folder: &Path, area: u64, fresh: u64) -> Images {
        Images {
            folder: folder.to_owned(),
            area,
            fresh,
            cached: RefCell::default(),
        }
    }

    /// The bytes that a case uses.
    pub fn area(&self, case: &Case) -> u64 {
        match case.allocating {
            true => self.fresh,
            false => self.area,
        }
    }

    /// The image that a case is measured on: a new one, or one that is full of data, of which all
    /// is in the page cache, or nothing where that is passed by. Nothing waits to be written.
    ///
    /// The page cache is as requests of the case's length fill it, in pages for small ones. A file
    /// that was just written from end to end has units of up to 2 MiB there, and ext4 goes through
    /// the blocks of such a unit for each small write to it (Linux 6.18): ten times the work, the
    /// same for everybody, and not what a disk looks like that a guest has used for a while.
    pub fn prepare(&self, case: &Case) -> Result<PathBuf> {
        let path = match case.allocating {
            true => self.new_one()?,
            false => self.filled(case.format)?,
        };
        let file = File::open(&path)?;
        file.sync_all()?;
        let cached = (path.clone(), Cache::of(case));
        if case.allocating || self.cached.borrow().as_ref() != Some(&cached) {
            fadvise(&file, 0, None, Advice::DontNeed)?;
            match cached.1 {
                Cache::Empty => {}
                Cache::Small => {
                    // No read-ahead: what is read comes in pages.
                    fadvise(&file, 0, None, Advice::Random)?;
                    read_through(&file)?;
                }
                Cache::Large => read_through(&file)?,
            }
        }
        *self.cached.borrow_mut() = Some(cached);
        Ok(path)
    }

    fn new_one(&self) -> Result<PathBuf> {
        let path = self.folder.join("new.qcow2");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]);
        run(create.arg(&path).arg(self.fresh.to_string()))?;
        Ok(path)
    }

    fn filled(&self, format: Format) -> Result<PathBuf> {
        let raw = self.folder.join("filled.raw");
        if !raw.exists() {
            let mut piece = vec![0; 1 << 20];
            content::fill(&mut piece);
            let mut file = File::create(&raw)?;
            for offset in (0..self.area).step_by(piece.len()) {
                content::stamp(&mut piece, offset, 0);
                file.write_all(&piece)?;
            }
        }
        if format == Format::Raw {
            return Ok(raw);
        }
        let path = self.folder.join("filled.qcow2");
        if !path.exists() {
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
            run(convert.arg(&raw).arg(&path))?;
        }
        Ok(path)
    }

    /// Fails unless the image is whole; then what was written is put on the disk, and a new image
    /// is removed.
    pub fn judge(&self, case: &Case, path: &Path) -> Result<()> {
        if case.write && case.format == Format::Qcow2 {
            let mut check = Command::new("qemu-img");
            run(check.args(["check", "-q", "-f", "qcow2"]).arg(path))?;
        }
        if case.allocating {
            std::fs::remove_file(path)?;
        } else if case.write {
            File::open(path)?.sync_all()?;
        }
        Ok(())
    }
}

fn read_through(mut file: &File) -> io::Result<()> {
    let mut piece = vec![0; 1 << 20];
    while file.read(&mut piece)? > 0 {}
    Ok(())
}

/// What a command prints; an error is told as it tells it.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?} does not run: {error}"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(printed);
    }
    let said = printed + &String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}: {}", output.status, said.trim_end()).into())
}
