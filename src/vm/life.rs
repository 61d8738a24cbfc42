//! What is known of a VM's life: whether it runs, is paused, has booted; and who is told.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Publish;
use super::vcpu::Gate;
use crate::control::messages::{Event, State};

/// What the threads of a VM share about its life.
pub(crate) struct Life {
    started: Instant,
    state: AtomicU8,
    told: Mutex<Told>,
    /// Of the machine that runs.
    gate: Mutex<Option<Arc<Gate>>>,
}

#[derive(Default)]
struct Told {
    booted: bool,
    publish: Option<Publish>,
}

const RUNNING: u8 = 0;
const PAUSED: u8 = 1;
const STOPPING: u8 = 2;

impl Life {
    pub(crate) fn new() -> Life {
        Life {
            started: Instant::now(),
            state: AtomicU8::new(RUNNING),
            told: Mutex::default(),
            gate: Mutex::default(),
        }
    }

    /// From now on events go there, the boot among them if it has been already.
    pub(crate) fn tell(&self, mut publish: Publish) {
        let mut told = self.told();
        if told.booted {
            publish(Event::Booted);
        }
        told.publish = Some(publish);
    }

    /// Tells of an event. It never blocks.
    pub(crate) fn publish(&self, event: Event) {
        let mut told = self.told();
        match event {
            Event::Booted => told.booted = true,
            Event::Rebooted => told.booted = false,
            _ => {}
        }
        if let Some(publish) = &mut told.publish {
            publish(event);
        }
    }

    /// Whether the guest has told that it is up.
    pub(crate) fn booted(&self) -> bool {
        self.told().booted
    }

    /// What the VM is doing.
    pub(crate) fn state(&self) -> State {
        match self.state.load(Ordering::SeqCst) {
            PAUSED => State::Paused,
            STOPPING => State::Stopping,
            _ => State::Running,
        }
    }

    pub(crate) fn set_state(&self, state: State) {
        let state = match state {
            State::Running => RUNNING,
            State::Paused => PAUSED,
            State::Stopping => STOPPING,
        };
        self.state.store(state, Ordering::SeqCst);
    }

    /// How long ago it was started.
    pub(crate) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// The gate of the machine that runs from now on.
    pub(crate) fn set_gate(&self, gate: &Arc<Gate>) {
        *self.gate.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(gate));
    }

    /// The gate of the machine that runs, or ran last.
    pub(crate) fn gate(&self) -> Option<Arc<Gate>> {
        self.gate
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Every change is complete in itself, so a poisoned lock is taken all the same.
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_boot_is_told_once_whether_somebody_listened_already_or_not() {
        let (sender, events) = mpsc::channel();
        let life = Life::new();
        life.publish(Event::Booted);
        assert!(life.booted());
        life.tell(Box::new(move |event| sender.send(event).unwrap()));
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [Event::Booted]);
        life.publish(Event::Rebooted);
        assert!(!life.booted());
        life.publish(Event::Booted);
        let told: Vec<_> = events.try_iter().collect();
        assert_eq!(told, [Event::Rebooted, Event::Booted]);
    }
}
