//! What the user has in hand while the VM runs: signals, keys, the console's output.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};

use super::console::{Hotkey, Hotkeys, Outlet, Output, OutputSink};
use super::devices::Devices;
use super::events::Outcome;
use super::log_file;
use super::machine::{Loaded, Machine};
use crate::config::{ConsoleMode, Lifecycle, OnReboot, Vm};
use crate::terminal::{self, RawMode};
use crate::{Error, Result, signals};

/// How a machine's time ended.
pub(super) enum End {
    /// By what the guest did, or what happened to it.
    Guest(Outcome),
    /// By the user, without the guest's consent: for this reason.
    Forced(String),
}

/// What the user has in hand while the VM runs: signals, keys, the console's output.
pub(super) struct Session {
    signals: UnixStream,
    outputs: Vec<Output>,
    /// Standard input is a terminal, of which we may be in the background.
    keyboard: bool,
    terminal: Option<RawMode>,
    hotkeys: Hotkeys,
    /// Read, but not taken by the guest yet.
    input: Vec<u8>,
    input_ended: bool,
    /// The power button was pressed for the user; when it is this late, patience ends.
    stopping: Option<Instant>,
    lifecycle: Lifecycle,
}

impl Session {
    pub(super) fn new(config: &Vm) -> Result<Session> {
        let failed = |what: &'static str| {
            move |error: io::Error| Error::failed(format!("cannot {what}: {error}"))
        };
        let (signals, sender) = UnixStream::pair().map_err(failed("make a socket pair"))?;
        signals
            .set_nonblocking(true)
            .map_err(failed("set up a socket pair"))?;
        let caught = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT];
        for signal in caught {
            // A parent that ignores them (nohup, a shell's job in the background) wants it so.
            if signal != SIGTERM && signals::is_ignored(signal) {
                continue;
            }
            // Each signal writes a byte of its own kind; the byte is what tells them apart.
            let sender = sender.try_clone().map_err(failed("copy a socket"))?;
            register(signal, sender).map_err(failed("catch signals"))?;
        }
        signals::unblock(caught);
        let stdio = config.console.mode == ConsoleMode::Stdio;
        let mut outlets = Vec::new();
        if stdio {
            if let Some(path) = &config.console.log {
                let log = log_file::open(path).map_err(|error| {
                    let what = format!("the console's log {}", path.display());
                    Error::unopenable(&what, &error).about("console.log")
                })?;
                if let Some(other) = log_file::same_file(&log, config) {
                    let other = other.display();
                    let message = format!("`console.log` is the same file as {other}");
                    return Err(Error::usage(message)
                        .help("what the guest prints would be written into it: give another file")
                        .about("console.log"));
                }
                outlets.push(Outlet::Log(log));
            }
            outlets.push(Outlet::Stdout);
        }
        let outputs = outlets
            .into_iter()
            .map(Output::start)
            .collect::<io::Result<_>>()
            .map_err(failed("start a thread"))?;
        let keyboard = stdio && terminal::is_input();
        let terminal = match keyboard {
            true => RawMode::enter().map_err(failed("set up the terminal"))?,
            false => None,
        };
        Ok(Session {
            signals,
            outputs,
            keyboard,
            terminal,
            hotkeys: Hotkeys::default(),
            input: Vec::new(),
            input_ended: !stdio,
            stopping: None,
            lifecycle: config.lifecycle.clone(),
        })
    }

    /// Stays with the machine that is loaded, and after each reboot with the `next`, to the end.
    pub(super) fn run(
        &mut self,
        mut loaded: Loaded,
        next: impl Fn() -> Result<Loaded>,
        devices: &Devices,
    ) -> Result<End> {
        loop {
            let machine = loaded.start(devices.all(), self.sink())?;
            let end = self.supervise(&machine);
            machine.stop();
            match end? {
                End::Guest(Outcome::Reboot) if self.restarts() => {
                    tracing::info!("the guest reboots");
                    loaded = next()?;
                }
                end => return Ok(end),
            }
        }
    }

    /// Where a machine's serial port sends to; `None` if there is none.
    fn sink(&self) -> Option<OutputSink> {
        (!self.outputs.is_empty()).then(|| OutputSink::to(&self.outputs))
    }

    /// Whether a reboot starts the next machine: not if the user is waiting for the end.
    fn restarts(&self) -> bool {
        self.lifecycle.on_reboot == OnReboot::Restart && self.stopping.is_none()
    }

    /// Stays with a machine to its end.
    fn supervise(&mut self, machine: &Machine) -> Result<End> {
        loop {
            if let Some(outcome) = machine.events().outcome() {
                // A signal that came before a reboot does not wait for the next machine.
                if let Some(end) = self.on_signals(machine) {
                    return Ok(end);
                }
                return Ok(End::Guest(outcome));
            }
            if self
                .stopping
                .is_some_and(|deadline| Instant::now() >= deadline)
            {
                let waited = self.lifecycle.stop_timeout;
                return Ok(End::Forced(format!(
                    "it did not power off within {waited:?}"
                )));
            }
            let ready = self.wait(machine)?;
            if ready.signals
                && let Some(end) = self.on_signals(machine)
            {
                return Ok(end);
            }
            if ready.room
                && let Some(serial) = machine.serial()
            {
                let _ = serial.room().read();
            }
            if ready.keys
                && let Some(end) = self.on_keys(machine)
            {
                return Ok(end);
            }
            self.feed(machine);
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self, machine: &Machine) -> Result<Ready> {
        let may_read = !self.input_ended && self.may_read();
        let stdin = rustix::stdio::stdin();
        let (ended, signals) = (as_fd(machine.events().eventfd()), self.signals.as_fd());
        let mut fds = vec![
            PollFd::from_borrowed_fd(ended, PollFlags::IN),
            PollFd::from_borrowed_fd(signals, PollFlags::IN),
        ];
        let mut timeout = self
            .stopping
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let mut wake_in = |after: Duration| timeout = Some(timeout.map_or(after, |t| t.min(after)));
        let (mut room, mut keys) = (None, None);
        if let Some(serial) = machine.serial() {
            room = Some(fds.len());
            fds.push(PollFd::from_borrowed_fd(
                as_fd(serial.room()),
                PollFlags::IN,
            ));
            // A flood waits in the pipe until the guest has taken what came before.
            if may_read && self.input.len() < self.input_limit() {
                keys = Some(fds.len());
                fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
            }
            // A port in loopback mode takes no input for a while, and does not tell of its end.
            if !self.input.is_empty() && serial.capacity() > 0 {
                wake_in(Duration::from_millis(20));
            }
        }
        if !self.input_ended && !may_read {
            // A shell that moves us to the foreground does not tell either.
            wake_in(Duration::from_secs(1));
        }
        match poll(&mut fds, timeout.map(timespec).as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(Error::failed(format!("cannot wait for the VM: {error}"))),
        }
        let ready = |index: usize| !fds[index].revents().is_empty();
        Ok(Ready {
            signals: ready(1),
            room: room.is_some_and(ready),
            keys: keys.is_some_and(ready),
        })
    }

    /// How much input may wait for the guest. Keys are read ahead of it: the hot key must work
    /// however long the guest has read nothing.
    fn input_limit(&self) -> usize {
        const KEYS: usize = 64 << 10;
        if self.keyboard { KEYS } else { 1 }
    }

    /// Whether standard input may be read. A terminal, only in the foreground: there it is taken
    /// (again, if a shell has had it meanwhile).
    fn may_read(&mut self) -> bool {
        if !self.keyboard {
            return true;
        }
        if !terminal::in_foreground() {
            return false;
        }
        let raw = match &self.terminal {
            Some(_) if terminal::RAW.load(Ordering::SeqCst) => return true,
            Some(terminal) => terminal.apply(),
            None => RawMode::enter().map(|terminal| self.terminal = terminal),
        };
        if let Err(error) = raw {
            tracing::warn!("cannot set up the terminal, its keys are not read: {error}");
            self.input_ended = true;
        }
        true
    }

    fn on_signals(&mut self, machine: &Machine) -> Option<End> {
        let mut bytes = [0; 64];
        let count = self.signals.read(&mut bytes).unwrap_or(0);
        for &signal in &bytes[..count] {
            match i32::from(signal) {
                // The shell has had the terminal meanwhile, and has changed its settings.
                SIGCONT => terminal::RAW.store(false, Ordering::SeqCst),
                SIGTSTP => self.suspend(),
                // One for each of a shell and its terminal that end is usual.
                SIGHUP if self.stopping.is_some() => {}
                SIGQUIT => return Some(End::Forced("SIGQUIT".into())),
                signal if self.stopping.is_some() => {
                    return Some(End::Forced(format!("a second {}", name(signal))));
                }
                signal => self.press(machine, name(signal)),
            }
        }
        None
    }

    /// Stops the process, the terminal as it was before.
    fn suspend(&self) {
        if let Some(terminal) = &self.terminal {
            terminal.leave();
        }
        if let Err(error) = signal_hook::low_level::emulate_default_handler(SIGTSTP) {
            tracing::warn!("cannot stop the process: {error}");
        }
    }

    fn on_keys(&mut self, machine: &Machine) -> Option<End> {
        let mut buffer = [0; 64];
        let before = self.input.len();
        match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
            // End of input; a terminal that is gone reports an error for good.
            Ok(0) | Err(rustix::io::Errno::IO) => self.input_ended = true,
            Ok(count) => self.input.extend_from_slice(&buffer[..count]),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(error) => {
                tracing::warn!("console input cannot be read any more: {error}");
                self.input_ended = true;
            }
        }
        // In a pipe or a file the byte is data like any other.
        if !self.keyboard {
            return None;
        }
        let mut typed = self.input.split_off(before);
        let hotkey = self.hotkeys.take(&mut typed, Instant::now());
        self.input.append(&mut typed);
        match hotkey? {
            Hotkey::End => Some(End::Forced("Ctrl-] twice".into())),
            Hotkey::PowerButton => {
                self.press(machine, "Ctrl-]");
                None
            }
        }
    }

    /// Presses the power button for the user, and starts to lose patience.
    fn press(&mut self, machine: &Machine, why: &str) {
        tracing::info!("{why}: power button pressed");
        if let Err(error) = machine.button().press() {
            tracing::warn!("cannot press the power button: {error}");
        }
        let deadline = Instant::now() + self.lifecycle.stop_timeout;
        self.stopping.get_or_insert(deadline);
    }

    /// Gives the guest what it can take of the input.
    fn feed(&mut self, machine: &Machine) {
        let Some(serial) = machine.serial() else {
            return;
        };
        if self.input.is_empty() {
            return;
        }
        match serial.input(&self.input) {
            Ok(taken) => drop(self.input.drain(..taken)),
            Err(error) => {
                tracing::debug!("serial port takes no input: {error}");
                self.input.clear();
            }
        }
    }

    /// Writes the last output and gives the terminal back.
    pub(super) fn close(self) {
        Output::close(self.outputs);
        drop(self.terminal);
    }
}

/// What woke the thread up.
#[derive(Default)]
struct Ready {
    signals: bool,
    room: bool,
    keys: bool,
}

/// Has the handler of `signal` write its number to `sender`.
fn register(signal: i32, sender: UnixStream) -> io::Result<()> {
    sender.set_nonblocking(true)?;
    let action = move || {
        // Full means that unread signals wait already.
        let _ = rustix::io::write(&sender, &[signal as u8]);
    };
    // SAFETY: the action is async-signal-safe: it does nothing but one write(2) to a socket that
    // it owns, without allocation or lock.
    unsafe { signal_hook::low_level::register(signal, action) }?;
    Ok(())
}

fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("signal")
}

fn as_fd(eventfd: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open for as long as `eventfd` is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs() as _,
        tv_nsec: duration.subsec_nanos().into(),
    }
}
