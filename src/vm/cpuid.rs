//! What CPUID tells the guest: what KVM supports, with the topology of this VM, and with clock
//! frequencies so that the guest calibrates nothing.
//!
//! Sources: Intel SDM volume 2A "CPUID", AMD APM volume 3 appendix E,
//! Documentation/virt/kvm/x86/cpuid.rst of the kernel.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Frequency of the local APIC's timer in KVM (APIC_BUS_CYCLE_NS in arch/x86/kvm/lapic.h), kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The leaf that hypervisors use for their frequencies, and the last one we offer.
const HYPERVISOR_TIMING_LEAF: u32 = 0x4000_0010;
const HYPERVISOR_LEAF: u32 = 0x4000_0000;

/// Where a vCPU stands in the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Topology {
    /// Index of the vCPU, which is its local APIC id too.
    pub(crate) id: u32,
    /// Number of vCPUs: one socket, each a core with one thread.
    pub(crate) cpus: u32,
}

impl Topology {
    /// Bits of the APIC id that number the cores of the socket.
    fn core_bits(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }
}

/// Turns what KVM supports into what vCPU `topology.id` shows. `tsc_khz` is the frequency of its
/// time-stamp counter, `tsc_deadline` whether KVM emulates the deadline timer.
pub(crate) fn for_vcpu(
    supported: &CpuId,
    topology: Topology,
    tsc_khz: Option<u32>,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
    let vendor = leaves.iter().find(|leaf| leaf.function == 0);
    let intel = vendor.is_some_and(|leaf| vendor_of(leaf) == *b"GenuineIntel");

    // Leaves that are made from scratch below, and the extended topology leaf 0x1f, which would
    // have to agree with 0xb and says nothing more for one thread a core.
    leaves.retain(|leaf| {
        !matches!(
            leaf.function,
            0xb | 0x15 | 0x16 | 0x1f | HYPERVISOR_TIMING_LEAF
        )
    });
    for leaf in &mut leaves {
        patch(leaf, topology, tsc_deadline);
        if !intel {
            patch_amd(leaf, topology);
        }
    }
    leaves.extend(topology_leaves(topology));
    if let Some(tsc_khz) = tsc_khz {
        leaves.push(kvm_cpuid_entry2 {
            function: HYPERVISOR_TIMING_LEAF,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
        raise_limit(&mut leaves, HYPERVISOR_LEAF, HYPERVISOR_TIMING_LEAF);
        if intel {
            leaves.extend(intel_frequency_leaves(tsc_khz));
            raise_limit(&mut leaves, 0, 0x16);
        }
    }
    raise_limit(&mut leaves, 0, 0xb);
    leaves
}

/// One past the last guest-physical address of these processors: the width in bits is in the low
/// byte of leaf 0x80000008, 36 where there is none.
pub(crate) fn address_end(supported: &CpuId) -> u64 {
    let mut leaves = supported.as_slice().iter();
    let leaf = leaves.find(|leaf| leaf.function == 0x8000_0008);
    let bits = leaf.map_or(0, |leaf| leaf.eax & 0xff);
    1 << if bits == 0 { 36 } else { bits.min(52) }
}

fn vendor_of(leaf: &kvm_cpuid_entry2) -> [u8; 12] {
    let mut vendor = [0; 12];
    vendor[..4].copy_from_slice(&leaf.ebx.to_le_bytes());
    vendor[4..8].copy_from_slice(&leaf.edx.to_le_bytes());
    vendor[8..].copy_from_slice(&leaf.ecx.to_le_bytes());
    vendor
}

/// The first leaf of a range says in EAX which is the last one.
fn raise_limit(leaves: &mut [kvm_cpuid_entry2], first: u32, last: u32) {
    if let Some(leaf) = leaves.iter_mut().find(|leaf| leaf.function == first) {
        leaf.eax = leaf.eax.max(last);
    }
}

fn patch(leaf: &mut kvm_cpuid_entry2, topology: Topology, tsc_deadline: bool) {
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;
    const X2APIC: u32 = 1 << 21;
    const HTT: u32 = 1 << 28;
    let Topology { id, cpus } = topology;
    match leaf.function {
        0x1 => {
            leaf.ebx = (leaf.ebx & 0xffff) | cpus.min(255) << 16 | id << 24;
            leaf.ecx |= HYPERVISOR | X2APIC;
            leaf.ecx = set(leaf.ecx, TSC_DEADLINE, tsc_deadline);
            leaf.edx = set(leaf.edx, HTT, cpus > 1);
        }
        // Deterministic cache parameters: who shares which cache, and how many cores there are.
        0x4 | 0x8000_001d if leaf.eax & 0x1f != 0 => {
            let level = leaf.eax >> 5 & 0x7;
            let sharing = if level >= 3 {
                (1 << topology.core_bits()) - 1
            } else {
                0
            };
            leaf.eax = (leaf.eax & 0x3fff) | sharing << 14;
            if leaf.function == 0x4 {
                leaf.eax |= ((1 << topology.core_bits()) - 1_u32).min(63) << 26;
            }
        }
        _ => {}
    }
}

/// The leaves that AMD's processors (and those of its kin) describe their cores with.
fn patch_amd(leaf: &mut kvm_cpuid_entry2, topology: Topology) {
    let Topology { id, cpus } = topology;
    match leaf.function {
        // Number of cores, and how many bits of the APIC id number them.
        0x8000_0008 => {
            leaf.ecx = (leaf.ecx & !0xf0ff) | topology.core_bits() << 12 | (cpus - 1).min(255);
        }
        // The legacy flag that goes with more than one core.
        0x8000_0001 => leaf.ecx = set(leaf.ecx, 1 << 1, cpus > 1),
        // APIC id, core id, one thread a core, one node.
        0x8000_001e => {
            leaf.eax = id;
            leaf.ebx = id & 0xff;
            leaf.ecx = 0;
        }
        _ => {}
    }
}

fn set(register: u32, bits: u32, on: bool) -> u32 {
    if on {
        register | bits
    } else {
        register & !bits
    }
}

/// Leaf 0xb: a level for the one thread of a core, then a level for the cores of the socket.
fn topology_leaves(topology: Topology) -> [kvm_cpuid_entry2; 2] {
    const LEVEL_THREAD: u32 = 1 << 8;
    const LEVEL_CORE: u32 = 2 << 8;
    let leaf = |index, eax, ebx, level| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: level | index,
        edx: topology.id,
        ..Default::default()
    };
    [
        leaf(0, 0, 1, LEVEL_THREAD),
        leaf(1, topology.core_bits(), topology.cpus, LEVEL_CORE),
    ]
}

/// Leaves 0x15 and 0x16: Linux takes the crystal of 0x15 for the APIC timer's clock, so the
/// crystal is the APIC bus clock and the ratio makes the TSC's frequency of it.
fn intel_frequency_leaves(tsc_khz: u32) -> [kvm_cpuid_entry2; 2] {
    let tsc_mhz = tsc_khz / 1000;
    [
        kvm_cpuid_entry2 {
            function: 0x15,
            eax: APIC_BUS_KHZ,
            ebx: tsc_khz,
            ecx: APIC_BUS_KHZ * 1000,
            ..Default::default()
        },
        kvm_cpuid_entry2 {
            function: 0x16,
            eax: tsc_mhz,
            ebx: tsc_mhz,
            ecx: 100,
            ..Default::default()
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE_OF_THREE: Topology = Topology { id: 1, cpus: 3 };

    fn host(vendor: &[u8; 12]) -> CpuId {
        let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        CpuId::from_entries(&[
            kvm_cpuid_entry2 {
                ebx: word(0),
                edx: word(4),
                ecx: word(8),
                ..leaf(0, 0x7)
            },
            kvm_cpuid_entry2 {
                ebx: 7 << 24 | 0x800,
                ..leaf(1, 0)
            },
            leaf(4, 1 << 5 | 1),
            kvm_cpuid_entry2 {
                index: 3,
                ..leaf(4, 3 << 5 | 3)
            },
            leaf(0xb, 99),
            leaf(HYPERVISOR_LEAF, 0x4000_0001),
            leaf(0x8000_0008, 0),
        ])
        .unwrap()
    }

    fn leaf(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = leaves
            .iter()
            .filter(|l| l.function == function && l.index == index);
        let leaf = *found.next().unwrap();
        assert!(
            found.next().is_none(),
            "leaf {function:#x}.{index} stands twice"
        );
        leaf
    }

    fn intel() -> Vec<kvm_cpuid_entry2> {
        for_vcpu(&host(b"GenuineIntel"), ONE_OF_THREE, Some(2_600_000), true)
    }

    #[test]
    fn a_vcpu_shows_its_own_apic_id_and_that_it_is_virtual() {
        let one = leaf(&intel(), 1, 0);
        assert_eq!(one.ebx, 1 << 24 | 3 << 16 | 0x800);
        assert_ne!(one.ecx & 1 << 31, 0);
        assert_ne!(one.edx & 1 << 28, 0);
    }

    #[test]
    fn the_topology_is_one_thread_a_core_in_one_socket() {
        let (thread, core) = (leaf(&intel(), 0xb, 0), leaf(&intel(), 0xb, 1));
        assert_eq!((thread.eax, thread.ebx, thread.edx), (0, 1, 1));
        assert_eq!((core.eax, core.ebx, core.edx), (2, 3, 1));
    }

    #[test]
    fn only_the_last_level_cache_is_shared() {
        assert_eq!(leaf(&intel(), 4, 0).eax >> 14 & 0xfff, 0);
        assert_eq!(leaf(&intel(), 4, 3).eax >> 14 & 0xfff, 3);
    }

    #[test]
    fn on_intel_the_crystal_and_its_ratio_give_the_tsc_frequency() {
        let timing = leaf(&intel(), 0x15, 0);
        let hz = u64::from(timing.ecx) * u64::from(timing.ebx) / u64::from(timing.eax);
        assert_eq!(hz, 2_600_000_000);
        assert_eq!(leaf(&intel(), 0, 0).eax, 0x16);
    }

    #[test]
    fn elsewhere_the_hypervisor_leaf_gives_the_frequencies() {
        let leaves = for_vcpu(&host(b"AuthenticAMD"), ONE_OF_THREE, Some(2_600_000), true);
        assert!(leaves.iter().all(|leaf| leaf.function != 0x15));
        assert_eq!(leaf(&leaves, HYPERVISOR_TIMING_LEAF, 0).eax, 2_600_000);
        assert_eq!(
            leaf(&leaves, HYPERVISOR_LEAF, 0).eax,
            HYPERVISOR_TIMING_LEAF
        );
        assert_eq!(leaf(&leaves, 0x8000_0008, 0).ecx, 2 << 12 | 2);
    }

    #[test]
    fn the_address_width_limits_memory() {
        assert_eq!(address_end(&host(b"GenuineIntel")), 1 << 36);
        let leaf = kvm_cpuid_entry2 {
            function: 0x8000_0008,
            eax: 0x3027,
            ..Default::default()
        };
        assert_eq!(address_end(&CpuId::from_entries(&[leaf]).unwrap()), 1 << 39);
    }

    #[test]
    fn without_a_deadline_timer_none_is_shown() {
        let leaves = for_vcpu(&host(b"GenuineIntel"), ONE_OF_THREE, None, false);
        assert_eq!(leaf(&leaves, 1, 0).ecx & 1 << 24, 0);
    }
}
