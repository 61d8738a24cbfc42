//! What the tests of this crate share.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::counting::Counting;
pub(crate) use crate::counting::allocations;
pub(crate) use crate::random::Random;
use crate::{Buffer, Disk, Engine, Image, OpenError, Ring, Segments, find};

/// The engines that work here: threads do everywhere.
pub(crate) fn engines() -> Vec<Engine> {
    let mut engines = vec![Engine::Threads];
    match Ring::new(Engine::IoUring) {
        Ok(_) => engines.push(Engine::IoUring),
        Err(error) => eprintln!("io_uring is not tested, it is refused here: {error}"),
    }
    engines
}

/// Runs a future on a ring.
pub(crate) fn run<T>(ring: &Ring, root: impl Future<Output = T>) -> T {
    ring.block_on(root, || {})
}

/// A directory beside the test program: on a disk, unlike maybe that for temporary files.
pub(crate) fn directory() -> TempDir {
    let program = std::env::current_exe().unwrap();
    tempfile::tempdir_in(program.parent().unwrap()).unwrap()
}

/// An image with every option at its default, but for `format`.
pub(crate) fn image(path: &Path) -> Image {
    Image {
        format_written: false,
        ..Image::new(path)
    }
}

/// Opens an image in one of the registered formats.
pub(crate) fn open(ring: &Ring, format: &str, image: &Image) -> Result<Box<dyn Disk>, OpenError> {
    run(ring, (find(format).unwrap().open)(ring, image))
}

/// The error of an image that must not open.
pub(crate) fn refused(format: &str, image: &Image) -> OpenError {
    let ring = Ring::new(Engine::Auto).unwrap();
    let result = open(&ring, format, image);
    result.err().expect("the image should have been refused")
}

/// Memory that holds `bytes`.
pub(crate) fn segments(bytes: &[u8]) -> Segments {
    let segments = Segments::from_buffer(Buffer::zeroed(bytes.len(), 1).unwrap());
    segments.copy_from(bytes);
    segments
}

/// What memory holds.
pub(crate) fn bytes(segments: &Segments) -> Vec<u8> {
    let mut bytes = vec![0; segments.len()];
    segments.copy_to(&mut bytes);
    bytes
}

/// Whether this test runs as root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a test once more, in a process of its own whose `SMALL_TMPFS` is a file system of
/// `size` that nobody else sees. In that process, returns where it is mounted.
pub(crate) fn in_tmpfs(test: &str, size: &str) -> Option<PathBuf> {
    if let Some(mounted) = std::env::var_os("SMALL_TMPFS") {
        return Some(mounted.into());
    }
    let directory = directory();
    // To mount needs root, or a user namespace in which anyone is root.
    let namespaces: &[&str] = match is_root() {
        true => &["--mount"],
        false => &["--mount", "--user", "--map-root-user"],
    };
    const SCRIPT: &str = r#"mount -t tmpfs -o size="$1" none "$SMALL_TMPFS" || exit 77
        exec "$2" --exact "$3" --nocapture"#;
    let output = Command::new("unshare")
        .args(namespaces)
        .args(["sh", "-c", SCRIPT, "sh", size])
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env("SMALL_TMPFS", directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => assert!(text.contains("1 passed"), "{text}"),
        false if !text.contains("running 1 test") => {
            eprintln!("{test} is not run, no file system may be mounted here: {text}");
        }
        false => panic!("{text}"),
    }
    None
}

/// A loop device over a file, until it is dropped.
pub(crate) struct Loop(pub(crate) PathBuf);

impl Loop {
    /// `None`, with the reason on standard error, where there are no loop devices for us.
    pub(crate) fn new(file: &Path, sector_size: u32) -> Option<Loop> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size"])
            .arg(sector_size.to_string())
            .arg(file)
            .output();
        let output = match output {
            Ok(output) if output.status.success() => output,
            refused => {
                eprintln!("block devices are not tested, they need root: {refused:?}");
                return None;
            }
        };
        let path = String::from_utf8(output.stdout).unwrap();
        Some(Loop(path.trim_end().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.0).status();
        assert!(detached.is_ok_and(|status| status.success()));
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;
