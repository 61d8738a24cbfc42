//! One machine from its power-on to its end: built, started, stopped. A guest reboot builds the
//! next one around the same devices.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_ioctls::Kvm;

use super::boot::{self, BootFiles, Entry, Parameters};
use super::console::ConsoleSink;
use super::events::{Events, Outcome};
use super::kvm::{KvmHypervisor, KvmVm};
use super::vcpu::{Gate, VcpuModel, Vcpus, World};
use super::{acpi, layout};
use crate::config::Vm;
use crate::devices::bus::Bus;
use crate::devices::pci::{ConfigPorts, PciAddress, PciBus, Window};
use crate::devices::power::{self, KeyboardController, PowerButton, PowerEvents, PowerRegisters};
use crate::devices::pvpanic::PvPanic;
use crate::devices::serial::{self, Serial};
use crate::devices::virtio::{Device, pci::VirtioPci};
use crate::devices::{BusDevice, GuestMemory, Hypervisor};
use crate::{Error, Result};

/// A virtio device that outlives the machine it is plugged into.
pub(crate) type SharedDevice = Arc<Mutex<dyn Device>>;

/// A VM with its kernel in memory, before its devices are plugged in.
pub(crate) struct Loaded {
    vm: Arc<KvmVm>,
    model: VcpuModel,
    entry: Entry,
}

/// A machine that runs.
pub(crate) struct Machine {
    vcpus: Vcpus,
    pci: Arc<PciBus>,
    serial: Option<Arc<Serial<ConsoleSink>>>,
    button: PowerButton,
    events: Arc<Events>,
}

impl Loaded {
    /// Loads the kernel and what it is told into `memory`, which is all zeroes.
    pub(crate) fn new(
        kvm: &Kvm,
        config: &Vm,
        memory: Arc<GuestMemory>,
        files: &BootFiles,
    ) -> Result<Loaded> {
        let model = VcpuModel::new(kvm, config.cpus)?;
        model.check_memory(config.memory)?;
        let rsdp = acpi::write(&memory, &acpi::Machine::of(config))?;
        let cmdline = boot::cmdline(config, files.root_partition);
        let parameters = Parameters {
            memory_size: config.memory,
            cmdline: &cmdline,
            rsdp,
        };
        let entry = boot::load(&memory, files, &parameters)?;
        let vm = KvmVm::new(kvm, memory)?;
        Ok(Loaded { vm, model, entry })
    }

    /// Plugs the devices in and starts the vCPUs, unless they are `paused`. Without `console`
    /// there is no serial port.
    pub(crate) fn start(
        self,
        devices: &[SharedDevice],
        console: Option<ConsoleSink>,
        paused: bool,
    ) -> Result<Machine> {
        let events = Arc::new(Events::new().map_err(no_eventfd)?);
        let vm = &self.vm;
        let mut ports = Bus::new();
        let mut mmio = Bus::new();
        let mut at = |first: u16, count: u64, device: Arc<dyn BusDevice>| {
            ports.insert(u64::from(first)..u64::from(first) + count, device)
        };

        let power: Arc<dyn PowerEvents> = Arc::clone(&events) as _;
        at(
            layout::POWER_PORT,
            power::REGISTERS,
            Arc::new(PowerRegisters::new(Arc::clone(&power))),
        )?;
        at(
            layout::KEYBOARD_CONTROLLER_PORT,
            1,
            Arc::new(KeyboardController::new(power)),
        )?;
        let on_panic = Arc::clone(&events);
        let pvpanic = PvPanic::new(move || on_panic.end(Outcome::Panic));
        at(layout::PVPANIC_PORT, 1, Arc::new(pvpanic))?;
        let serial = match console {
            Some(output) => {
                let interrupt = vm.wire(layout::SERIAL_IRQ)?;
                let serial = Arc::new(Serial::new(interrupt, output).map_err(no_eventfd)?);
                at(
                    layout::SERIAL_PORT,
                    serial::PORTS.into(),
                    Arc::clone(&serial) as _,
                )?;
                Some(serial)
            }
            None => None,
        };
        let button = PowerButton::new(vm.wire(layout::POWER_BUTTON_IRQ)?);

        let hypervisor: Arc<dyn Hypervisor> = Arc::new(KvmHypervisor(Arc::clone(vm)));
        let (pci, _) = plug(devices, vm.memory(), &hypervisor)?;
        let pci = Arc::new(pci);
        at(
            layout::PCI_CONFIG_PORT,
            8,
            Arc::new(ConfigPorts::new(Arc::clone(&pci))),
        )?;
        mmio.insert(layout::PCI_WINDOW, Arc::new(Window::new(Arc::clone(&pci))))?;

        let fds = (0..self.model.cpus())
            .map(|id| self.model.create(vm, id, &self.entry))
            .collect::<Result<Vec<_>>>()?;
        let world = World {
            _vm: Arc::clone(vm),
            ports,
            memory: mmio,
            events: Arc::clone(&events),
        };
        let vcpus = Vcpus::start(fds, world, paused)?;
        Ok(Machine {
            vcpus,
            pci,
            serial,
            button,
            events,
        })
    }
}

/// A PCI bus with these devices on it in this order, and where each is.
pub(super) fn plug(
    devices: &[SharedDevice],
    memory: &Arc<GuestMemory>,
    hypervisor: &Arc<dyn Hypervisor>,
) -> Result<(PciBus, Vec<PciAddress>)> {
    let mut pci = PciBus::new(layout::PCI_WINDOW, devices.len());
    let mut addresses = Vec::with_capacity(devices.len());
    for device in devices {
        let transport = VirtioPci::new(
            Arc::clone(device),
            Arc::clone(memory),
            Arc::clone(hypervisor),
        )?;
        addresses.push(pci.add(Arc::new(transport))?);
    }
    Ok((pci, addresses))
}

fn no_eventfd(error: io::Error) -> Error {
    Error::failed(format!("cannot create an eventfd: {error}"))
        .help("raise the limit on open files (`ulimit -n`)")
}

impl Machine {
    /// The serial port, if there is one.
    pub(crate) fn serial(&self) -> Option<&Serial<ConsoleSink>> {
        self.serial.as_deref()
    }

    /// The power button.
    pub(crate) fn button(&self) -> &PowerButton {
        &self.button
    }

    /// Where the guest's end is reported.
    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    /// Has the vCPUs leave the guest and wait; [`Machine::gate`] tells when they do.
    pub(crate) fn pause(&self) {
        self.vcpus.pause();
    }

    /// Lets the vCPUs run again.
    pub(crate) fn resume(&self) {
        self.vcpus.resume();
    }

    /// Where the vCPUs wait while they are paused.
    pub(crate) fn gate(&self) -> &Arc<Gate> {
        self.vcpus.gate()
    }

    /// Stops the vCPUs, then the devices. When it returns, nothing touches guest memory, and
    /// every request that the guest made is complete.
    pub(crate) fn stop(self) {
        self.vcpus.stop();
        self.pci.shutdown();
    }
}

impl PowerEvents for Events {
    fn power_off(&self) {
        self.end(Outcome::PowerOff);
    }

    fn reset(&self) {
        self.end(Outcome::Reboot);
    }
}
