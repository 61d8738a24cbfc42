//! The matrix of formats and options is in the tests of the command.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;

use super::*;
use crate::testing::{Random, directory};
use crate::{Disk, Limits, OptionValue, Pending, Segments, find};

/// A raw disk of 40 MiB with data here and there.
fn scene() -> (TempDir, Vec<u8>) {
    let directory = directory();
    let mut random = Random::new(11);
    let mut disk = vec![0; 40 << 20];
    for _ in 0..12 {
        let start = random.below(39 << 20) as usize;
        let len = random.below(1 << 20) as usize;
        disk[start..start + len].fill_with(|| random.below(256) as u8);
    }
    let file = fs::File::create(directory.path().join("a.raw")).unwrap();
    file.set_len(40 << 20).unwrap();
    for (at, block) in disk.chunks(4096).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, at as u64 * 4096).unwrap();
        }
    }
    (directory, disk)
}

fn image(path: PathBuf) -> Image {
    Image::new(path)
}

fn conversion<'a>(source: &'a Image, to: &'static Format, target: &'a Image) -> Conversion<'a> {
    Conversion {
        from: find("sparse-raw").unwrap(),
        source,
        to,
        target,
        backing: None,
        compress: false,
        verify: true,
        sync: true,
        force: false,
        engine: Engine::Auto,
    }
}

fn run(conversion: &Conversion<'_>) -> Result<u64, OpenError> {
    convert(conversion, &AtomicBool::new(false), &mut |_, _| {})
}

/// A raw image that loses what is written to one of its places.
struct Lossy(Box<dyn Disk>);

static LOSSY: Format = Format {
    name: "lossy",
    extensions: &[],
    description: "",
    abilities: &[],
    options: &[],
    open: |ring, image| {
        Box::pin(async move {
            let raw = find("sparse-raw").unwrap();
            Ok(Box::new(Lossy((raw.open)(ring, image).await?)) as Box<dyn Disk>)
        })
    },
    create: |image| (find("sparse-raw").unwrap().create)(image),
};

impl Disk for Lossy {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn read(&self, offset: u64, to: Segments) -> Pending<'_> {
        self.0.read(offset, to)
    }
    fn write(&self, offset: u64, from: Segments) -> Pending<'_> {
        let len = from.len() - 512;
        self.0.write(offset, from.slice(0, len))
    }
    fn flush(&self) -> Pending<'_> {
        self.0.flush()
    }
    fn volatile(&self) -> bool {
        self.0.volatile()
    }
    fn discard(&self, offset: u64, len: u64) -> Pending<'_> {
        self.0.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Pending<'_> {
        self.0.write_zeroes(offset, len, unmap)
    }
    fn resize(&self, size: u64) -> Pending<'_> {
        self.0.resize(size)
    }
    fn close(self: Box<Self>) -> Pending<'static> {
        self.0.close()
    }
}

/// The names in a folder.
fn names(directory: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(directory.path()).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn what_reads_back_differently_is_an_error_and_leaves_nothing() {
    let (directory, disk) = scene();
    let source = image(directory.path().join("a.raw"));
    let target = image(directory.path().join("b.raw"));
    let error = run(&conversion(&source, &LOSSY, &target)).unwrap_err();
    assert!(
        error.message.contains("reads back differently"),
        "{}",
        error.message
    );
    assert_eq!(names(&directory), ["a.raw"]);
    // Nobody has asked.
    let unverified = Conversion {
        verify: false,
        ..conversion(&source, &LOSSY, &target)
    };
    assert_eq!(run(&unverified).unwrap(), 40 << 20);
    assert!(fs::read(&target.path).unwrap() != disk);
}

#[test]
fn a_raw_copy_has_the_same_bytes_and_the_same_holes() {
    let (directory, disk) = scene();
    let source = image(directory.path().join("a.raw"));
    let target = image(directory.path().join("b.raw"));
    let raw = find("sparse-raw").unwrap();
    assert_eq!(run(&conversion(&source, raw, &target)).unwrap(), 40 << 20);
    assert!(fs::read(&target.path).unwrap() == disk);
    let blocks = |path| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap());
    assert!(blocks(&target.path) <= blocks(&source.path) + 64);
    assert_eq!(names(&directory), ["a.raw", "b.raw"]);
}

#[test]
fn zeroes_that_are_written_out_become_holes() {
    let directory = directory();
    let source = image(directory.path().join("a.raw"));
    let mut disk = vec![0; 4 << 20];
    disk[1 << 20] = 1;
    fs::write(&source.path, &disk).unwrap();
    let target = image(directory.path().join("b.raw"));
    run(&conversion(&source, find("sparse-raw").unwrap(), &target)).unwrap();
    assert!(fs::read(&target.path).unwrap() == disk);
    let meta = fs::metadata(&target.path).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&meta), 8);
}

#[test]
fn progress_ends_with_the_disk_in_both_stages() {
    let (directory, _) = scene();
    let source = image(directory.path().join("a.raw"));
    let target = image(directory.path().join("b.qcow2"));
    let mut seen = Vec::new();
    let stop = AtomicBool::new(false);
    let conversion = conversion(&source, find("qcow2").unwrap(), &target);
    convert(&conversion, &stop, &mut |stage, progress| {
        assert_eq!((progress.total, progress.path), (40 << 20, &*target.path));
        assert!(progress.done <= progress.total);
        seen.push((stage, progress.done));
    })
    .unwrap();
    for stage in [Stage::Converting, Stage::Verifying] {
        let of: Vec<_> = seen.iter().filter(|(it, _)| *it == stage).collect();
        assert!(
            of.len() > 5 && of.is_sorted_by_key(|(_, done)| done),
            "{of:?}"
        );
    }
    assert!(seen.is_sorted_by_key(|(stage, _)| *stage as u8));
}

#[test]
fn once_it_is_told_to_stop_it_stops_and_leaves_nothing() {
    let (directory, _) = scene();
    let source = image(directory.path().join("a.raw"));
    let target = image(directory.path().join("b.qcow2"));
    let conversion = conversion(&source, find("qcow2").unwrap(), &target);
    for last in [Stage::Converting, Stage::Verifying] {
        let stop = AtomicBool::new(false);
        let mut told = 0;
        let error = convert(&conversion, &stop, &mut |stage, _| {
            told += usize::from(stage == last);
            if told == 2 {
                stop.store(true, Ordering::Relaxed);
            }
        })
        .unwrap_err();
        assert!(
            error.message.starts_with("interrupted"),
            "{}",
            error.message
        );
        assert_eq!(names(&directory), ["a.raw"]);
    }
}

#[test]
fn a_disk_of_many_tebibytes_with_little_in_it_takes_no_time_and_no_memory() {
    let directory = directory();
    let first = image(directory.path().join("a.qcow2"));
    let qcow2 = find("qcow2").unwrap();
    let sized = Image {
        size: Some(256 << 40),
        options: vec![("cluster_size", OptionValue::Number(2 << 20))],
        ..first.clone()
    };
    (qcow2.create)(&sized).unwrap();
    let ring = Ring::new(Engine::Auto).unwrap();
    ring.block_on(
        async {
            let disk = (qcow2.open)(&ring, &first).await.unwrap();
            for at in [0, 100 << 40, (256 << 40) - 512] {
                let bytes = Segments::from_buffer(crate::Buffer::zeroed(512, 512).unwrap());
                bytes.fill(7);
                disk.write(at, bytes).await.unwrap();
            }
            disk.close().await.unwrap();
        },
        || {},
    );
    let target = Image {
        options: vec![("cluster_size", OptionValue::Number(1 << 20))],
        ..image(directory.path().join("b.qcow2"))
    };
    let conversion = Conversion {
        from: qcow2,
        ..conversion(&first, qcow2, &target)
    };
    assert_eq!(run(&conversion).unwrap(), 256 << 40);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&target.path).unwrap());
    assert!(blocks * 512 < 64 << 20, "{blocks}");
}
