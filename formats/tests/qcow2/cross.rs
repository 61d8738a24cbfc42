//! Images that QEMU made and used, and images of ours, each used by the other in turn.

use std::fs;
use std::ops::Range;
use std::path::PathBuf;

use formats::conformance::{Random, qemu};
use formats::{Buffer, Engine, Image, OptionValue, Ring, Segments};
use tempfile::TempDir;

use super::directory;
use super::harness::image;

/// An odd size, no multiple of most cluster sizes.
const SIZE: u64 = (3 << 20) + 1536;

/// A folder with an image, `top.qcow2`, and what it holds.
struct Desk {
    folder: TempDir,
    ring: Ring,
    backing: Vec<&'static str>,
    options: Vec<(&'static str, OptionValue)>,
    content: Vec<u8>,
    random: Random,
    /// Whether only sectors that qemu-img counted as lost are too many.
    leaks: bool,
}

impl Desk {
    fn new(seed: u64) -> Desk {
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

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    #[track_caller]
    fn qemu_img(&self, line: &str) -> String {
        qemu::img(self.folder.path(), line).unwrap_or_else(|error| panic!("{error}"))
    }

    #[track_caller]
    fn qemu_io(&self, name: &str, commands: &[String]) {
        qemu::io(self.folder.path(), name, commands).unwrap_or_else(|error| panic!("{error}"));
    }

    /// A raw base in which no sector is like another, and makes it what the disk holds.
    fn base(&mut self, name: &'static str, len: u64) {
        let bytes: Vec<u8> = (0..len).map(|at| (at / 512 * 7 + at % 251) as u8).collect();
        fs::write(self.at(name), &bytes).unwrap();
        let both = bytes.len().min(self.content.len());
        self.content.fill(0);
        self.content[..both].copy_from_slice(&bytes[..both]);
        self.backing.insert(0, name);
    }

    fn range(&mut self, unit: u64, most: u64) -> Range<u64> {
        let units = self.content.len() as u64 / unit;
        let start = self.random.below(units);
        let len = 1 + self.random.below((most / unit).max(1));
        start * unit..(start + len).min(units) * unit
    }

    /// QEMU writes, in all ways that it has.
    #[track_caller]
    fn used_by_qemu(&mut self, clusters_are: u64) {
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

    fn opened(&self, name: &str, backing: &[&str]) -> Image {
        Image {
            backing: backing.iter().map(|name| self.at(name)).collect(),
            options: self.options.clone(),
            ..image(&self.at(name))
        }
    }

    /// We write, in all ways that we have.
    #[track_caller]
    fn used_by_us(&mut self) {
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
    fn written_by_us(&self, offset: u64, byte: u8, len: usize) {
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
    fn resized_by_us(&mut self, size: u64) {
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
    fn ours(&self, name: &str, backing: &[&str]) -> Vec<u8> {
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
    fn agreed(&self, when: &str) {
        let (found, said) = qemu::check(self.folder.path(), "top.qcow2")
            .unwrap_or_else(|error| panic!("{when}: {error}"));
        assert!(
            self.leaks || found == qemu::Found::Nothing,
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
    fn same(&self, found: &[u8], when: &str) {
        assert_eq!(found.len(), self.content.len(), "{when}");
        if found != self.content {
            let differs = |at: &usize| found[*at] != self.content[*at];
            let at = (0..found.len()).find(differs).unwrap();
            let (found, wanted) = (found[at], self.content[at]);
            panic!("{when}: byte {at} is {found:#x}, expected {wanted:#x}");
        }
    }
}

/// Options of `qemu-img create`, and the size of a cluster.
const CREATED_BY_QEMU: [(&str, u64); 28] = [
    ("compat=0.10", 65536),
    ("compat=1.1", 65536),
    ("compat=0.10,cluster_size=512", 512),
    ("cluster_size=512", 512),
    ("cluster_size=1k", 1024),
    ("cluster_size=2k", 2048),
    ("cluster_size=4k", 4096),
    ("cluster_size=8k", 8192),
    ("cluster_size=32k", 32768),
    ("cluster_size=256k", 262_144),
    ("cluster_size=2M", 2_097_152),
    ("preallocation=metadata", 65536),
    ("preallocation=falloc", 65536),
    ("preallocation=full,cluster_size=4k", 4096),
    ("lazy_refcounts=on", 65536),
    ("refcount_bits=1", 65536),
    ("refcount_bits=2,cluster_size=4k", 4096),
    ("refcount_bits=4", 65536),
    ("refcount_bits=8", 65536),
    ("refcount_bits=32", 65536),
    ("refcount_bits=64,cluster_size=512", 512),
    ("compression_type=zstd", 65536),
    ("extended_l2=on", 65536),
    ("extended_l2=on,cluster_size=16k", 16384),
    ("extended_l2=on,preallocation=metadata", 65536),
    ("data_file=top.data", 65536),
    ("data_file=top.data,data_file_raw=on", 65536),
    ("data_file=top.data,cluster_size=4k,extended_l2=off", 4096),
];

#[test]
fn an_image_that_qemu_created_with_each_option_is_used_in_turn() {
    for (seed, (options, cluster)) in (0..).zip(CREATED_BY_QEMU) {
        let mut desk = Desk::new(seed);
        desk.qemu_img(&format!("create -q -f qcow2 -o {options} top.qcow2 {SIZE}"));
        if options.contains("data_file") {
            let path = desk.at("top.data");
            desk.options.push(("data_file", OptionValue::Path(path)));
        }
        desk.used_by_qemu(cluster);
        desk.agreed(&format!("{options}: used by QEMU"));
        desk.used_by_us();
        desk.agreed(&format!("{options}: used by us"));
        desk.used_by_qemu(cluster);
        desk.agreed(&format!("{options}: used by QEMU again"));
    }
}

#[test]
fn an_image_with_a_backing_file_is_used_in_turn() {
    let bases = [
        ("qcow2", SIZE - 512),
        ("raw", SIZE + 4096),
        ("raw", (2 << 20) + 777),
    ];
    for (seed, options) in (0..).zip([
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "extended_l2=on",
        "cluster_size=2M",
        "lazy_refcounts=on,refcount_bits=1",
    ]) {
        let (format, len) = bases[seed as usize % 3];
        let mut desk = Desk::new(seed);
        desk.base("base.raw", len);
        if format == "qcow2" {
            desk.qemu_img("convert -c -f raw -O qcow2 base.raw base.qcow2");
            desk.backing = vec!["base.qcow2"];
        }
        let create = format!("create -q -f qcow2 -o {options} -F {format} -b base.{format}");
        desk.qemu_img(&format!("{create} top.qcow2 {SIZE}"));
        desk.agreed(&format!("{options}: new"));
        for round in 0..2 {
            desk.used_by_us();
            desk.agreed(&format!("{options}: used by us, {round}"));
            // A discard in version 2 may show the backing file again: not with QEMU's own.
            if !options.contains("0.10") {
                desk.used_by_qemu(2 << 20);
                desk.agreed(&format!("{options}: used by QEMU, {round}"));
            }
        }
    }
}

#[test]
fn compressed_clusters_of_qemu_are_read_and_written_over() {
    for (seed, options) in (0..).zip([
        "compression_type=zlib",
        "compression_type=zstd",
        "compression_type=zlib,cluster_size=512",
        "compression_type=zstd,cluster_size=2M,extended_l2=on",
        "compat=0.10,cluster_size=4k",
    ]) {
        let mut desk = Desk::new(seed);
        desk.base("source.raw", SIZE);
        desk.backing.clear();
        // What does not become smaller stays as it is.
        for at in 0..100_000 {
            desk.content[1_000_000 + at] = desk.random.number() as u8;
        }
        fs::write(desk.at("source.raw"), &desk.content).unwrap();
        desk.qemu_img(&format!(
            "convert -c -f raw -O qcow2 -o {options} source.raw top.qcow2"
        ));
        desk.agreed(&format!("{options}: converted"));
        desk.used_by_us();
        desk.agreed(&format!("{options}: used by us"));
        desk.used_by_qemu(2 << 20);
        desk.agreed(&format!("{options}: used by QEMU"));
        // From ours to theirs, compressed again.
        desk.qemu_img(&format!(
            "convert -c -f qcow2 -O qcow2 -o {options} top.qcow2 new.qcow2"
        ));
        fs::rename(desk.at("new.qcow2"), desk.at("top.qcow2")).unwrap();
        desk.agreed(&format!("{options}: converted again"));
    }
}

#[test]
fn qemu_writes_compressed_clusters_into_an_image_of_ours() {
    let mut desk = Desk::new(1);
    desk.create_by_us(&[]);
    let command = "write -c -P 0x77 131072 65536".to_owned();
    desk.qemu_io(
        "top.qcow2",
        &[command, "write -c -P 0x78 1048576 65536".into()],
    );
    desk.content[131_072..196_608].fill(0x77);
    desk.content[1_048_576..1_114_112].fill(0x78);
    desk.agreed("compressed by QEMU");
    desk.used_by_us();
    desk.agreed("used by us");
}

#[test]
fn snapshots_that_qemu_takes_applies_and_deletes_keep_what_they_hold() {
    for (seed, options) in (0..).zip([
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "extended_l2=on",
    ]) {
        let mut desk = Desk::new(seed);
        desk.qemu_img(&format!("create -q -f qcow2 -o {options} top.qcow2 {SIZE}"));
        desk.used_by_us();
        desk.qemu_img("snapshot -c a top.qcow2");
        let a = desk.content.clone();
        desk.used_by_us();
        desk.agreed(&format!("{options}: after a"));
        desk.qemu_img("snapshot -c b top.qcow2");
        let b = desk.content.clone();
        desk.used_by_us();
        desk.used_by_qemu(2 << 20);
        desk.used_by_us();
        desk.agreed(&format!("{options}: after b"));
        let now = std::mem::replace(&mut desk.content, a.clone());
        for (name, content) in [("a", &a), ("b", &b)] {
            let line = format!("convert -f qcow2 -l snapshot.name={name} -O raw top.qcow2 out");
            desk.qemu_img(&line);
            assert!(
                fs::read(desk.at("out")).unwrap() == *content,
                "{options}: snapshot {name}"
            );
        }
        desk.qemu_img("snapshot -c c top.qcow2");
        desk.qemu_img("snapshot -a a top.qcow2");
        desk.agreed(&format!("{options}: a applied"));
        desk.used_by_us();
        desk.agreed(&format!("{options}: a applied and used by us"));
        desk.qemu_img("snapshot -d a top.qcow2");
        desk.agreed(&format!("{options}: a deleted"));
        desk.used_by_us();
        desk.qemu_img("snapshot -a c top.qcow2");
        desk.content = now;
        desk.agreed(&format!("{options}: c applied"));
        for name in ["b", "c"] {
            desk.qemu_img(&format!("snapshot -d {name} top.qcow2"));
        }
        desk.used_by_us();
        desk.agreed(&format!("{options}: no snapshot left"));
    }
}

#[test]
fn qemu_commits_what_we_wrote() {
    for seed in 0..3 {
        let mut desk = Desk::new(seed);
        desk.base("base.raw", SIZE);
        desk.qemu_img("convert -f raw -O qcow2 base.raw base.qcow2");
        desk.qemu_img("create -q -f qcow2 -F qcow2 -b base.qcow2 mid.qcow2");
        desk.qemu_img("create -q -f qcow2 -o cluster_size=4k -F qcow2 -b mid.qcow2 top.qcow2");
        desk.backing = vec!["mid.qcow2", "base.qcow2"];
        desk.used_by_us();
        desk.agreed("over two");
        desk.qemu_img("commit -q top.qcow2");
        let mid = desk.ours("mid.qcow2", &["base.qcow2"]);
        desk.same(&mid, "committed to the middle");
        desk.agreed("committed");
        desk.used_by_us();
        desk.qemu_img("commit -q -b base.qcow2 top.qcow2");
        let base = desk.ours("base.qcow2", &[]);
        desk.same(&base, "committed to the base");
    }
}

#[test]
fn an_image_that_qemu_amends_is_used_in_turn() {
    let mut desk = Desk::new(5);
    desk.base("base.raw", SIZE);
    desk.qemu_img(&format!(
        "create -q -f qcow2 -o compat=0.10,cluster_size=4k -F raw -b base.raw top.qcow2 {SIZE}"
    ));
    desk.used_by_us();
    for amended in [
        "compat=1.1",
        "lazy_refcounts=on",
        "refcount_bits=64",
        "refcount_bits=16,lazy_refcounts=off",
        "compat=0.10",
        "compat=1.1",
    ] {
        desk.qemu_img(&format!("amend -q -f qcow2 -o {amended} top.qcow2"));
        desk.agreed(&format!("amended, {amended}"));
        desk.used_by_us();
        desk.agreed(&format!("{amended}: used by us"));
    }
}

#[test]
fn an_image_that_qemu_rebases_is_used_in_turn() {
    let mut desk = Desk::new(6);
    desk.base("base.raw", SIZE);
    desk.qemu_img("convert -f raw -O qcow2 base.raw other.qcow2");
    desk.qemu_io("other.qcow2", &["write -P 9 0 1M".into()]);
    desk.qemu_img(&format!(
        "create -q -f qcow2 -F raw -b base.raw top.qcow2 {SIZE}"
    ));
    desk.used_by_us();
    desk.qemu_img("rebase -q -f qcow2 -F qcow2 -b other.qcow2 top.qcow2");
    desk.backing = vec!["other.qcow2"];
    desk.agreed("rebased");
    desk.used_by_us();
    desk.agreed("rebased and used by us");
    let line = ["rebase", "-q", "-f", "qcow2", "-b", "", "top.qcow2"];
    qemu::done(desk.folder.path(), "qemu-img", line).unwrap();
    desk.backing.clear();
    desk.agreed("alone");
    desk.used_by_us();
    desk.agreed("alone and used by us");
}

#[test]
fn each_of_us_resizes_what_the_other_made() {
    for (seed, options) in (0..).zip([
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "extended_l2=on",
    ]) {
        let mut desk = Desk::new(seed);
        // In version 2 QEMU cannot hide what lies below new space.
        let below = if options == "compat=0.10" { 0 } else { 4 << 20 };
        desk.base("base.raw", SIZE + below);
        let backing = "-F raw -b base.raw";
        desk.qemu_img(&format!(
            "create -q -f qcow2 -o {options} {backing} top.qcow2 {SIZE}"
        ));
        for size in [5 << 20, (4 << 20) + 512, 7 << 20] {
            desk.used_by_us();
            desk.qemu_img(&format!("resize -q -f qcow2 --shrink top.qcow2 {size}"));
            desk.content.resize(size, 0);
            desk.agreed(&format!("{options}: resized by QEMU to {size}"));
        }
        for size in [8 << 20, (2 << 20) + 1024, 6 << 20] {
            desk.resized_by_us(size);
            desk.agreed(&format!("{options}: resized by us to {size}"));
            desk.used_by_us();
            desk.agreed(&format!("{options}: used by us at {size}"));
        }
    }
}

#[test]
fn a_file_that_ends_within_a_cluster_is_used_like_any_other() {
    for (cluster, len) in [
        (65536, 40_000),
        (65536, 512),
        (2 << 20, 777_777),
        (512, 100),
    ] {
        let mut desk = Desk::new(1);
        let create = format!("create -q -f qcow2 -o cluster_size={cluster}");
        desk.qemu_img(&format!("{create} top.qcow2 {SIZE}"));
        desk.qemu_io("top.qcow2", &["write -P 5 0 1k".into()]);
        desk.content[..1024].fill(5);
        // Nothing refers to this, so it is where the next cluster goes.
        let mut bytes = fs::read(desk.at("top.qcow2")).unwrap();
        let whole = bytes.len().next_multiple_of(cluster as usize);
        bytes.resize(whole, 0);
        bytes.extend(std::iter::repeat_n(0xff, len));
        fs::write(desk.at("top.qcow2"), bytes).unwrap();
        let (start, end) = (cluster as usize + 1024, cluster as usize + 1024 + 200_000);
        desk.content[start..end].fill(0x66);
        desk.written_by_us(start as u64, 0x66, 200_000);
        desk.agreed(&format!("{cluster}"));
        desk.used_by_us();
        desk.agreed(&format!("{cluster}: used by us"));
    }
}

#[test]
fn persistent_bitmaps_are_no_longer_valid_after_we_wrote() {
    let mut desk = Desk::new(8);
    desk.qemu_img(&format!("create -q -f qcow2 top.qcow2 {SIZE}"));
    desk.used_by_qemu(65536);
    desk.qemu_img("bitmap --add -f qcow2 top.qcow2 dirty");
    desk.agreed("with a bitmap");
    let autoclear = |desk: &Desk| fs::read(desk.at("top.qcow2")).unwrap()[95] & 1;
    assert_eq!(autoclear(&desk), 1);
    desk.used_by_us();
    assert_eq!(autoclear(&desk), 0);
    // QEMU finds that nothing refers to the bitmap any more.
    desk.leaks = true;
    desk.agreed("used by us");
}

impl Desk {
    /// We create the image.
    #[track_caller]
    fn create_by_us(&mut self, options: &[(&'static str, OptionValue)]) {
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

#[test]
fn an_image_that_we_created_with_each_option_is_used_in_turn() {
    let number = OptionValue::Number;
    let word = |word: &str| OptionValue::Word(word.into());
    let size = |bytes| vec![("cluster_size", number(bytes))];
    let with = |mut options: Vec<_>, name, value| {
        options.push((name, value));
        options
    };
    let mut cases = vec![
        vec![],
        vec![("version", number(2))],
        with(size(512), "version", number(2)),
        vec![("lazy_refcounts", OptionValue::Bool(true))],
        vec![("compression_type", word("zstd"))],
        vec![("extended_l2", OptionValue::Bool(true))],
        with(size(16 << 10), "extended_l2", OptionValue::Bool(true)),
        with(size(4096), "preallocation", word("metadata")),
        vec![("preallocation", word("falloc"))],
        with(size(512), "preallocation", word("full")),
    ];
    cases.extend([512, 1024, 4096, 32 << 10, 2 << 20].map(size));
    let bits = [1, 2, 4, 8, 32, 64];
    cases.extend(bits.map(|bits| vec![("refcount_bits", number(bits))]));
    for backing in [false, true] {
        for (seed, options) in (0..).zip(&cases) {
            let preallocated = options.iter().any(|(name, _)| *name == "preallocation");
            // Not each of them again.
            if backing && (preallocated || seed % 3 != 1) {
                continue;
            }
            let mut desk = Desk::new(seed);
            if backing {
                desk.base("base.raw", SIZE - 1000);
            }
            desk.create_by_us(options);
            desk.agreed(&format!("{options:?}: created by us"));
            let version_2 = options.contains(&("version", number(2)));
            if !(backing && version_2) {
                desk.used_by_qemu(2 << 20);
                desk.agreed(&format!("{options:?}: used by QEMU"));
            }
            desk.used_by_us();
            desk.agreed(&format!("{options:?}: used by us"));
        }
    }
}

#[test]
fn a_data_file_of_an_image_of_ours_is_used_in_turn() {
    for raw in [false, true] {
        let mut desk = Desk::new(u64::from(raw));
        let data = desk.at("top.data");
        let mut options = vec![("data_file", OptionValue::Path(data.clone()))];
        if raw {
            options.push(("data_file_raw", OptionValue::Bool(true)));
        }
        desk.create_by_us(&options);
        desk.agreed("created by us");
        desk.used_by_qemu(65536);
        desk.agreed("used by QEMU");
        desk.used_by_us();
        desk.agreed("used by us");
        if raw {
            desk.same(&fs::read(data).unwrap()[..SIZE as usize], "the data file");
        }
    }
}
