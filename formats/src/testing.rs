//! What the tests of this crate share.

use std::future::Future;
use std::path::Path;

use tempfile::TempDir;

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
        path: path.into(),
        ro: false,
        sparse: true,
        o_direct: false,
        block_size: 512,
        lock: true,
        size: None,
        backing: None,
        format_written: false,
        options: Vec::new(),
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

/// Marsaglia's xorshift: the same numbers for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed | 1)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// One of `items`.
    pub(crate) fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }
}
