//! The Queue Notify addresses (section 4.1.4.4): eventfds that the hypervisor signals when the
//! driver writes there.

use std::sync::Arc;

use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use super::capabilities::{NOTIFY, NOTIFY_OFF_MULTIPLIER, PAGE};
use crate::devices::Hypervisor;
use crate::devices::throttle::Throttle;

/// The doorbells of an active device. They follow its BAR.
pub(super) struct Doorbells {
    hypervisor: Arc<dyn Hypervisor>,
    /// Where the BAR answers.
    bar: Option<u64>,
    /// In the order of their virtqueues.
    doorbells: Vec<Doorbell>,
    warnings: Throttle,
}

struct Doorbell {
    queue: u16,
    kick: EventFd,
    /// The address that the hypervisor watches.
    watched: Option<u64>,
}

impl Doorbell {
    /// Offset of its Queue Notify address in the notification structure.
    fn offset(&self) -> u64 {
        u64::from(self.queue) * NOTIFY_OFF_MULTIPLIER
    }
}

impl Doorbells {
    /// No doorbells, and no place for them.
    pub(super) fn new(hypervisor: Arc<dyn Hypervisor>) -> Self {
        Doorbells {
            hypervisor,
            bar: None,
            doorbells: Vec::new(),
            warnings: Throttle::default(),
        }
    }

    /// The BAR answers at `bar` from now on, or nowhere.
    pub(super) fn move_to(&mut self, bar: Option<u64>) {
        self.unwatch();
        self.bar = bar;
        self.watch();
    }

    /// Hangs up doorbells: the virtqueues' indices, rising, and what to signal.
    pub(super) fn start(&mut self, kicks: impl IntoIterator<Item = (u16, EventFd)>) {
        self.stop();
        self.doorbells
            .extend(kicks.into_iter().map(|(queue, kick)| Doorbell {
                queue,
                kick,
                watched: None,
            }));
        self.watch();
    }

    /// Takes all doorbells away.
    pub(super) fn stop(&mut self) {
        self.unwatch();
        self.doorbells.clear();
    }

    /// A notification reached us as a write at `offset` into the notification structure, because
    /// the hypervisor does not watch the address. Like the hypervisor, this goes by the address:
    /// the value, which is the same index, is not looked at.
    pub(super) fn ring(&self, offset: u64) {
        let found = self
            .doorbells
            .binary_search_by_key(&offset, Doorbell::offset)
            .ok()
            .and_then(|index| self.doorbells.get(index));
        if let Some(doorbell) = found {
            // Fails only if the counter is at its end: then the device will look anyway.
            let _ = doorbell.kick.write(1);
        }
    }

    fn watch(&mut self) {
        let Some(bar) = self.bar else {
            return;
        };
        for doorbell in &mut self.doorbells {
            let address = bar + NOTIFY * PAGE + doorbell.offset();
            match self.hypervisor.add_doorbell(address, &doorbell.kick) {
                Ok(()) => doorbell.watched = Some(address),
                // Slower, but the write still reaches us: see `ring`.
                Err(error) => {
                    if let Some(held_back) = self.warnings.pass() {
                        warn!(%error, held_back, "notifications at {address:#x} take the slow way");
                    }
                }
            }
        }
    }

    fn unwatch(&mut self) {
        for doorbell in &mut self.doorbells {
            if let Some(address) = doorbell.watched.take()
                && let Err(error) = self.hypervisor.remove_doorbell(address, &doorbell.kick)
                && let Some(held_back) = self.warnings.pass()
            {
                warn!(%error, held_back, "a doorbell at {address:#x} cannot be removed");
            }
        }
    }
}
