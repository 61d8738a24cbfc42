//! A vCPU's thread inside and outside the guest: KVM_RUN, the exits that it handles, and the
//! signal that gets it out.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::World;
use super::gate::{Gate, Parked};
use crate::vm::events::Outcome;
use crate::{Error, Result};

thread_local! {
    /// The shared page of the vCPU that this thread runs, null in other threads.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that gets a vCPU thread out of the guest.
pub(super) fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Asks the vCPU of this thread to leave the guest, or not to enter it: whichever comes first,
/// so that no kick is lost between a look at the stop flag and KVM_RUN.
extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let page = RUN_PAGE.get();
    if !page.is_null() {
        // SAFETY: the pointer is set only while this very thread owns the vCPU whose page it is
        // (see `RunPage`); a one-byte volatile store is all that happens, which the kernel reads.
        unsafe { ptr::write_volatile(&raw mut (*page).immediate_exit, 1) };
    }
}

/// Installs the handler of the kick signal, once a process.
pub(crate) fn install_kick_handler() -> Result<()> {
    // Blocked, as some parents leave all signals, it would never get a vCPU out of the guest.
    crate::signals::unblock([kick_signal()]);
    register_signal_handler(kick_signal(), on_kick)
        .map_err(|error| Error::failed(format!("cannot install a signal handler: {error}")))
}

/// Publishes a vCPU's shared page to the signal handler for as long as it lives.
struct RunPage;

impl RunPage {
    fn publish(fd: &mut VcpuFd) -> RunPage {
        RUN_PAGE.set(fd.get_kvm_run());
        RunPage
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        RUN_PAGE.set(ptr::null_mut());
    }
}
/// Runs a vCPU until it is stopped. Whatever else ends it ends the VM.
pub(super) fn run_reporting(id: usize, mut fd: VcpuFd, world: &World, gate: &Gate) {
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let page = RunPage::publish(&mut fd);
        let ended = run(id, &mut fd, world, gate);
        drop(page);
        ended
    }));
    let outcome =
        ran.unwrap_or_else(|_| Some(Outcome::Failed(format!("the thread of vCPU {id} panicked"))));
    if let Some(outcome) = outcome {
        world.events.end(outcome);
    }
    gate.leave();
}

/// Enters the guest until the vCPU is stopped (`None`) or cannot go on.
fn run(id: usize, fd: &mut VcpuFd, world: &World, gate: &Gate) -> Option<Outcome> {
    loop {
        match gate.pass() {
            Parked::Not => {}
            Parked::ForAWhile => forgive_the_pause(fd),
            Parked::ForGood => return None,
        }
        match fd.run() {
            // A string instruction brings several accesses of one width in one exit.
            Ok(VcpuExit::IoOut(port, data)) => {
                for access in data.chunks(port_access_len()) {
                    world.ports.write(u64::from(port), access);
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                for access in data.chunks_mut(port_access_len()) {
                    world.ports.read(u64::from(port), access);
                }
            }
            Ok(VcpuExit::MmioWrite(address, data)) => world.memory.write(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => world.memory.read(address, data),
            Ok(VcpuExit::Shutdown) => return Some(Outcome::Crash),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                return Some(Outcome::PowerOff);
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Some(Outcome::Reboot),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => return Some(Outcome::Panic),
            // HLT is KVM's business (its interrupt controllers are in the kernel); an exit for
            // it, or for a signal, is no event.
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Some(Outcome::Failed(format!(
                    "KVM could not enter the guest on vCPU {id}: hardware reason {reason:#x} on host CPU {cpu}"
                )));
            }
            Ok(VcpuExit::InternalError) => {
                let place = instruction_pointer(fd);
                return Some(Outcome::Failed(format!(
                    "KVM could not emulate what vCPU {id} does at {place}"
                )));
            }
            Ok(other) => {
                let what = format!("{other:?}");
                return Some(Outcome::Failed(format!(
                    "vCPU {id} left the guest for a reason that is not supported: {what}"
                )));
            }
            Err(error) if error.errno() == libc::EINTR => fd.set_kvm_immediate_exit(0),
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => {
                return Some(Outcome::Failed(format!(
                    "KVM cannot run vCPU {id}: {error}"
                )));
            }
        }
    }
}

/// Tells the guest's clock that the vCPU was not to blame for the time that it has missed: its
/// watchdogs take a pause for a lockup otherwise (KVM_KVMCLOCK_CTRL, Documentation/virt/kvm/api.rst).
fn forgive_the_pause(fd: &VcpuFd) {
    // EINVAL: the guest has not set up a clock of KVM's.
    if let Err(error) = fd.kvmclock_ctrl()
        && error.errno() != libc::EINVAL
    {
        tracing::debug!("the guest is not told of the pause: {error}");
    }
}

/// The width in bytes of the port accesses that this thread's vCPU has just left the guest for.
fn port_access_len() -> usize {
    let page = RUN_PAGE.get();
    if page.is_null() {
        return 1;
    }
    // SAFETY: the page is this thread's vCPU's (see `RunPage`). The kernel has filled this member
    // of the union in for the exit that is being handled, and every bit pattern of it is valid.
    let len = unsafe { (*page).__bindgen_anon_1.io.size };
    usize::from(len).max(1)
}

fn instruction_pointer(fd: &VcpuFd) -> String {
    match fd.get_regs() {
        Ok(regs) => format!("instruction {:#x}", regs.rip),
        Err(error) => format!("an instruction that it does not tell ({error})"),
    }
}
