//! The life of a VM, natively: `launcher up` runs kernels of a few instructions each.

#![allow(clippy::unwrap_used, clippy::panic)]

mod client;
mod console;
mod control;
mod detach;
mod kernel;
mod lifecycle;
mod served;
mod several;
mod terminal;
mod vm;
