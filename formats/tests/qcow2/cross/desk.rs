//! An image that QEMU and we use in turn, and what it is to hold.

use std::fs;
use std::ops::Range;
use std::path::PathBuf;

use formats::conformance::{Random, qemu};
use formats::{Buffer, Engine, Image, OptionValue, Ring, Segments};
use tempfile::TempDir;

use super::super::directory;
use super::super::harness::image;

/// Bytes, an odd number, no multiple of most cluster sizes.
pub(crate) const SIZE: u64 = (3 << 20) + 1536;

/// A folder with an image, `top.qcow2`, and what it holds.
pub(crate) struct Desk {
    pub(crate) folder: TempDir,
    pub(crate) ring: Ring,
    pub(crate) backing: Vec<&'static str>,
    pub(crate) options: Vec<(&'static str, OptionValue)>,
    pub(crate) content: Vec<u8>,
    pub(crate) random: Random,
    /// Whether only sectors that qemu-img counted as lost are too many.
    pub(crate) leaks: bool,
}

impl Desk {
    pub(crate) fn new(seed: u64) -> Desk {
        Desk {
            folder: directory(),
            ring: Ring::new(Engine::Auto).unwrap(),
            backing: Vec::new(),
            options: Vec::new(),
            content: vec![0; SIZE as usize],
            random: Random::new(seed),
            leaks: false,
        }
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    #[track_caller]
    pub(crate) fn qemu_img(&self, line: &str) -> String {
        qemu::img(self.folder.path(), line).unwrap_or_else(|error| panic!("{error}"))
    }

    #[track_caller]
    pub(crate) fn qemu_io(&self, name: &str, commands: &[String]) {
        qemu::io(self.folder.path(), name, commands).unwrap_or_else(|error| panic!("{error}"));
    }

    /// A raw base in which no sector is like another, and makes it what the disk holds.
    pub(crate) fn base(&mut self, name: &'static str, len: u64) {
        let bytes: Vec<u8> = (0..len).map(|at| (at / 512 * 7 + at % 251) as u8).collect();
        fs::write(self.at(name), &bytes).unwrap();
        let both = bytes.len().min(self.content.len());
        self.content.fill(0);
        self.content[..both].copy_from_slice(&bytes[..both]);
        self.backing.insert(0, name);
    }

    pub(crate) fn range(&mut self, unit: u64, most: u64) -> Range<u64> {
        let units = self.content.len() as u64 / unit;
        let start = self.random.below(units);
        let len = 1 + self.random.below((most / unit).max(1));
        start * unit..(start + len).min(units) * unit
    }

    /// QEMU writes, in all ways that it has.
    #[track_caller]
    pub(crate) fn used_by_qemu(&mut self, clusters_are: u64) {
        let mut commands = Vec::new();
        for way in [
            "write -P",
            "write -P",
            "write -z",
            "write -z -u",
            "discard",
            "write -P",
        ] {
            let unit = match way {
                "discard" => clusters_are,
                _ => 512,
            };
            let range = self.range(unit, 200 << 10);
            if range.is_empty() {
                continue;
            }
            let (byte, place) = match way {
                "write -P" => (1 + self.random.below(255) as u8, &mut self.content),
                _ => (0, &mut self.content),
            };
            place[range.start as usize..range.end as usize].fill(byte);
            let (start, len) = (range.start, range.end - range.start);
            commands.push(match way {
                "write -P" => format!("{way} {byte} {start} {len}"),
                _ => format!("{way} {start} {len}"),
            });
        }
        self.qemu_io("top.qcow2", &commands);
    }

    pub(crate) fn opened(&self, name: &str, backing: &[&str]) -> Image {
        Image {
            backing: backing.iter().map(|name| self.at(name)).collect(),
            options: self.options.clone(),
            ..image(&self.at(name))
        }
    }

    /// We write, in all ways that we have.
    #[track_caller]
    pub(crate) fn used_by_us(&mut self) {
        let image = self.opened("top.qcow2", &self.backing);
        let format = formats::find("qcow2").unwrap();
        let ring = self.ring.clone();
        ring.block_on(
            async {
                let disk = (format.open)(&ring, &image).await.unwrap();
                assert_eq!(disk.size(), self.content.len() as u64);
                for way in [0, 0, 1, 2, 3, 0] {
                    let range = self.range(512, 200 << 10);
                    if range.is_empty() {
                        continue;
                    }
                    let (start, len) = (range.start, range.end - range.start);
                    let byte = 1 + self.random.below(255) as u8;
                    let bytes = &mut self.content[start as usize..range.end as usize];
                    match way {
                        0 => {
                            let memory = Buffer::zeroed(len as usize, 512).unwrap();
                            let memory = Segments::from_buffer(memory);
                            memory.fill(byte);
                            bytes.fill(byte);
                            disk.write(start, memory).await.unwrap();
                        }
                        1 | 2 => {
                            bytes.fill(0);
                            disk.write_zeroes(start, len, way == 1).await.unwrap();
                        }
                        _ => {
                            disk.discard(start, len).await.unwrap();
                            let memory = Buffer::zeroed(len as usize, 512).unwrap();
                            let memory = Segments::from_buffer(memory);
                            disk.read(start, memory.clone()).await.unwrap();
                            let mut found = vec![0; len as usize];
                            memory.copy_to(&mut found);
                            for (found, bytes) in found.chunks(512).zip(bytes.chunks_mut(512)) {
                                let zero = found.iter().all(|byte| *byte == 0);
                                assert!(zero || found == bytes, "discarded: other bytes");
                                bytes.copy_from_slice(found);
                            }
                        }
                    }
                }
                let memory = Buffer::zeroed(self.content.len(), 4096).unwrap();
                let memory = Segments::from_buffer(memory);
                disk.read(0, memory.clone()).await.unwrap();
                let mut found = vec![0; memory.len()];
                memory.copy_to(&mut found);
                self.same(&found, "before it is closed");
                disk.close().await.unwrap();
            },
            || {},
        );
    }

    /// We write once, and read all that there is.
    #[track_caller]
    pub(crate) fn written_by_us(&self, offset: u64, byte: u8, len: usize) {
        let image = self.opened("top.qcow2", &self.backing);
        let format = formats::find("qcow2").unwrap();
        let memory = |byte, len| {
            let segments = Segments::from_buffer(Buffer::zeroed(len, 4096).unwrap());
            segments.fill(byte);
            segments
        };
        self.ring.block_on(
            async {
                let disk = (format.open)(&self.ring, &image).await.unwrap();
                disk.write(offset, memory(byte, len)).await.unwrap();
                let all = memory(0xee, self.content.len());
                disk.read(0, all.clone()).await.unwrap();
                let mut found = vec![0; all.len()];
                all.copy_to(&mut found);
                self.same(&found, "just written");
                disk.close().await.unwrap();
            },
            || {},
        );
    }

    /// We change the size.
    #[track_caller]
    pub(crate) fn resized_by_us(&mut self, size: u64) {
        let image = self.opened("top.qcow2", &self.backing);
        let format = formats::find("qcow2").unwrap();
        self.ring.block_on(
            async {
                let disk = (format.open)(&self.ring, &image).await.unwrap();
                disk.resize(size).await.unwrap();
                disk.close().await.unwrap();
            },
            || {},
        );
        self.content.resize(size as usize, 0);
    }

    /// What an image holds, as we see it.
    #[track_caller]
    pub(crate) fn ours(&self, name: &str, backing: &[&str]) -> Vec<u8> {
        let image = Image {
            ro: true,
            ..self.opened(name, backing)
        };
        let format = formats::find("qcow2").unwrap();
        self.ring.block_on(
            async {
                let disk = (format.open)(&self.ring, &image)
                    .await
                    .unwrap_or_else(|error| panic!("{name}: {error}"));
                let mut bytes = vec![0; disk.size() as usize];
                let memory = Segments::from_buffer(Buffer::zeroed(bytes.len(), 4096).unwrap());
                disk.read(0, memory.clone()).await.unwrap();
                memory.copy_to(&mut bytes);
                disk.close().await.unwrap();
                bytes
            },
            || {},
        )
    }

    /// Both of us see what it is to hold, and nothing is wrong with it.
    #[track_caller]
    pub(crate) fn agreed(&self, when: &str) {
        let (found, said) = qemu::check(self.folder.path(), "top.qcow2")
            .unwrap_or_else(|error| panic!("{when}: {error}"));
        assert!(
            self.leaks || found == qemu::Found::NOTHING,
            "{when}: {said}"
        );
        self.qemu_img("convert -f qcow2 -O raw top.qcow2 out");
        let theirs = fs::read(self.at("out")).unwrap();
        self.same(&theirs, &format!("{when}: to QEMU"));
        self.same(
            &self.ours("top.qcow2", &self.backing),
            &format!("{when}: to us"),
        );
    }

    #[track_caller]
    pub(crate) fn same(&self, found: &[u8], when: &str) {
        assert_eq!(found.len(), self.content.len(), "{when}");
        if found != self.content {
            let differs = |at: &usize| found[*at] != self.content[*at];
            let at = (0..found.len()).find(differs).unwrap();
            let (found, wanted) = (found[at], self.content[at]);
            panic!("{when}: byte {at} is {found:#x}, expected {wanted:#x}");
        }
    }

    /// We create the image.
    #[track_caller]
    pub(crate) fn create_by_us(&mut self, options: &[(&'static str, OptionValue)]) {
        self.options.extend_from_slice(options);
        let image = Image {
            size: Some(SIZE),
            ..self.opened("top.qcow2", &self.backing)
        };
        let format = formats::find("qcow2").unwrap();
        self.ring.block_on(
            async {
                let disk = (format.open)(&self.ring, &image)
                    .await
                    .unwrap_or_else(|error| panic!("{options:?}: {error}"));
                disk.close().await.unwrap();
            },
            || {},
        );
    }
}
