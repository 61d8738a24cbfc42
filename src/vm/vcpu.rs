//! A vCPU: its registers at the start, its thread, and the exits that the thread handles.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::{
    CpuId, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs,
    kvm_fpu, kvm_msr_entry, kvm_run,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::boot::Entry;
use super::cpuid::{self, Topology};
use super::events::{Events, Outcome};
use super::kvm::KvmVm;
use super::{layout, memory};
use crate::devices::bus::Bus;
use crate::{Error, Result};

/// What a running vCPU needs: its VM, whose memory stays mapped while a vCPU can run, the buses
/// that its exits go to, and where it reports the end of the VM.
pub(crate) struct World {
    pub(crate) _vm: Arc<KvmVm>,
    pub(crate) ports: Bus,
    pub(crate) memory: Bus,
    pub(crate) events: Arc<Events>,
}

/// What all vCPUs of a VM share before they run.
pub(crate) struct VcpuModel {
    supported: CpuId,
    tsc_deadline: bool,
    cpus: u32,
}

impl VcpuModel {
    /// Asks KVM what its vCPUs can be.
    pub(crate) fn new(kvm: &Kvm, cpus: u32) -> Result<VcpuModel> {
        let most = kvm.get_max_vcpus();
        if cpus as usize > most {
            return Err(Error::usage(format!(
                "`cpus` is {cpus}, KVM on this host takes at most {most}"
            ))
            .help("lower `cpus`")
            .about("cpus"));
        }
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| {
                Error::failed(format!(
                    "KVM does not tell which CPUID it supports: {error}"
                ))
            })?;
        Ok(VcpuModel {
            supported,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            cpus,
        })
    }

    /// Checks that the vCPUs can address guest memory of this size.
    pub(crate) fn check_memory(&self, size: u64) -> Result<()> {
        let limit = cpuid::address_end(&self.supported);
        let end = memory::ranges(size)
            .last()
            .map_or(0, |(start, len)| start + len);
        if end <= limit {
            return Ok(());
        }
        let most = limit.saturating_sub(layout::HOLE_END - layout::HOLE_START) >> 30;
        Err(Error::usage(format!(
            "`memory` is {} GiB, this host's processors address at most {most} GiB of it",
            size >> 30
        ))
        .help("lower `memory`")
        .about("memory"))
    }

    /// Number of vCPUs.
    pub(crate) fn cpus(&self) -> u32 {
        self.cpus
    }

    /// Creates vCPU `id`. The first one starts at `entry`; the others wait for the guest to
    /// start them (INIT and SIPI, which KVM handles).
    pub(crate) fn create(&self, vm: &KvmVm, id: u32, entry: &Entry) -> Result<VcpuFd> {
        let failed = |what: &'static str| {
            move |error| Error::failed(format!("KVM cannot {what} vCPU {id}: {error}"))
        };
        let fd = vm
            .fd()
            .create_vcpu(u64::from(id))
            .map_err(failed("create"))?;
        let tsc_khz = fd.get_tsc_khz().ok().filter(|khz| *khz > 0);
        let topology = Topology {
            id,
            cpus: self.cpus,
        };
        let leaves = cpuid::for_vcpu(&self.supported, topology, tsc_khz, self.tsc_deadline);
        let leaves = CpuId::from_entries(&leaves)
            .map_err(|error| Error::failed(format!("too many CPUID leaves for KVM: {error:?}")))?;
        fd.set_cpuid2(&leaves).map_err(failed("set the CPUID of"))?;
        set_msrs(&fd).map_err(failed("set the MSRs of"))?;
        set_lapic(&fd).map_err(failed("set the local APIC of"))?;
        fd.set_fpu(&kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        })
        .map_err(failed("set the FPU of"))?;
        if id == 0 {
            let sregs = fd.get_sregs().map_err(failed("read the registers of"))?;
            fd.set_sregs(&entry.special(sregs))
                .map_err(failed("set the registers of"))?;
            fd.set_regs(&entry.general())
                .map_err(failed("set the registers of"))?;
        }
        Ok(fd)
    }
}

/// What firmware leaves in the MSRs: fast string instructions on, all memory write-back unless
/// page tables say otherwise (Intel SDM volume 3, 12.11.2.1).
fn set_msrs(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const IA32_MISC_ENABLE: (u32, u64) = (0x1a0, 1);
    const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);
    for (index, bits) in [IA32_MISC_ENABLE, MTRR_DEF_TYPE] {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let Ok(mut msrs) = Msrs::from_entries(&[entry]) else {
            continue;
        };
        // On top of KVM's own bits: some of the first one say what the PMU has not.
        let known = fd.get_msrs(&mut msrs)?;
        for msr in &mut msrs.as_mut_slice()[..known] {
            msr.data |= bits;
        }
        if known == 0 {
            tracing::debug!("this host's KVM has no MSR {index:#x}");
            continue;
        }
        if fd.set_msrs(&msrs)? == 0 {
            tracing::debug!("this host's KVM has no MSR {index:#x}");
        }
    }
    Ok(())
}

/// LINT0 takes the PIC's interrupts and LINT1 the NMI, as firmware leaves them
/// (MultiProcessor Specification 1.4, 3.6.2.1).
fn set_lapic(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const LVT_LINT0: (usize, u8) = (0x350, 0x7);
    const LVT_LINT1: (usize, u8) = (0x360, 0x4);
    let mut lapic = fd.get_lapic()?;
    for (register, mode) in [LVT_LINT0, LVT_LINT1] {
        // The delivery mode is bits 8 to 10 of the register; bit 16 masks it.
        lapic.regs[register + 1] = (lapic.regs[register + 1] as u8 & !0x7 | mode) as _;
        lapic.regs[register + 2] = (lapic.regs[register + 2] as u8 & !0x1) as _;
    }
    fd.set_lapic(&lapic)
}

thread_local! {
    /// The shared page of the vCPU that this thread runs, null in other threads.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that gets a vCPU thread out of the guest.
fn kick_signal() -> c_int {
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

/// The running vCPUs of a VM.
pub(crate) struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Vcpus {
    /// Starts a thread for each vCPU. The first one, which alone has something to run, starts
    /// last: the guest runs only once all threads are there.
    pub(crate) fn start(fds: Vec<VcpuFd>, world: World) -> Result<Vcpus> {
        let world = Arc::new(world);
        let mut vcpus = Vcpus {
            threads: Vec::with_capacity(fds.len()),
            stop: Arc::new(AtomicBool::new(false)),
        };
        for (id, fd) in fds.into_iter().enumerate().rev() {
            let (world, stop) = (Arc::clone(&world), Arc::clone(&vcpus.stop));
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(256 << 10)
                .spawn(move || run_reporting(id, fd, &world, &stop))
                .map_err(|error| {
                    Error::failed(format!("cannot start the thread of vCPU {id}: {error}"))
                        .help("raise the limit on threads (`ulimit -u`)")
                })?;
            vcpus.threads.push(thread);
        }
        Ok(vcpus)
    }

    /// Stops all vCPUs. When it returns, none runs guest code any more.
    pub(crate) fn stop(mut self) {
        self.stop_threads();
    }

    fn stop_threads(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in &self.threads {
            if let Err(error) = thread.kill(kick_signal()) {
                tracing::warn!("cannot signal a vCPU thread: {error}");
            }
        }
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

/// Runs a vCPU until it is stopped. Whatever else ends it ends the VM.
fn run_reporting(id: usize, mut fd: VcpuFd, world: &World, stop: &AtomicBool) {
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let page = RunPage::publish(&mut fd);
        let ended = run(id, &mut fd, world, stop);
        drop(page);
        ended
    }));
    let outcome =
        ran.unwrap_or_else(|_| Some(Outcome::Failed(format!("the thread of vCPU {id} panicked"))));
    if let Some(outcome) = outcome {
        world.events.end(outcome);
    }
}

/// Enters the guest until the vCPU is stopped (`None`) or cannot go on.
fn run(id: usize, fd: &mut VcpuFd, world: &World, stop: &AtomicBool) -> Option<Outcome> {
    while !stop.load(Ordering::SeqCst) {
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
    None
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
