//! The format of examples/custom_format.rs: a plug-in from outside is a format like any other.

#![allow(clippy::unwrap_used, clippy::panic)]

mod bare;
#[allow(dead_code, reason = "its `main` is the example's")]
#[path = "../examples/custom_format.rs"]
mod custom_format;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use formats::{Buffer, Disk, Engine, Image, OpenError, OptionValue, Ring, Segments};
use launcher::config;

/// Runs the example in a folder.
fn example(folder: &Path, arguments: &[&str]) -> Output {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--locked", "--manifest-path", manifest])
        .args(["--example", "custom_format", "--"])
        .args(arguments)
        .current_dir(folder)
        .env_remove("LAUNCHER_LOG")
        .env("XDG_RUNTIME_DIR", folder)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn image(path: &Path, places: u64) -> Image {
    Image {
        size: Some(1 << 20),
        format_written: false,
        options: vec![("places", OptionValue::Number(places))],
        ..Image::new(path)
    }
}

fn open(ring: &Ring, image: &Image) -> Result<Box<dyn Disk>, OpenError> {
    let format = formats::for_extension("turned").unwrap();
    ring.block_on((format.open)(ring, image), || {})
}

fn memory(bytes: &[u8]) -> Segments {
    let segments = Segments::from_buffer(Buffer::zeroed(bytes.len(), 1).unwrap());
    segments.copy_from(bytes);
    segments
}

fn read(ring: &Ring, disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
    let segments = memory(&vec![9; len]);
    ring.block_on(disk.read(offset, segments.clone()), || {})
        .unwrap();
    let mut bytes = vec![0; len];
    segments.copy_to(&mut bytes);
    bytes
}

#[test]
fn it_is_listed_among_the_others() {
    let output = example(&std::env::temp_dir(), &["formats"]);
    let listing = String::from_utf8(output.stdout).unwrap();
    let row = |name: &str| {
        let mut rows = listing.lines();
        rows.find(|row| row.split(' ').next() == Some(name))
            .unwrap_or_else(|| panic!("no {name} in {listing}"))
    };
    assert!(row("raw").contains(".img"));
    let row = row("turned");
    for part in [".turned", "discard resize", "its bits turned around"] {
        assert!(row.contains(part), "{row}");
    }
}

#[test]
fn a_vm_s_file_names_it_by_extension_and_gives_its_option() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    let text = "boot.kernel = 'k'\n[[block]]\npath = 'a.turned'\n[block.turned]\nplaces = 3\n";
    fs::write(&file, text).unwrap();
    let disk = config::load(&file, &config::Choice::default())
        .unwrap()
        .block
        .remove(0);
    assert_eq!(disk.format, "turned");
    assert_eq!(disk.options, [("places", OptionValue::Number(3))]);
}

#[test]
fn what_is_written_is_read_and_turned_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.turned");
    let ring = Ring::new(Engine::Auto).unwrap();
    let disk = open(&ring, &image(&path, 3)).unwrap();
    let bytes: Vec<u8> = (0..200_000_u32).map(|at| (at % 251) as u8).collect();
    ring.block_on(disk.write(4096, memory(&bytes)), || {})
        .unwrap();
    assert!(read(&ring, &*disk, 4096, bytes.len()) == bytes);
    ring.block_on(disk.write_zeroes(8192, 4096, true), || {})
        .unwrap();
    assert_eq!(read(&ring, &*disk, 8192, 4096), [0; 4096]);
    ring.block_on(disk.close(), || {}).unwrap();
    let file = fs::read(&path).unwrap();
    assert_eq!(file.len(), 1 << 20);
    let turned: Vec<u8> = bytes[..4096]
        .iter()
        .map(|byte| byte.rotate_left(3))
        .collect();
    assert!(file[4096..8192] == turned);
    // Without the option its default holds.
    let default = Image {
        options: Vec::new(),
        ..image(&path, 0)
    };
    let disk = open(&ring, &default).unwrap();
    let other: Vec<u8> = turned.iter().map(|byte| byte.rotate_right(4)).collect();
    assert!(read(&ring, &*disk, 4096, 4096) == other);
}

#[test]
fn a_wrong_option_is_an_error_of_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let ring = Ring::new(Engine::Auto).unwrap();
    let error = open(&ring, &image(&folder.path().join("a.turned"), 8))
        .err()
        .unwrap();
    assert_eq!(
        (error.key, &*error.message),
        ("places", "`places` is not 1 to 7")
    );
}

#[test]
fn a_vm_runs_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("k"), bare::kernel(bare::POWER_OFF)).unwrap();
    let text = "boot.kernel = 'k'\n[[block]]\npath = 'a.turned'\nsize = '1MiB'\nroot = true\n";
    fs::write(at("vm.toml"), text).unwrap();
    let up = || bare::ended(example(folder.path(), &["up", "--force"]));
    let Some(end) = up() else { return };
    assert_eq!(end, (0, String::new()));
    assert_eq!(fs::metadata(at("a.turned")).unwrap().len(), 1 << 20);
    fs::write(at("vm.toml"), format!("{text}[block.turned]\nplaces = 9\n")).unwrap();
    let (code, errors) = up().unwrap();
    assert_eq!(code, 2);
    assert_eq!(
        errors,
        "error: `places` is not 1 to 7\n --> vm.toml:7:10\n  |\n7 | places = 9\n  |          ^\n"
    );
}
