//! The tests that decide about the format qcow2: `formats::conformance` on our own engine, and
//! images that QEMU and we use in turn.
//!
//! The long run: `QCOW2_SEEDS=2000 QCOW2_STATES=20000 cargo test -p formats --test qcow2`, with
//! `-- --nocapture` to see each failure at once. What failed says how to run it alone:
//! `QCOW2_SEED=7` for a differential run, `QCOW2_CUT=7` for the power cuts of one run. The files
//! of a failure are left beside the test program.

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
