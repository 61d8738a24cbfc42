//! The life of a VM, natively: `launcher up` runs kernels of a few instructions each.

#![allow(clippy::unwrap_used, clippy::panic)]

mod console;
mod kernel;
mod lifecycle;
mod terminal;
mod vm;
