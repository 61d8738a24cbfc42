//! The suite that every engine of the format qcow2 is put through, judged by QEMU's own tools.
//!
//! It is for tests, those of other crates too: compiled under the feature `faults`. A test calls
//! [`differential()`] and [`power_cuts()`] with the name of its format and what it supports.

mod content;
mod cuts;
mod differential;
mod first_steps;
mod history;
mod model;
mod point;
pub mod qemu;
mod recording;
mod scene;
mod traffic;

pub use crate::random::Random;
pub use content::{Content, SECTOR, Value};
pub use cuts::{Cuts, power_cuts, read};
pub use differential::{Suite, differential, seeds};
pub use first_steps::first_steps;
pub use point::{Backing, DataFile, Fit, Point};
pub use recording::{Cut, Recording};
pub use scene::Scene;
pub use traffic::{Act, Load, Outcome, Subject, What, run};
