//! Internal snapshots of qcow2 images, made and used by QEMU and by us in turn: `qemu-img check`
//! finds nothing wrong, and the disk and each of its snapshots hold what they are to hold.
//!
//! A long run: `SNAPSHOT_SEEDS=100 cargo test -p formats --test snapshots`.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::PathBuf;

use formats::conformance::{Random, qemu};
use formats::qcow2::snapshots::{self, Which};
use formats::{Buffer, Engine, Image, Ring, Segments};
use tempfile::TempDir;

/// No multiple of most cluster sizes.
const SIZE: u64 = (3 << 20) + 1536;
/// Changes to an image, each followed by a look at all of it.
const CHANGES: u32 = 15;

/// A snapshot that there is to be.
struct Kept {
    name: String,
    content: Vec<u8>,
}

/// An image, `top.qcow2`, and what it holds.
struct Desk {
    folder: TempDir,
    random: Random,
    cluster: u64,
    /// Refcounts are so narrow that there cannot be many snapshots.
    narrow: bool,
    /// Version 2 has no size of its own for each snapshot.
    resizes: bool,
    backing: bool,
    content: Vec<u8>,
    kept: Vec<Kept>,
    /// The ids of `kept`.
    ids: Vec<u64>,
    named: u32,
}

fn folder() -> TempDir {
    let program = std::env::current_exe().unwrap();
    tempfile::tempdir_in(program.parent().unwrap()).unwrap()
}

impl Desk {
    fn new(options: &str, backing: bool, seed: u64) -> Desk {
        let size = options
            .split(',')
            .find_map(|it| it.strip_prefix("cluster_size="));
        let size = size.unwrap();
        let (number, unit) = size.split_at(size.trim_end_matches(char::is_alphabetic).len());
        let cluster = number.parse::<u64>().unwrap()
            << match unit {
                "k" => 10,
                "M" => 20,
                _ => 0,
            };
        let mut desk = Desk {
            folder: folder(),
            random: Random::new(seed),
            cluster,
            narrow: options.contains("refcount_bits=2"),
            resizes: !options.contains("compat=v2"),
            backing,
            content: vec![0; SIZE as usize],
            kept: Vec::new(),
            ids: Vec::new(),
            named: 0,
        };
        let base = if backing { "-b base.raw -F raw" } else { "" };
        if backing {
            let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 512 * 7) as u8 | 1).collect();
            fs::write(desk.at("base.raw"), &bytes).unwrap();
            desk.content = bytes;
        }
        desk.qemu_img(&format!(
            "create -q -f qcow2 -o {options} {base} top.qcow2 {SIZE}"
        ));
        desk
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    #[track_caller]
    fn qemu_img(&self, line: &str) -> String {
        qemu::img(self.folder.path(), line).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Writes to the disk, in one of many ways.
    fn write(&mut self) {
        let way = self.random.below(5);
        let unit = if way >= 3 { self.cluster } else { 512 };
        let units = self.content.len() as u64 / unit;
        if units == 0 {
            return;
        }
        let start = self.random.below(units);
        let most = (300 << 10) / unit + 1;
        let end = (start + 1 + self.random.below(most)).min(units);
        let (start, len) = (start * unit, (end - start) * unit);
        let byte = 1 + self.random.below(255) as u8;
        let command = match way {
            0 | 1 => format!("write -P {byte} {start} {len}"),
            2 => format!("write -z -u {start} {len}"),
            3 => format!("discard {start} {len}"),
            // QEMU writes but one compressed cluster at a time, and none over one of its own.
            _ => format!("write -c -P {byte} {start} {}", self.cluster),
        };
        let len = if way == 4 { self.cluster } else { len };
        if way == 3 && self.backing {
            return;
        }
        if way == 0 {
            self.write_ourselves(start, len, byte);
        } else if let Err(error) = qemu::io(self.folder.path(), "top.qcow2", &[command]) {
            assert!(way == 4, "{error}");
            return;
        }
        let byte = if matches!(way, 2 | 3) { 0 } else { byte };
        self.content[start as usize..(start + len) as usize].fill(byte);
    }

    fn write_ourselves(&self, offset: u64, len: u64, byte: u8) {
        let image = Image {
            backing: match self.backing {
                true => vec![self.at("base.raw")],
                false => Vec::new(),
            },
            ..Image::new(self.at("top.qcow2"))
        };
        let ring = Ring::new(Engine::Auto).unwrap();
        let format = formats::find("qcow2").unwrap();
        ring.block_on(
            async {
                let disk = (format.open)(&ring, &image).await.unwrap();
                let memory = Buffer::zeroed(len as usize, 512).unwrap();
                let memory = Segments::from_buffer(memory);
                memory.fill(byte);
                disk.write(offset, memory).await.unwrap();
                disk.close().await.unwrap();
            },
            || {},
        );
    }

    fn resize(&mut self) {
        if !self.resizes || self.backing {
            return;
        }
        let size = 512 * (1 + self.random.below(2 * SIZE / 512));
        self.qemu_img(&format!("resize -q --shrink top.qcow2 {size}"));
        self.content.resize(size as usize, 0);
    }

    fn create(&mut self) {
        let name = format!("s{}", self.named);
        self.named += 1;
        let before = fs::read(self.at("top.qcow2")).unwrap();
        let by_us = self.random.chance(60);
        let result = match by_us {
            true => snapshots::create(&self.at("top.qcow2"), &name, &mut |_, _| {})
                .map(drop)
                .map_err(|error| error.to_string()),
            false => {
                qemu::img(self.folder.path(), &format!("snapshot -c {name} top.qcow2")).map(drop)
            }
        };
        match result {
            Ok(()) => {
                let content = self.content.clone();
                self.kept.push(Kept { name, content });
                self.ids.push(self.ids.iter().max().unwrap_or(&0) + 1);
            }
            Err(error) if self.narrow => {
                if by_us {
                    assert!(error.contains("refcounts of 2 bits"), "{error}");
                    assert!(fs::read(self.at("top.qcow2")).unwrap() == before);
                } else {
                    // QEMU gives up halfway, and leaves a repair to others.
                    fs::write(self.at("top.qcow2"), before).unwrap();
                }
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn apply(&mut self) {
        if self.kept.is_empty() {
            return;
        }
        let index = self.random.below(self.kept.len() as u64) as usize;
        let (name, id) = (self.kept[index].name.clone(), self.ids[index].to_string());
        let image = self.at("top.qcow2");
        match self.random.below(3) {
            0 => {
                snapshots::apply(&image, Which::Name(&name), &mut |_, _| {}).unwrap();
            }
            1 => {
                snapshots::apply(&image, Which::Id(&id), &mut |_, _| {}).unwrap();
            }
            _ => {
                // QEMU counts each cluster once more before it counts the old ones less.
                let line = format!("snapshot -a {name} top.qcow2");
                let before = fs::read(&image).unwrap();
                match qemu::img(self.folder.path(), &line) {
                    Ok(_) => {}
                    Err(_) if self.narrow => {
                        fs::write(&image, before).unwrap();
                        return;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
        self.content = self.kept[index].content.clone();
    }

    fn delete(&mut self) {
        if self.kept.is_empty() {
            return;
        }
        let index = self.random.below(self.kept.len() as u64) as usize;
        let name = self.kept.remove(index).name;
        self.ids.remove(index);
        match self.random.chance(60) {
            true => {
                let image = self.at("top.qcow2");
                snapshots::delete(&image, Which::Name(&name), &mut |_, _| {}).unwrap();
            }
            false => {
                self.qemu_img(&format!("snapshot -d {name} top.qcow2"));
            }
        }
    }

    /// Looks at all that the image holds, with QEMU's eyes and with ours.
    fn look(&self, after: &str) {
        let checked = qemu::check(self.folder.path(), "top.qcow2");
        let (found, said) = checked.unwrap_or_else(|error| panic!("{after}: {error}"));
        assert_eq!(found, qemu::Found::NOTHING, "{after}: {said}");
        let file = fs::File::open(self.at("top.qcow2")).unwrap();
        let report = formats::qcow2::check(&file, &mut |_, _| {}).unwrap();
        assert!(report.is_clean(), "{after}: {report}");
        self.holds(after, "", &self.content);
        for kept in &self.kept {
            let of = format!("-l snapshot.name={}", kept.name);
            self.holds(after, &of, &kept.content);
        }
        let listed = snapshots::list(&self.at("top.qcow2")).unwrap();
        let ours: Vec<_> = listed
            .iter()
            .map(|it| (it.id.clone(), it.name.clone(), it.disk_size))
            .collect();
        let expected: Vec<_> = (self.kept.iter().zip(&self.ids))
            .map(|(kept, id)| {
                let size = kept.content.len() as u64;
                (id.to_string(), kept.name.clone(), Some(size))
            })
            .collect();
        assert_eq!(ours, expected, "{after}");
        let theirs = self.qemu_img("snapshot -l top.qcow2");
        let theirs: Vec<_> = theirs
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let (id, name) = (words.next()?, words.next()?);
                id.parse::<u64>().ok()?;
                Some((id.to_owned(), name.to_owned()))
            })
            .collect();
        let named: Vec<_> = expected.into_iter().map(|it| (it.0, it.1)).collect();
        assert_eq!(theirs, named, "{after}");
    }

    fn holds(&self, after: &str, of: &str, content: &[u8]) {
        self.qemu_img(&format!("convert -f qcow2 -O raw {of} top.qcow2 out.raw"));
        let read = fs::read(self.at("out.raw")).unwrap();
        // Of a snapshot QEMU reads as much as the disk has now.
        assert_eq!(read.len(), self.content.len(), "{after}: {of}");
        let different = read
            .iter()
            .zip(content)
            .position(|(one, other)| one != other);
        assert_eq!(different, None, "{after}: {of}");
    }
}

fn run(options: &str, backing: bool) {
    let count = std::env::var("SNAPSHOT_SEEDS").map_or(1, |count| count.parse().unwrap());
    for seed in 0..count {
        let mut desk = Desk::new(options, backing, seed);
        for number in 0..CHANGES {
            let change = desk.random.below(10);
            let what = match change {
                0..4 => "write",
                4..6 => "create",
                6 => "resize",
                7 | 8 => "apply",
                _ => "delete",
            };
            match what {
                "write" => desk.write(),
                "create" => desk.create(),
                "resize" => desk.resize(),
                "apply" => desk.apply(),
                _ => desk.delete(),
            }
            desk.look(&format!("{options}, seed {seed}, change {number}, {what}"));
        }
    }
}

#[test]
fn clusters_of_512_bytes_and_refcounts_of_8_bits() {
    run("cluster_size=512,refcount_bits=8", false);
}

#[test]
fn clusters_of_4_kib() {
    run("cluster_size=4k", false);
}

#[test]
fn clusters_of_64_kib_and_refcounts_of_64_bits() {
    run("cluster_size=64k,refcount_bits=64", false);
}

#[test]
fn clusters_of_2_mib() {
    run("cluster_size=2M,refcount_bits=32", false);
}

#[test]
fn refcounts_of_2_bits() {
    run("cluster_size=4k,refcount_bits=2", false);
}

#[test]
fn extended_l2_entries_and_zstd() {
    run(
        "cluster_size=16k,extended_l2=on,compression_type=zstd",
        false,
    );
}

#[test]
fn version_2() {
    run("cluster_size=4k,compat=v2", false);
}

#[test]
fn a_backing_file() {
    run("cluster_size=4k", true);
}

#[test]
fn postponed_refcounts() {
    run("cluster_size=4k,lazy_refcounts=on", false);
}
