//! MSI-X (PCI 3.0 section 6.8.2): the table of messages, the pending bits, and their way to the
//! hypervisor.

use std::mem;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::event;
use crate::devices::pci::lock;
use crate::devices::throttle::Throttle;
use crate::devices::{Hypervisor, Msi};

/// Capability ID of MSI-X.
const CAPABILITY_ID: u8 = 0x11;
/// Length of the capability, in bytes.
pub const CAPABILITY_LEN: u8 = 12;
/// Offset of the message control register in the capability.
pub const CONTROL: u8 = 2;
/// Message control: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Most vectors that a table holds.
pub const MAX_VECTORS: u16 = 2048;
/// Length of a table entry, in bytes.
pub const ENTRY_LEN: u64 = 16;
/// Vector control: the vector is masked.
const MASK: u32 = 1;

/// The MSI-X vectors of a function.
///
/// A vector takes an interrupt of the hypervisor only once an event is mapped to it
/// ([`Msix::claim`]), and is routed only while it may be delivered. A signal takes no lock while
/// its vector is routed.
pub struct Msix {
    hypervisor: Arc<dyn Hypervisor>,
    vectors: Box<[Vector]>,
    /// [`Table::enabled`], for readers without the lock.
    enabled: AtomicBool,
    table: Mutex<Table>,
    warnings: Throttle,
}

/// The part of a vector that signalling needs.
#[derive(Default)]
struct Vector {
    /// Odd while the eventfd is routed. Counts on at each change, before the route is taken away
    /// and after it is there, so that a signal notices a change under its feet.
    epoch: AtomicU32,
    msi: OnceLock<Box<dyn Msi>>,
}

impl Vector {
    /// Whether somebody outside has signalled it, and nothing has come of that yet.
    fn is_signalled(&self) -> bool {
        let msi = self.msi.get();
        msi.is_some_and(|msi| event::is_signalled(msi.eventfd()))
    }
}

struct Table {
    enabled: bool,
    function_mask: bool,
    entries: Box<[Entry]>,
}

#[derive(Clone, Copy)]
struct Entry {
    message: Message,
    masked: bool,
    pending: bool,
    /// The message that the vector's eventfd is routed to.
    routed: Option<Message>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Message {
    address: u64,
    data: u32,
}

impl Entry {
    /// The four registers of the entry (section 6.8.2).
    fn registers(&self) -> [u32; 4] {
        let Message { address, data } = self.message;
        let control = if self.masked { MASK } else { 0 };
        [address as u32, (address >> 32) as u32, data, control]
    }

    fn set_register(&mut self, index: u64, value: u32) {
        let address = &mut self.message.address;
        match index {
            0 => *address = *address & !0xffff_ffff | u64::from(value),
            1 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
            2 => self.message.data = value,
            _ => self.masked = value & MASK != 0,
        }
    }
}

impl Msix {
    /// `len` vectors, masked (section 6.8.2: the state after reset), MSI-X being off; at most
    /// [`MAX_VECTORS`].
    pub fn new(len: u16, hypervisor: Arc<dyn Hypervisor>) -> Self {
        let entry = Entry {
            message: Message::default(),
            masked: true,
            pending: false,
            routed: None,
        };
        let len = len.min(MAX_VECTORS);
        Msix {
            hypervisor,
            vectors: (0..len).map(|_| Vector::default()).collect(),
            enabled: AtomicBool::new(false),
            table: Mutex::new(Table {
                enabled: false,
                function_mask: false,
                entries: vec![entry; len.into()].into(),
            }),
            warnings: Throttle::default(),
        }
    }

    /// The capability's registers and which bits of them the guest may write. The table and the
    /// pending bits are at these offsets, multiples of 8, in BAR 0.
    pub fn capability(&self, table: u32, pending: u32) -> ([u8; 12], [u8; 4]) {
        let mut registers = [0; CAPABILITY_LEN as usize];
        let last = self.vectors.len().saturating_sub(1) as u16;
        registers[0] = CAPABILITY_ID;
        registers[2..4].copy_from_slice(&last.to_le_bytes());
        registers[4..8].copy_from_slice(&table.to_le_bytes());
        registers[8..12].copy_from_slice(&pending.to_le_bytes());
        let [low, high] = (ENABLE | FUNCTION_MASK).to_le_bytes();
        (registers, [0, 0, low, high])
    }

    /// The guest wrote the message control register.
    pub fn set_control(&self, control: u16) {
        let mut table = lock(&self.table);
        table.enabled = control & ENABLE != 0;
        table.function_mask = control & FUNCTION_MASK != 0;
        self.enabled.store(table.enabled, Ordering::SeqCst);
        for index in 0..self.vectors.len() {
            self.update(&mut table, index);
        }
    }

    /// Whether MSI-X is on.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Prepares `vector` for being signalled. False if there is no such vector or the hypervisor
    /// has no interrupt left.
    pub fn claim(&self, vector: u16) -> bool {
        let index = usize::from(vector);
        let Some(Vector { msi, .. }) = self.vectors.get(index) else {
            return false;
        };
        let mut table = lock(&self.table);
        if msi.get().is_none() {
            match self.hypervisor.msi() {
                // Set nowhere else, and the table is locked: it is empty still.
                Ok(new) => drop(msi.set(new)),
                Err(error) => {
                    self.warn("no interrupt for an MSI-X vector", vector, &error);
                    return false;
                }
            }
        }
        self.update(&mut table, index)
    }

    /// Sends the message of `vector`, or keeps it pending while the vector is masked. Nothing
    /// happens while MSI-X is off.
    pub fn signal(&self, vector: u16) {
        let index = usize::from(vector);
        let Some(Vector { epoch, msi }) = self.vectors.get(index) else {
            return;
        };
        let before = epoch.load(Ordering::SeqCst);
        if before % 2 == 1
            && let Some(msi) = msi.get()
        {
            send(msi.as_ref());
            if epoch.load(Ordering::SeqCst) == before {
                return;
            }
            // The guest masked the vector meanwhile. The signal may have found no route, so it
            // goes the slow way again: an interrupt too many does no harm, a lost one hangs.
        }
        let mut table = lock(&self.table);
        if !table.enabled {
            return;
        }
        if let Some(entry) = table.entries.get_mut(index) {
            entry.pending = true;
        }
        self.update(&mut table, index);
    }

    /// What sends the message of `vector` when it is signalled, for somebody outside of this
    /// process. While the vector is masked, the eventfd keeps the signal, and the interrupt is
    /// pending. `None` while MSI-X is off.
    pub fn eventfd(&self, vector: u16) -> Option<EventFd> {
        let msi = self.vectors.get(usize::from(vector))?.msi.get()?;
        let enabled = self.enabled();
        enabled.then(|| msi.eventfd().try_clone().ok()).flatten()
    }

    /// Forgets what is pending: the device was reset.
    pub fn clear_pending(&self) {
        let mut table = lock(&self.table);
        for (entry, vector) in table.entries.iter_mut().zip(&self.vectors) {
            entry.pending = false;
            if entry.routed.is_none()
                && let Some(msi) = vector.msi.get()
            {
                event::take(msi.eventfd());
            }
        }
    }

    /// Reads the table; zero past its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = lock(&self.table);
        for (byte, offset) in data.iter_mut().zip(offset..) {
            let entry = table.entries.get((offset / ENTRY_LEN) as usize);
            let register = (offset % ENTRY_LEN / 4) as usize;
            *byte = entry.map_or(0, |entry| {
                entry.registers()[register].to_le_bytes()[(offset % 4) as usize]
            });
        }
    }

    /// Writes the table: aligned dwords and quadwords, as section 6.8.2 demands of software;
    /// other accesses are dropped.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut table = lock(&self.table);
        let index = (offset / ENTRY_LEN) as usize;
        let Some(entry) = table.entries.get_mut(index) else {
            return;
        };
        let (dwords, _) = data.as_chunks();
        for (dword, register) in dwords.iter().zip(offset % ENTRY_LEN / 4..) {
            entry.set_register(register, u32::from_le_bytes(*dword));
        }
        self.update(&mut table, index);
    }

    /// Reads the pending bits; zero past their end. They are read-only.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let table = lock(&self.table);
        for (byte, offset) in data.iter_mut().zip(offset..) {
            let entries = table.entries.chunks(8).nth(offset as usize);
            let vectors = self.vectors.chunks(8).nth(offset as usize);
            *byte = entries
                .unwrap_or_default()
                .iter()
                .zip(vectors.unwrap_or_default())
                .rev()
                .fold(0, |bits, (entry, vector)| {
                    let kept = entry.routed.is_none() && vector.is_signalled();
                    bits << 1 | u8::from(entry.pending || kept)
                });
        }
    }

    /// Makes the route of a vector what the registers say, and sends what was pending. False if
    /// the hypervisor refuses.
    fn update(&self, table: &mut Table, index: usize) -> bool {
        let open = table.enabled && !table.function_mask;
        let (Some(vector), Some(entry)) = (self.vectors.get(index), table.entries.get_mut(index))
        else {
            return false;
        };
        let Some(msi) = vector.msi.get() else {
            return true;
        };
        let wanted = (open && !entry.masked).then_some(entry.message);
        if entry.routed != wanted {
            if entry.routed.take().is_some() {
                vector.epoch.fetch_add(1, Ordering::SeqCst);
                if let Err(error) = msi.unroute() {
                    self.warn("an MSI-X vector cannot be unrouted", index as u16, &error);
                }
            }
            if let Some(Message { address, data }) = wanted {
                // Signalled while there was no route. What is signalled from here on, KVM finds.
                entry.pending |= event::take(msi.eventfd());
                if let Err(error) = msi.route(address, data) {
                    self.warn("an MSI-X vector cannot be routed", index as u16, &error);
                    return false;
                }
                vector.epoch.fetch_add(1, Ordering::SeqCst);
                entry.routed = wanted;
            }
        }
        if entry.routed.is_some() && mem::take(&mut entry.pending) {
            send(msi.as_ref());
        }
        true
    }

    fn warn(&self, what: &str, vector: u16, error: &std::io::Error) {
        if let Some(held_back) = self.warnings.pass() {
            warn!(vector, %error, held_back, "{what}");
        }
    }
}

fn send(msi: &dyn Msi) {
    // Fails only if the counter is at its end: then the interrupt is on its way already.
    let _ = msi.eventfd().write(1);
}

#[cfg(test)]
mod tests;
