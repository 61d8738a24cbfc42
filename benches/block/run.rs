//! One measurement: an image in a known state, somebody who makes the transfers, a time.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use formats::{Engine, Format, Image};
use launcher::devices::GuestMemory;
use launcher::devices::virtio::blk::{Blk, BlkOptions};
use rustix::fs::{Advice, fadvise};

use crate::driver::{self, Driver};
use crate::qemu::{Aio, Qemu};
use crate::rows::{Holds, Row};
use crate::{MIB, Options, Result, direct};

/// Who makes the transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The device, with the format.
    Device,
    /// The device, with a raw image.
    Raw,
    /// The format's [`formats::Disk`], without a device.
    Direct,
    Qemu(Aio),
}

impl Side {
    /// Those with a device, and those without one.
    pub(crate) fn halves(row: &Row) -> [Vec<Side>; 2] {
        // Linux AIO is for O_DIRECT only.
        let other = match row.direct {
            true => Aio::Native,
            false => Aio::Threads,
        };
        let device = match row.flush {
            None => vec![Side::Device, Side::Raw],
            // The driver never flushes.
            Some(_) => Vec::new(),
        };
        let disk = vec![Side::Direct, Side::Qemu(Aio::IoUring), Side::Qemu(other)];
        [device, disk]
    }

    fn file_name(self, extension: &str) -> String {
        match self {
            Side::Device => format!("device.{extension}"),
            Side::Raw => "raw.img".into(),
            Side::Direct => format!("direct.{extension}"),
            Side::Qemu(aio) => format!("qemu-{}.{extension}", aio.name()),
        }
    }
}

/// A format under both its names.
pub(crate) struct Named {
    pub(crate) ours: &'static Format,
    /// QEMU's name for it.
    pub(crate) qemu: &'static str,
}

/// One row being measured.
pub(crate) struct Bench<'a> {
    pub(crate) options: &'a Options,
    pub(crate) qemu: &'a Qemu,
    pub(crate) format: &'a Named,
    pub(crate) raw: &'a Named,
    pub(crate) memory: &'a Arc<GuestMemory>,
    pub(crate) row: &'a Row,
    pub(crate) directory: &'a Path,
}

impl Bench<'_> {
    fn format(&self, side: Side) -> &Named {
        match side {
            Side::Raw => self.raw,
            _ => self.format,
        }
    }

    /// An image full of data, for all rows that use the same size.
    fn filled(&self, format: &str) -> PathBuf {
        let size = self.qemu.image_size(self.row);
        self.directory.join(format!("filled-{size}.{format}"))
    }

    fn base(&self) -> PathBuf {
        self.filled(self.raw.qemu)
    }

    fn image(&self, side: Side) -> PathBuf {
        let format = self.format(side).qemu;
        match self.row.holds {
            Holds::Data => self.filled(format),
            _ => self.directory.join(side.file_name(format)),
        }
    }

    fn create(&self, format: &str, path: &Path, backing: Option<&Path>) -> Result<()> {
        let is_raw = format == self.raw.qemu;
        let options = self.options.create.as_deref().filter(|_| !is_raw);
        let backing = backing.filter(|_| !is_raw);
        let size = self.qemu.image_size(self.row);
        self.qemu.create(format, path, size, options, backing)
    }

    /// Makes what the row wants to be full of data, unless an earlier one has.
    pub(crate) fn prepare(&self) -> Result<()> {
        let formats = match self.row.holds {
            Holds::Nothing => [].as_slice(),
            Holds::Backing => &[self.raw.qemu],
            Holds::Data => &[self.raw.qemu, self.format.qemu],
        };
        for format in formats {
            let path = self.filled(format);
            if !path.exists() {
                self.create(format, &path, None)?;
                self.qemu.fill(format, &path, self.row.area)?;
                File::open(path)?.sync_all()?;
            }
        }
        Ok(())
    }

    /// Removes all images: after an error nobody knows what they hold.
    pub(crate) fn clear(&self) -> Result<()> {
        for entry in std::fs::read_dir(self.directory)? {
            std::fs::remove_file(entry?.path())?;
        }
        Ok(())
    }

    /// Puts what a side wrote on the disk.
    pub(crate) fn sync(&self, side: Side) -> Result<()> {
        Ok(File::open(self.image(side))?.sync_all()?)
    }

    /// Removes an image that only one run uses. What waits to be written of it never is.
    pub(crate) fn remove(&self, side: Side) -> Result<()> {
        match self.row.holds {
            Holds::Data => Ok(()),
            _ => Ok(std::fs::remove_file(self.image(side))?),
        }
    }

    /// Nothing waits to be written, and the page cache holds all that is to be read, or nothing.
    fn settle(&self, path: &Path, read: bool) -> Result<()> {
        let mut file = File::open(path)?;
        file.sync_all()?;
        if self.row.direct {
            fadvise(&file, 0, None, Advice::DontNeed)?;
        } else if read {
            let mut buffer = vec![0; MIB];
            while file.read(&mut buffer)? > 0 {}
        }
        Ok(())
    }

    /// One measurement, on a fresh image if the row wants that; what it wrote is checked.
    pub(crate) fn run(&self, side: Side, count: u64) -> Result<Duration> {
        let (path, format) = (self.image(side), self.format(side));
        match self.row.holds {
            Holds::Data => {}
            Holds::Nothing => self.create(format.qemu, &path, None)?,
            Holds::Backing => {
                let base = self.base();
                self.create(format.qemu, &path, Some(&base))?;
                self.settle(&base, true)?;
            }
        }
        // What has just been made is in the page cache; reading the holes would fill it.
        self.settle(&path, self.row.holds == Holds::Data)?;
        let time = match side {
            Side::Device | Side::Raw => self.with_driver(side, |driver| {
                let start = Instant::now();
                driver.run(self.row.offsets(count))?;
                Ok(start.elapsed())
            })?,
            Side::Direct => {
                let image = self.opened(format.ours, &path);
                direct::run(format.ours, &image, self.row, count)?
            }
            Side::Qemu(aio) => self.qemu.bench(format.qemu, &path, self.row, aio, count)?,
        };
        if self.row.write && format.qemu != self.raw.qemu {
            self.qemu.check(format.qemu, &path)?;
        }
        if self.row.holds == Holds::Data {
            self.sync(side)?;
        }
        Ok(time)
    }

    /// Fails unless two sides have left the same on images that began the same.
    pub(crate) fn check_same(&self, one: Side, other: Side) -> Result<()> {
        let alike = match self.row.holds {
            Holds::Data => false,
            Holds::Nothing => true,
            // Raw has no backing file.
            Holds::Backing => one != Side::Raw && other != Side::Raw,
        };
        if !alike {
            return Ok(());
        }
        let format = |side| self.format(side).qemu;
        let (one_path, other_path) = (self.image(one), self.image(other));
        self.qemu
            .compare((format(one), &one_path), (format(other), &other_path))
    }

    fn opened(&self, format: &Format, path: &Path) -> Image {
        let backed = self.row.holds == Holds::Backing && format.name != self.raw.ours.name;
        Image {
            o_direct: self.row.direct,
            backing: backed.then(|| self.base()).into_iter().collect(),
            ..Image::new(path)
        }
    }

    /// What `work` returns that is given a driver of a side's image.
    pub(crate) fn with_driver<T>(
        &self,
        side: Side,
        work: impl FnOnce(&mut Driver<'_>) -> Result<T>,
    ) -> Result<T> {
        driver::fill(self.memory)?;
        let format = self.format(side).ours;
        let mut blk = Blk::open(BlkOptions {
            ephemeral: false,
            image: self.opened(format, &self.image(side)),
            format,
            id: None,
            queues: 1,
            engine: Engine::Auto,
            poll: None,
            cpus: Vec::new(),
        })?;
        let shape = self.row.workload();
        let mut driver = Driver::new(&mut blk, self.memory, &shape)?;
        let result = work(&mut driver);
        drop(driver);
        blk.close()?;
        result
    }
}

/// Finds the formats to measure.
pub(crate) fn named(name: &str) -> Result<Named> {
    // A raw image that is to be allocated by writes must be a thin one.
    let (ours, qemu) = match name {
        "raw" => (formats::raw_for(true), "raw"),
        _ if name.starts_with("qcow2") => (name, "qcow2"),
        _ => return Err(format!("no format of QEMU is known for `{name}`").into()),
    };
    let ours = formats::find(ours).ok_or_else(|| format!("no format `{ours}` in this build"))?;
    Ok(Named { ours, qemu })
}
