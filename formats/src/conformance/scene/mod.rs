//! The files of one point of the matrix, made by QEMU, and what they hold.

mod below;
mod load;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::content::{Content, SECTOR, Value};
use super::point::{DataFile, Point};
use super::qemu;
use crate::random::Random;
use crate::{Image, OptionValue};

/// The name of the image.
pub(super) const TOP: &str = "top.qcow2";
/// The name of its data file.
const DATA: &str = "top.data";

/// The files of a point.
pub struct Scene {
    /// Where they lie.
    pub directory: PathBuf,
    /// The image, as it is opened.
    pub image: Image,
    /// What it holds.
    pub content: Content,
    /// The number of the last value that was new.
    pub versions: u32,
    /// The names of the snapshots, and what the image held.
    pub snapshots: Vec<(String, Content)>,
    /// Files that nobody may write to: when and how large they were.
    quiet: Vec<(PathBuf, SystemTime, u64)>,
    point: Point,
    random: Random,
}

impl Scene {
    /// Makes the files, but for an image that our engine is to create.
    pub fn build(point: &Point, directory: &Path) -> Result<Scene, String> {
        let mut scene = Scene {
            directory: directory.into(),
            image: Image {
                sparse: point.sparse,
                o_direct: point.o_direct,
                block_size: point.block_size,
                ..Image::new(directory.join(TOP))
            },
            content: Content::empty(point.size),
            versions: 0,
            snapshots: Vec::new(),
            quiet: Vec::new(),
            point: point.clone(),
            random: Random::new(point.seed ^ 0x5ce7e),
        };
        let below = scene.backing(point.backing)?;
        scene.options();
        match point.ours {
            true => scene.content = Content::empty(point.size).over(&below),
            false => scene.top(below)?,
        }
        Ok(scene)
    }

    fn options(&mut self) {
        let (point, image) = (&self.point, &mut self.image);
        let options = &mut image.options;
        if point.cache_clusters > 0 {
            let bytes = point.cache_clusters * point.cluster_size;
            options.push(("cache_size", OptionValue::Number(bytes)));
        }
        if point.data_file != DataFile::None {
            let path = self.directory.join(DATA);
            options.push(("data_file", OptionValue::Path(path)));
        }
        if !point.ours {
            return;
        }
        image.size = Some(point.size);
        let word = |word: &str| OptionValue::Word(word.into());
        options.push(("cluster_size", OptionValue::Number(point.cluster_size)));
        options.push(("version", OptionValue::Number(point.version.into())));
        if point.version == 3 {
            let bits = point.refcount_bits.into();
            options.push(("refcount_bits", OptionValue::Number(bits)));
            options.push(("compression_type", word(point.compression)));
            options.push(("extended_l2", OptionValue::Bool(point.extended_l2)));
            options.push(("lazy_refcounts", OptionValue::Bool(point.lazy_refcounts)));
        }
        options.push(("preallocation", word(point.preallocation)));
        if point.data_file == DataFile::Raw {
            options.push(("data_file_raw", OptionValue::Bool(true)));
        }
    }

    /// Makes an image of the format that holds `content` and is transparent elsewhere.
    fn convert(&self, name: &str, content: &Content, below: Option<&str>) -> Result<(), String> {
        let top = name == TOP;
        let (point, directory) = (&self.point, &self.directory);
        let mut options = vec![
            format!("compat={}", if point.version == 2 { "0.10" } else { "1.1" }),
            format!("cluster_size={}", point.cluster_size),
        ];
        if point.version == 3 {
            options.push(format!("compression_type={}", point.compression));
            options.push(format!("extended_l2={}", on(point.extended_l2)));
        }
        if top && point.version == 3 {
            options.push(format!("refcount_bits={}", point.refcount_bits));
            options.push(format!("lazy_refcounts={}", on(point.lazy_refcounts)));
        }
        if top && point.preallocation != "off" {
            options.push(format!("preallocation={}", point.preallocation));
        }
        if top && point.data_file != DataFile::None {
            options.push(format!("data_file={DATA}"));
        }
        if top && point.data_file == DataFile::Raw {
            options.push("data_file_raw=on".into());
        }
        let options = options.join(",");
        if content.size > 1 << 40 {
            // No file system has room for a raw image of it.
            let size = content.size;
            qemu::img(
                directory,
                &format!("create -q -f qcow2 -o {options} {name} {size}"),
            )?;
        } else {
            let source = directory.join("source");
            let failed = |error: std::io::Error| error.to_string();
            content.write_raw(&source).map_err(failed)?;
            let compress = if point.compressed { "-c" } else { "" };
            qemu::img(
                directory,
                &format!("convert -f raw -O qcow2 {compress} -o {options} source {name}"),
            )?;
            fs::remove_file(source).map_err(failed)?;
        }
        if let Some(below) = below {
            let format = below.rsplit('.').next().unwrap_or("raw");
            // What was not written so far shows what lies below from now on.
            qemu::img(
                directory,
                &format!("rebase -u -f qcow2 -F {format} -b {below} {name}"),
            )?;
        }
        Ok(())
    }

    /// Makes the image itself, and lets qemu-io use it.
    fn top(&mut self, below: Content) -> Result<(), String> {
        let size = self.point.size;
        let content = match self.point.huge {
            true => Content::empty(size),
            false => {
                let percent = self.random.of(&[0, 20, 40, 80]);
                self.sprinkled(size, percent)
            }
        };
        let name = self.image.backing.first().and_then(|path| path.file_name());
        let name = name.map(|name| name.to_string_lossy().into_owned());
        self.convert(TOP, &content, name.as_deref())?;
        self.content = content.over(&below);
        self.used_by_qemu(8)?;
        if self.point.snapshots > 0 {
            self.snapshot()?;
        }
        Ok(())
    }

    /// QEMU uses the image while it is closed.
    pub(super) fn used_by_qemu(&mut self, count: u32) -> Result<(), String> {
        let cluster = self.point.cluster_size;
        let mut commands = Vec::new();
        for _ in 0..self.random.below(u64::from(count) + 1) {
            let clusters = self.content.size.min(24 << 20).div_ceil(cluster);
            let start = self.random.below(clusters) * cluster;
            let whole = self.random.chance(40);
            let (start, len) = match whole {
                true => (start, cluster * (1 + self.random.below(3))),
                false => {
                    let start = start + self.random.below(cluster / SECTOR) * SECTOR;
                    (
                        start,
                        SECTOR * (1 + self.random.below(2 * cluster / SECTOR)),
                    )
                }
            };
            let end = (start + len).min(self.content.size / SECTOR * SECTOR);
            if start >= end {
                continue;
            }
            let (len, sectors) = (end - start, start / SECTOR..end / SECTOR);
            // Version 2 has no zero clusters: a discard may show what lies below again.
            let transparent = self.point.version == 2 && !self.image.backing.is_empty();
            let (command, value) = match self.random.below(4) {
                0 if whole && end == start + len && !transparent && len.is_multiple_of(cluster) => {
                    ("discard".to_owned(), Value::ZERO)
                }
                1 => ("write -z".to_owned(), Value::ZERO),
                2 => ("write -z -u".to_owned(), Value::ZERO),
                _ => {
                    let byte = 1 + self.random.below(255) as u8;
                    (format!("write -P {byte}"), Value::byte(byte))
                }
            };
            commands.push(format!("{command} {start} {len}"));
            self.content.set(sectors, value);
        }
        match commands.is_empty() {
            true => Ok(()),
            false => qemu::io(&self.directory, TOP, &commands).map(drop),
        }
    }

    /// Takes an internal snapshot.
    pub(super) fn snapshot(&mut self) -> Result<(), String> {
        let name = format!("s{}", self.snapshots.len() + 1);
        qemu::img(&self.directory, &format!("snapshot -c {name} {TOP}"))?;
        self.snapshots.push((name, self.content.clone()));
        Ok(())
    }
}

fn on(yes: bool) -> &'static str {
    if yes { "on" } else { "off" }
}

fn stamp(path: &Path) -> Result<(SystemTime, u64), String> {
    let meta = fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let modified = meta.modified().map_err(|error| error.to_string())?;
    Ok((modified, meta.len()))
}
