//! The thread that runs the VM: it stays with each machine to its end, and does what signals, keys
//! and orders say meanwhile.

mod keyboard;
mod orders;
mod wait;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGCONT, SIGHUP, SIGQUIT, SIGTSTP};

use super::console::{Console, Hotkey};
use super::control::{Inbox, Orders};
use super::devices::Devices;
use super::events::Outcome;
use super::life::Life;
use super::machine::{Loaded, Machine};
use crate::config::{Lifecycle, OnReboot, Vm};
use crate::control::messages::{Event, State};
use crate::devices::serial::Serial;
use crate::signals::{self, Signals};
use crate::vm::console::ConsoleSink;
use crate::vm::control::Answer;
use crate::{Error, Result, terminal};
use keyboard::Keyboard;

/// How a machine's time ended.
pub(super) enum End {
    /// By what the guest did, or what happened to it.
    Guest(Outcome),
    /// By the user, without the guest's consent: for this reason.
    Forced(String),
}

/// How a machine's time ended, or went on with the next one.
enum Turn {
    End(End),
    /// By the reset button; who pressed it waits for the next machine.
    Reset(SyncSender<Answer>),
}

/// The power button was pressed for the user.
struct Stopping {
    /// When patience ends.
    deadline: Instant,
    /// How long that is.
    patience: Duration,
}

/// The thread that runs the VM.
pub(super) struct Session {
    signals: Signals,
    inbox: Inbox,
    console: Option<Arc<Console>>,
    keyboard: Keyboard,
    /// Input from attachments goes first, the next time.
    attachments_first: bool,
    stopping: Option<Stopping>,
    paused: bool,
    life: Arc<Life>,
    lifecycle: Lifecycle,
}

impl Session {
    /// `keys`: standard input is the guest's.
    pub(super) fn new(
        config: &Vm,
        life: Arc<Life>,
        console: Option<Arc<Console>>,
        keys: bool,
    ) -> Result<(Session, Orders)> {
        let signals = Signals::catch()?;
        let keyboard = Keyboard::new(keys)
            .map_err(|error| Error::failed(format!("cannot set up the terminal: {error}")))?;
        let (orders, inbox) = super::control::channel()
            .map_err(|error| Error::failed(format!("cannot create an eventfd: {error}")))?;
        let session = Session {
            signals,
            inbox,
            console,
            keyboard,
            attachments_first: false,
            stopping: None,
            paused: false,
            life,
            lifecycle: config.lifecycle.clone(),
        };
        Ok((session, orders))
    }

    /// Stays with the machine that is loaded, and after each reboot with the `next`, to the end.
    /// `running` is called when the first one is about to run and nothing else can go wrong: its
    /// error comes before the guest has done anything.
    pub(super) fn run(
        &mut self,
        mut loaded: Loaded,
        next: impl Fn() -> Result<Loaded>,
        devices: &Devices,
        running: impl FnOnce() -> Result<()>,
    ) -> Result<End> {
        let mut running = Some(running);
        let mut waiting: Option<SyncSender<Answer>> = None;
        loop {
            let sink = self.console.as_ref().map(Console::sink);
            if running.is_none() {
                // Before it can be up again.
                self.life.publish(Event::Rebooted);
            }
            let held = self.paused || running.is_some();
            let machine = loaded.start(devices.all(), sink, held)?;
            self.life.set_gate(machine.gate());
            let turn = match running.take() {
                Some(running) => running().inspect(|()| machine.resume()),
                None => Ok(()),
            };
            if let Some(waiting) = waiting.take() {
                let _ = waiting.send(Ok(()));
            }
            let turn = turn.and_then(|()| self.supervise(&machine));
            let goes_on = match &turn {
                Ok(Turn::End(End::Guest(Outcome::Reboot))) => self.restarts(),
                Ok(Turn::Reset(_)) => true,
                Ok(Turn::End(_)) | Err(_) => false,
            };
            if !goes_on {
                devices.give_up();
            }
            machine.stop();
            match turn? {
                Turn::End(_) if goes_on => tracing::info!("the guest reboots"),
                Turn::End(end) => return Ok(end),
                Turn::Reset(answer) => {
                    tracing::info!("the guest is reset");
                    devices.flush();
                    waiting = Some(answer);
                }
            }
            if let Some(console) = &self.console {
                console.rebooted();
            }
            loaded = next()?;
        }
    }

    /// Whether a reboot starts the next machine: not if the user is waiting for the end.
    fn restarts(&self) -> bool {
        self.lifecycle.on_reboot == OnReboot::Restart && self.stopping.is_none()
    }

    /// Stays with a machine to its end.
    fn supervise(&mut self, machine: &Machine) -> Result<Turn> {
        loop {
            if let Some(outcome) = machine.events().outcome() {
                // A signal that came before a reboot does not wait for the next machine.
                if let Some(end) = self.on_signals(machine) {
                    return Ok(Turn::End(end));
                }
                if outcome == Outcome::Panic {
                    self.life.publish(Event::GuestPanic);
                }
                return Ok(Turn::End(End::Guest(outcome)));
            }
            if let Some(stopping) = &self.stopping
                && Instant::now() >= stopping.deadline
            {
                return Ok(Turn::End(End::Forced(format!(
                    "it did not power off within {:?}",
                    stopping.patience
                ))));
            }
            let ready = self.wait(machine)?;
            if ready.signals
                && let Some(end) = self.on_signals(machine)
            {
                return Ok(Turn::End(end));
            }
            if ready.orders
                && let Some(turn) = self.on_orders(machine)
            {
                return Ok(turn);
            }
            if ready.room
                && let Some(serial) = machine.serial()
            {
                let _ = serial.room().read();
            }
            if ready.typed
                && let Some(console) = &self.console
            {
                let _ = console.input().arrived().read();
            }
            if ready.keys {
                match self.keyboard.read() {
                    Some(Hotkey::End) => {
                        return Ok(Turn::End(End::Forced("Ctrl-] twice".into())));
                    }
                    Some(Hotkey::PowerButton) => self.press(machine, "Ctrl-]", None),
                    None => {}
                }
            }
            if let Some(serial) = machine.serial() {
                self.feed(serial);
            }
        }
    }

    fn on_signals(&mut self, machine: &Machine) -> Option<End> {
        for signal in self.signals.take() {
            match signal {
                // The shell has had the terminal meanwhile, and has changed its settings.
                SIGCONT => terminal::RAW.store(false, Ordering::SeqCst),
                SIGTSTP => self.keyboard.suspend(),
                // One for each of a shell and its terminal that end is usual.
                SIGHUP if self.stopping.is_some() => {}
                SIGQUIT => return Some(End::Forced("SIGQUIT".into())),
                signal if self.stopping.is_some() => {
                    return Some(End::Forced(format!("a second {}", signals::name(signal))));
                }
                signal => self.press(machine, signals::name(signal), None),
            }
        }
        None
    }

    /// Presses the power button for the user, and starts to lose patience. A guest that is paused
    /// could not hear it: it runs again.
    fn press(&mut self, machine: &Machine, why: &str, patience: Option<Duration>) {
        if self.paused {
            self.paused = false;
            machine.resume();
            self.life.publish(Event::Resumed);
        }
        tracing::info!("{why}: power button pressed");
        if let Err(error) = machine.button().press() {
            tracing::warn!("cannot press the power button: {error}");
        }
        self.life.set_state(State::Stopping);
        let patience = patience.unwrap_or(self.lifecycle.stop_timeout);
        let deadline = Instant::now() + patience;
        // The least patient decides.
        if self
            .stopping
            .as_ref()
            .is_none_or(|stopping| deadline < stopping.deadline)
        {
            self.stopping = Some(Stopping { deadline, patience });
        }
    }

    /// Gives the guest what it can take of the input: from those who type in turn.
    fn feed(&mut self, serial: &Serial<ConsoleSink>) {
        let give = |bytes: &[u8]| {
            serial.input(bytes).unwrap_or_else(|error| {
                tracing::debug!("serial port takes no input: {error}");
                bytes.len()
            })
        };
        let attached = self.console.as_ref().map(|console| console.input());
        let attached = attached.filter(|input| !input.is_empty());
        self.attachments_first = !self.attachments_first;
        match (attached, self.attachments_first) {
            (Some(input), true) => {
                input.feed(give);
                self.keyboard.feed(give);
            }
            (Some(input), false) => {
                self.keyboard.feed(give);
                input.feed(give);
            }
            (None, _) => self.keyboard.feed(give),
        }
    }

    /// Writes the last output and gives the terminal back.
    pub(super) fn close(self) {
        if let Some(console) = &self.console {
            console.close();
        }
        drop(self.keyboard);
    }
}
