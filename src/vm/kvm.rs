//! KVM's virtual machine: interrupt controllers in the kernel, interrupt routing, irqfds and
//! ioeventfds.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use super::layout;
use crate::devices::{GuestMemory, Hypervisor, Msi};
use crate::{Error, Result};

/// Pins of the I/O APIC: the interrupts below this number are wired, those from it on are MSIs.
const IOAPIC_PINS: u32 = 24;
/// KVM_MAX_IRQ_ROUTES of include/linux/kvm_host.h: interrupt numbers lie below it.
const MAX_GSI: u32 = 4096;

/// A KVM virtual machine with guest memory and interrupt controllers, but no vCPUs.
pub(crate) struct KvmVm {
    fd: VmFd,
    memory: Arc<GuestMemory>,
    routes: Mutex<Routes>,
}

/// The interrupt routing table, of which KVM only ever takes the whole.
#[derive(Default)]
struct Routes {
    /// Interrupt numbers given out, with the message each sends once it is routed.
    msis: BTreeMap<u32, Option<kvm_irq_routing_msi>>,
}

impl KvmVm {
    /// Creates the virtual machine and gives it its memory.
    pub(crate) fn new(kvm: &Kvm, memory: Arc<GuestMemory>) -> Result<Arc<KvmVm>> {
        let failed =
            |what: &'static str| move |error| Error::failed(format!("KVM cannot {what}: {error}"));
        let fd = retry_interrupted(|| kvm.create_vm()).map_err(failed("create a VM"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(failed("place its identity map"))?;
        fd.set_tss_address(layout::KVM_TSS)
            .map_err(failed("place its TSS"))?;
        fd.create_irq_chip()
            .map_err(failed("create the interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit)
            .map_err(failed("create the interval timer"))?;

        for (slot, region) in memory.iter().enumerate() {
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|error| Error::failed(format!("guest memory has no address: {error}")))?;
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: the range is a whole mapping of `memory`, which lives as long as the VM
            // (both are fields of the same struct), and slots do not overlap in the guest.
            unsafe { fd.set_user_memory_region(region) }.map_err(failed("map guest memory"))?;
        }
        Ok(Arc::new(KvmVm {
            fd,
            memory,
            routes: Mutex::default(),
        }))
    }

    /// KVM's file descriptor of the VM.
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The guest's memory.
    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Wires an eventfd to a pin of the I/O APIC: signalling it is one edge.
    pub(crate) fn wire(&self, irq: u32) -> Result<EventFd> {
        debug_assert!(irq < IOAPIC_PINS);
        let failed =
            |error: io::Error| Error::failed(format!("cannot wire interrupt {irq}: {error}"));
        let eventfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
        self.fd
            .register_irqfd(&eventfd, irq)
            .map_err(|error| failed(error.into()))?;
        Ok(eventfd)
    }

    /// A panic elsewhere leaves the table whole (every change is one insert), so a poisoned lock
    /// is taken all the same: the other devices go on.
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Routes {
    fn apply(&self, fd: &VmFd) -> io::Result<()> {
        let wired = (0..IOAPIC_PINS).flat_map(|gsi| {
            let pic = match gsi {
                0..8 => Some(irqchip_entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
                8..16 => Some(irqchip_entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
                _ => None,
            };
            pic.into_iter()
                .chain([irqchip_entry(gsi, KVM_IRQCHIP_IOAPIC, gsi)])
        });
        let messages = self.msis.iter().filter_map(|(&gsi, msi)| {
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi = (*msi)?;
            Some(entry)
        });
        let entries: Vec<_> = wired.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|error| {
            io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!("{} routes: {error:?}", entries.len()),
            )
        })?;
        fd.set_gsi_routing(&table).map_err(io::Error::from)
    }
}

fn irqchip_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

/// Creating a VM takes long enough to meet a signal.
fn retry_interrupted<T>(
    mut call: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    loop {
        match call() {
            Err(error) if error.errno() == libc::EINTR => continue,
            result => return result,
        }
    }
}

/// What devices see of the VM.
pub(crate) struct KvmHypervisor(pub(crate) Arc<KvmVm>);

impl Hypervisor for KvmHypervisor {
    fn msi(&self) -> io::Result<Box<dyn Msi>> {
        let eventfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let mut routes = self.0.routes();
        let gsi = (IOAPIC_PINS..MAX_GSI)
            .find(|gsi| !routes.msis.contains_key(gsi))
            .ok_or_else(|| io::Error::other(format!("all {MAX_GSI} interrupts are in use")))?;
        routes.msis.insert(gsi, None);
        drop(routes);
        Ok(Box::new(KvmMsi {
            vm: Arc::clone(&self.0),
            gsi,
            eventfd,
            connected: Mutex::new(false),
        }))
    }

    fn add_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        self.0
            .fd
            .register_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)
    }

    fn remove_doorbell(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        self.0
            .fd
            .unregister_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)
    }
}

/// One MSI: an interrupt number in the routing table and the irqfd that raises it.
struct KvmMsi {
    vm: Arc<KvmVm>,
    gsi: u32,
    eventfd: EventFd,
    connected: Mutex<bool>,
}

impl KvmMsi {
    fn connected(&self) -> MutexGuard<'_, bool> {
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Msi for KvmMsi {
    fn route(&self, address: u64, data: u32) -> io::Result<()> {
        let mut connected = self.connected();
        let msi = kvm_irq_routing_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        let mut routes = self.vm.routes();
        routes.msis.insert(self.gsi, Some(msi));
        routes.apply(&self.vm.fd)?;
        drop(routes);
        if !*connected {
            self.vm
                .fd
                .register_irqfd(&self.eventfd, self.gsi)
                .map_err(io::Error::from)?;
            *connected = true;
        }
        Ok(())
    }

    fn unroute(&self) -> io::Result<()> {
        let mut connected = self.connected();
        if *connected {
            self.vm
                .fd
                .unregister_irqfd(&self.eventfd, self.gsi)
                .map_err(io::Error::from)?;
            *connected = false;
        }
        Ok(())
    }

    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }
}

impl Drop for KvmMsi {
    fn drop(&mut self) {
        if let Err(error) = self.unroute() {
            tracing::warn!("interrupt {} stays connected: {error}", self.gsi);
        }
        // The number is free again; the route itself goes with the next change of the table.
        self.vm.routes().msis.remove(&self.gsi);
    }
}
