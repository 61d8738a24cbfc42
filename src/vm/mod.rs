//! Building and running a machine.

mod acpi;
mod boot;
mod console;
mod cpuid;
mod devices;
mod events;
pub mod host;
mod kvm;
mod layout;
mod log_file;
mod machine;
mod memory;
mod run;
mod session;
mod vcpu;

pub use run::run;

/// How `launcher up` runs a VM, besides what its file says.
#[derive(Clone, Copy, Debug, Default)]
pub struct UpOptions {
    /// Try on a host that cannot boot an unmodified kernel.
    pub force: bool,
    /// How disks do their I/O.
    pub engine: formats::Engine,
}
