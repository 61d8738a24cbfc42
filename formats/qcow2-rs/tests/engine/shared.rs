//! What the tests share: a directory with images, a ring, QEMU's tools.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;

use formats::{Buffer, Disk, Engine, Image, OpenError, Ring, Segments};
use formats_qcow2_rs as _;
use tempfile::TempDir;

/// A directory with images, and a ring.
pub(crate) struct Lab {
    directory: TempDir,
    pub(crate) ring: Ring,
}

impl Lab {
    pub(crate) fn new() -> Lab {
        // Beside the test program: on a disk, unlike maybe the directory for temporary files.
        let program = std::env::current_exe().unwrap();
        Lab {
            directory: tempfile::tempdir_in(program.parent().unwrap()).unwrap(),
            ring: Ring::new(Engine::Auto).unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs a program of QEMU's in the directory; its standard output.
    pub(crate) fn tool(&self, program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(self.directory.path())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn qemu_img(&self, arguments: &[&str]) -> String {
        self.tool("qemu-img", arguments)
    }

    /// `qemu-img create -f qcow2` with options (`-o`).
    pub(crate) fn create(&self, name: &str, options: &str, size: &str) -> PathBuf {
        let with: &[&str] = if options.is_empty() {
            &[]
        } else {
            &["-o", options]
        };
        self.qemu_img(&[&["create", "-q", "-f", "qcow2"], with, &[name, size]].concat());
        self.path(name)
    }

    /// Neither an error nor a leak is in an image.
    pub(crate) fn check(&self, name: &str) {
        let output = self.qemu_img(&["check", "-f", "qcow2", name]);
        assert!(output.contains("No errors were found"), "{output}");
    }

    /// An image has these bytes.
    pub(crate) fn compare(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path("expected.raw"), bytes).unwrap();
        self.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "expected.raw", name]);
    }

    pub(crate) fn try_open(&self, image: &Image) -> Result<Box<dyn Disk>, OpenError> {
        let format = formats::find("qcow2-rs").unwrap();
        self.run((format.open)(&self.ring, image))
    }

    pub(crate) fn open(&self, name: &str) -> Box<dyn Disk> {
        self.try_open(&image(&self.path(name))).unwrap()
    }

    /// The error of an image that must not open.
    pub(crate) fn refused(&self, image: &Image) -> OpenError {
        let result = self.try_open(image);
        result.err().expect("the image should have been refused")
    }

    pub(crate) fn run<T>(&self, root: impl Future<Output = T>) -> T {
        self.ring.block_on(root, || {})
    }

    pub(crate) fn read(&self, disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
        let to = segments(&vec![0xee; len]);
        self.run(disk.read(offset, to.clone())).unwrap();
        bytes(&to)
    }

    pub(crate) fn write(&self, disk: &dyn Disk, offset: u64, from: &[u8]) {
        self.run(disk.write(offset, segments(from))).unwrap();
    }
}

/// An image with every option at its default, but for `format`.
pub(crate) fn image(path: &Path) -> Image {
    Image::new(path)
}

/// Memory that holds `bytes`.
pub(crate) fn segments(bytes: &[u8]) -> Segments {
    let segments = Segments::from_buffer(Buffer::zeroed(bytes.len(), 512).unwrap());
    segments.copy_from(bytes);
    segments
}

/// What memory holds.
pub(crate) fn bytes(segments: &Segments) -> Vec<u8> {
    let mut bytes = vec![0; segments.len()];
    segments.copy_to(&mut bytes);
    bytes
}

/// Marsaglia's xorshift: the same numbers for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}
