//! The engine as a disk, judged by qemu-img.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod backing;
mod disks;
mod faults;
mod model;
mod refusals;
mod shared;
