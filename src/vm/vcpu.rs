//! A vCPU: its registers at the start, its thread, and the exits that the thread handles.

mod gate;
mod run;
mod threads;

use std::sync::Arc;

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::boot::Entry;
use super::cpuid::{self, Topology};
use super::events::Events;
use super::kvm::KvmVm;
use super::{layout, memory};
use crate::devices::bus::Bus;
use crate::{Error, Result};

pub(crate) use gate::Gate;
pub(crate) use run::install_kick_handler;
pub(crate) use threads::Vcpus;

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
