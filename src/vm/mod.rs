//! Building and running a machine.

mod acpi;
mod boot;
mod check;
mod console;
mod control;
mod cpuid;
mod devices;
mod events;
pub mod host;
mod kvm;
mod layout;
mod life;
mod machine;
mod memory;
mod run;
mod session;
mod shape;
mod trial;
mod vcpu;

use std::path::PathBuf;
use std::sync::Arc;

use crate::control::Subject;
use crate::control::messages::{Event, How};

#[cfg(test)]
pub(crate) use boot::tests::bare_kernel;
pub use check::check;
pub(crate) use devices::open_disk;
pub use run::run;
pub use shape::{Device, Function, Shape, shape};
pub use trial::{check_disk, check_kernel, root_parameter};

/// How `launcher up` runs a VM, besides what its file says.
#[derive(Clone, Debug, Default)]
pub struct UpOptions {
    /// Try on a host that cannot boot an unmodified kernel.
    pub force: bool,
    /// How disks do their I/O.
    pub engine: formats::Engine,
    /// Leave standard input and output alone: the console is at the control socket.
    pub detached: bool,
    /// Where what the guest prints is kept if it is not shown on standard output.
    pub console_log: Option<PathBuf>,
}

/// Takes events; it must not block.
pub type Publish = Box<dyn FnMut(Event) + Send>;

/// Is given the VM when it is about to run, and says where its events go; after an error of its own
/// the guest has not run.
pub type Running<'a> = Box<dyn FnOnce(Arc<dyn Subject>) -> crate::Result<Publish> + 'a>;

/// How a VM ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code, or what to tell the user. An error that is about a key of the VM's file
    /// shows its place.
    pub result: crate::Result<u8>,
    /// Who ended it.
    pub how: How,
    /// One sentence, where there is more to say.
    pub why: Option<String>,
}
