//! The files of one point of the matrix, made by QEMU, and what they hold.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::content::{Content, SECTOR, Value};
use super::point::{Backing, DataFile, Fit, Point};
use super::qemu;
use super::traffic::Load;
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
                path: directory.join(TOP),
                ro: false,
                sparse: point.sparse,
                o_direct: point.o_direct,
                block_size: point.block_size,
                lock: true,
                size: None,
                backing: Vec::new(),
                format_written: true,
                options: Vec::new(),
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

    /// Makes what lies below the image; what it holds.
    fn backing(&mut self, backing: Backing) -> Result<Content, String> {
        let name;
        let content = match backing {
            Backing::None => return Ok(Content::default()),
            Backing::Raw(fit) => {
                name = "base.raw";
                self.raw(name, fit)?
            }
            Backing::Qcow2(fit) => {
                name = "base.qcow2";
                let content = self.sprinkled(self.fitting(fit), 50);
                self.convert(name, &content, None)?;
                content
            }
            Backing::Chain(fit) => {
                let name_below = self.random.of(&["base.raw", "base.qcow2"]);
                let below = match name_below {
                    "base.raw" => self.raw(name_below, Fit::Shorter)?,
                    _ => {
                        let content = self.sprinkled(self.fitting(Fit::Longer), 50);
                        self.convert(name_below, &content, None)?;
                        content
                    }
                };
                self.quiet(name_below)?;
                self.image.backing.push(self.directory.join(name_below));
                name = "mid.qcow2";
                let content = self.sprinkled(self.fitting(fit), 30);
                self.convert(name, &content, Some(name_below))?;
                content.over(&below)
            }
        };
        self.quiet(name)?;
        self.image.backing.insert(0, self.directory.join(name));
        Ok(content)
    }

    fn quiet(&mut self, name: &str) -> Result<(), String> {
        let path = self.directory.join(name);
        let (modified, len) = stamp(&path)?;
        self.quiet.push((path, modified, len));
        Ok(())
    }

    /// Bytes.
    fn fitting(&self, fit: Fit) -> u64 {
        let point = &self.point;
        let cluster = point.cluster_size;
        let size = match point.huge {
            true => 24 << 20,
            false => point.size,
        };
        let half = (size / 2).next_multiple_of(cluster).min(size);
        match fit {
            Fit::Equal => size,
            Fit::Shorter => half,
            Fit::Longer => size + 3 * cluster + SECTOR,
            Fit::Unaligned => half - cluster / 2 / SECTOR * SECTOR,
            Fit::Odd => half - 200,
        }
    }

    /// A raw base.
    fn raw(&mut self, name: &str, fit: Fit) -> Result<Content, String> {
        let size = self.fitting(fit);
        let mut content = self.sprinkled(size.next_multiple_of(SECTOR), 60);
        // Above all the end is to hold something.
        let last = content.size / SECTOR;
        self.versions += 1;
        content.set(last.saturating_sub(3)..last, Value::version(self.versions));
        content.resize(size);
        let path = self.directory.join(name);
        content
            .write_raw(&path)
            .map_err(|error| error.to_string())?;
        Ok(content)
    }

    /// Content in runs of whole clusters, so that these are what is allocated.
    fn sprinkled(&mut self, size: u64, percent: u64) -> Content {
        let mut content = Content::empty(size);
        // qemu-img looks for zeroes in no smaller unit.
        let cluster = self.point.cluster_size.max(4096);
        let clusters = match self.point.huge {
            true => size.min(24 << 20).div_ceil(cluster),
            false => size.div_ceil(cluster),
        };
        let longest = (clusters / 4).clamp(1, 64);
        let mut at = 0;
        while at < clusters {
            let run = 1 + self.random.below(longest);
            let end = (at + run).min(clusters);
            if self.random.chance(percent) {
                self.versions += 1;
                let bytes = at * cluster..(end * cluster).min(size);
                let sectors = bytes.start / SECTOR..bytes.end.div_ceil(SECTOR);
                content.set(sectors, Value::version(self.versions));
            }
            at = end;
        }
        content
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

    /// What a run of this point does.
    pub(super) fn load(&mut self) -> Load {
        let point = &self.point;
        let random = &mut self.random;
        let cluster = point.cluster_size;
        let size = self.content.size;
        let (areas, largest) = match point.huge {
            true => {
                let len = (2 * cluster).max(2 << 20);
                let at = |offset: u64| offset / cluster * cluster;
                let middle = at(4 << 30) + cluster * random.below(64);
                let far = at(17 << 40) + cluster * random.below(1 << 14);
                let last = at(size.max(len) - len);
                let windows = [0, middle, far, last].map(|start| start..start + len);
                (windows.into(), size + 4 * cluster)
            }
            false => {
                let largest = (2 * size).min(64 << 20).max(size);
                let mut areas = Vec::new();
                // Sometimes a few clusters only, which are freed and used again all the time.
                if !random.chance(25) {
                    areas.push(0..largest);
                }
                for _ in 0..3 {
                    // Narrow, so that operations meet in a cluster.
                    let width = (random.of(&[1, 2, 6]) * cluster).max(8 << 10);
                    let start = random.below(size) / cluster * cluster;
                    areas.push(start..(start + width).min(largest));
                }
                (areas, largest)
            }
        };
        Load {
            operations: random.of(&[60, 120, 200]),
            in_flight: point.in_flight,
            overlap: point.overlap,
            block: point.block_size.into(),
            cluster,
            most: (2 * cluster).max(1 << 20),
            areas,
            writes: random.of(&[40, 70, 95]),
            flushes: random.of(&[5, 30, 100, 200]),
            reopens: 10,
            resizes: if point.resizes() { 15 } else { 0 },
            shrinks: point.shrinks,
            largest,
        }
    }

    /// Compares everything with what it is to hold, as QEMU sees it.
    pub fn verify(&mut self) -> Result<(), String> {
        let (found, said) = qemu::check(&self.directory, TOP)?;
        if found != qemu::Found::Nothing {
            return Err(format!("qemu-img check: {said}"));
        }
        let full = |line: &&str| line.contains("% allocated");
        if let Some(line) = said.lines().find(full)
            && !self.point.sparse
            && !line.contains("100.00% allocated")
        {
            return Err(format!("`sparse` is false, but: {line}"));
        }
        self.compare()?;
        for (name, content) in &self.snapshots {
            qemu::img(
                &self.directory,
                &format!("convert -f qcow2 -l snapshot.name={name} -O raw {TOP} snapshot"),
            )?;
            let path = self.directory.join("snapshot");
            let (_, len) = stamp(&path)?;
            let window = 0..content.size.min(len);
            content
                .compare_raw(&path, window)
                .map_err(|error| format!("snapshot {name}: {error}"))?;
        }
        if self.point.data_file == DataFile::Raw && !self.point.huge {
            let path = self.directory.join(DATA);
            self.content.compare_raw(&path, 0..self.content.size)?;
        }
        self.below_is_untouched()
    }

    /// Whether nobody wrote to what lies below the image.
    pub(super) fn below_is_untouched(&self) -> Result<(), String> {
        for (path, modified, len) in &self.quiet {
            if stamp(path)? != (*modified, *len) {
                return Err(format!("{} was written to", path.display()));
            }
        }
        Ok(())
    }

    fn compare(&self) -> Result<(), String> {
        if self.point.huge {
            return self.compare_windows();
        }
        let model = self.directory.join("model");
        let written = self.content.write_raw(&model);
        written.map_err(|error| format!("{}: {error}", model.display()))?;
        let compare = format!("compare -f qcow2 -F raw {TOP} model");
        let said = qemu::img(&self.directory, &compare)?;
        match said.contains("mismatch") {
            true => Err(format!("qemu-img compare: {said}")),
            false => Ok(()),
        }
    }

    /// Compares the places where something may have been written.
    fn compare_windows(&self) -> Result<(), String> {
        const BLOCK: u64 = 64 << 10;
        let size = self.content.size;
        let mut end = 0;
        for sector in self.content.sectors.keys() {
            let start = sector * SECTOR / BLOCK * BLOCK;
            if start < end {
                continue;
            }
            end = (start + (8 << 20)).min(size);
            let (skip, count) = (start / BLOCK, end.div_ceil(BLOCK));
            let dd = format!("dd -f qcow2 -O raw bs={BLOCK} skip={skip} count={count}");
            qemu::img(&self.directory, &format!("{dd} if={TOP} of=window"))?;
            self.content
                .compare_raw(&self.directory.join("window"), start..end)?;
        }
        Ok(())
    }

    /// The first bytes of the image without what an engine may change in them: its size and the
    /// places of its tables.
    pub(super) fn header(&self) -> Result<Vec<u8>, String> {
        let failed = |error: std::io::Error| error.to_string();
        let mut bytes = Vec::new();
        let file = fs::File::open(&self.image.path).map_err(failed)?;
        let most = self.point.cluster_size.min(4096);
        file.take(most).read_to_end(&mut bytes).map_err(failed)?;
        // size, l1_size and l1_table_offset, refcount_table_offset and refcount_table_clusters
        for range in [24..32, 36..60] {
            bytes
                .get_mut(range)
                .ok_or("the image is shorter than a header")?
                .fill(0);
        }
        Ok(bytes)
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
