//! The tests that decide about the format qcow2: `formats::conformance` on our own engine, and
//! images that QEMU and we use in turn.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cross;
mod differential;
mod harness;
mod power_cuts;

use std::path::PathBuf;
use std::sync::OnceLock;

use tempfile::TempDir;

/// A directory on a disk, unlike maybe that for temporary files.
fn directory() -> TempDir {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    let place = PLACE.get_or_init(|| {
        let program = std::env::current_exe().unwrap();
        program.parent().unwrap().to_path_buf()
    });
    tempfile::tempdir_in(place).unwrap()
}
