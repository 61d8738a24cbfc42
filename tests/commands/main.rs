//! The commands to running VMs, against a control socket whose VM is a fake.

#![allow(clippy::unwrap_used)]

mod console;
mod logs;
mod orders;
#[path = "../program/mod.rs"]
mod program;
mod resize;
mod vm;
