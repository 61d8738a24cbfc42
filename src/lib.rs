//! `launcher`: a virtual machine launcher for Linux/KVM. A VM is one TOML file.
//!
//! The arrows run one way: `cli` → `control`, `vm` → `devices` → the crate `formats`; `config` is plain
//! data, named by `cli` and `vm`.

mod cache;
pub mod cli;
pub mod config;
pub mod control;
pub mod devices;
pub mod digest;
mod durable;
mod error;
pub mod exit;
mod initramfs;
mod lock;
pub mod messages;
mod progress;
mod reset;
pub(crate) mod resize;
mod scratch;
mod serve;
mod signals;
mod sources;
mod stdout;
pub mod terminal;
pub mod vm;

pub use error::{Error, Result};

#[cfg(fuzzing)]
#[doc(hidden)]
pub use serve::fuzzing as serve_fuzzing;

// A format registers itself where a program names its crate.
#[cfg(feature = "qcow2-rs")]
use formats_qcow2_rs as _;
