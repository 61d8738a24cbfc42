//! What an image holds before it is used, and what lies below it.

use super::super::content::{Content, SECTOR, Value};
use super::super::point::{Backing, Fit};
use super::{Scene, stamp};

impl Scene {
    /// Makes what lies below the image; what it holds.
    pub(super) fn backing(&mut self, backing: Backing) -> Result<Content, String> {
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
    pub(super) fn sprinkled(&mut self, size: u64, percent: u64) -> Content {
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
}
