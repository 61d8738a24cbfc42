//! The threads of a VM's vCPUs: started, paused, resumed and stopped together.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::Killable;

use super::World;
use super::gate::Gate;
use super::run::{kick_signal, run_reporting};
use crate::{Error, Result};

/// The running vCPUs of a VM.
pub(crate) struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
}

impl Vcpus {
    /// Starts a thread for each vCPU. The first one, which alone has something to run, starts
    /// last: the guest runs only once all threads are there. If `paused`, it runs once they are
    /// resumed.
    pub(crate) fn start(fds: Vec<VcpuFd>, world: World, paused: bool) -> Result<Vcpus> {
        let world = Arc::new(world);
        let mut vcpus = Vcpus {
            threads: Vec::with_capacity(fds.len()),
            gate: Arc::new(Gate::new(fds.len(), paused)),
        };
        for (id, fd) in fds.into_iter().enumerate().rev() {
            let (world, gate) = (Arc::clone(&world), Arc::clone(&vcpus.gate));
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(256 << 10)
                .spawn(move || run_reporting(id, fd, &world, &gate))
                .map_err(|error| {
                    Error::failed(format!("cannot start the thread of vCPU {id}: {error}"))
                        .help("raise the limit on threads (`ulimit -u`)")
                })?;
            vcpus.threads.push(thread);
        }
        let clocks = vcpus.threads.iter().rev().filter_map(clock_of);
        vcpus.gate.set_clocks(clocks.collect());
        Ok(vcpus)
    }

    /// Where they wait while they are paused.
    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Has all vCPUs leave the guest and wait outside; see [`Gate::wait_until_paused`].
    pub(crate) fn pause(&self) {
        self.gate.pause();
        self.kick();
    }

    /// Lets them run again.
    pub(crate) fn resume(&self) {
        self.gate.open();
    }

    /// Stops all vCPUs. When it returns, none runs guest code any more.
    pub(crate) fn stop(mut self) {
        self.stop_threads();
    }

    /// Gets every vCPU out of the guest.
    fn kick(&self) {
        for thread in &self.threads {
            if let Err(error) = thread.kill(kick_signal()) {
                tracing::warn!("cannot signal a vCPU thread: {error}");
            }
        }
    }

    fn stop_threads(&mut self) {
        self.gate.shut();
        self.kick();
        for thread in self.threads.drain(..) {
            // It catches its own panics, and has reported them.
            let _ = thread.join();
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop_threads();
    }
}

/// The clock of the processor time that a thread takes.
fn clock_of(thread: &JoinHandle<()>) -> Option<libc::clockid_t> {
    let mut clock = 0;
    // SAFETY: the thread is not joined as long as its handle is there, and the pointer is valid
    // for a write.
    let known = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &mut clock) };
    (known == 0).then_some(clock)
}
