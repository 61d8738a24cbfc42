//! `launcher`: a virtual machine launcher for Linux/KVM. A VM is one TOML file.
//!
//! The arrows run one way: `cli` → `vm` → `devices` → the crate `formats`; `config` is plain
//! data, named by `cli` and `vm`.

pub mod cli;
pub mod config;
pub mod devices;
mod error;
pub mod exit;
pub mod messages;
mod progress;
mod signals;
pub mod terminal;
pub mod vm;

pub use error::{Error, Result};
