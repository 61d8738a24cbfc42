//! Standard input as the guest's keyboard: a terminal, a pipe or nothing.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Instant;

use signal_hook::consts::SIGTSTP;

use crate::terminal::{self, RawMode};
use crate::vm::console::{Hotkey, Hotkeys};

/// Standard input, as far as the guest has not taken it.
pub(super) struct Keyboard {
    /// It is a terminal, of which we may be in the background.
    is_terminal: bool,
    terminal: Option<RawMode>,
    hotkeys: Hotkeys,
    /// Read, but not taken by the guest yet.
    input: Vec<u8>,
    ended: bool,
}

impl Keyboard {
    /// With `used`, standard input is the guest's from now on.
    pub(super) fn new(used: bool) -> io::Result<Keyboard> {
        let is_terminal = used && terminal::is_input();
        let terminal = match is_terminal {
            true => RawMode::enter()?,
            false => None,
        };
        Ok(Keyboard {
            is_terminal,
            terminal,
            hotkeys: Hotkeys::default(),
            input: Vec::new(),
            ended: !used,
        })
    }

    /// Whether there will be no more input.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether more can be taken in. A flood waits in its pipe until the guest has taken what
    /// came before; keys are read ahead of it: the hot key must work however long the guest has
    /// read nothing.
    pub(super) fn has_room(&self) -> bool {
        const KEYS: usize = 64 << 10;
        self.input.len() < if self.is_terminal { KEYS } else { 1 }
    }

    /// Whether none is waiting for the guest.
    pub(super) fn is_empty(&self) -> bool {
        self.input.is_empty()
    }

    /// Whether standard input may be read. A terminal, only in the foreground: there it is taken
    /// (again, if a shell has had it meanwhile).
    pub(super) fn may_read(&mut self) -> bool {
        if !self.is_terminal {
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
            self.ended = true;
        }
        true
    }

    /// Reads what was typed. The hot key is found on a terminal alone.
    pub(super) fn read(&mut self) -> Option<Hotkey> {
        let mut buffer = [0; 64];
        let before = self.input.len();
        match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
            // End of input; a terminal that is gone reports an error for good.
            Ok(0) | Err(rustix::io::Errno::IO) => self.ended = true,
            Ok(count) => self.input.extend_from_slice(&buffer[..count]),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(error) => {
                tracing::warn!("console input cannot be read any more: {error}");
                self.ended = true;
            }
        }
        // In a pipe or a file the byte is data like any other.
        if !self.is_terminal {
            return None;
        }
        let mut typed = self.input.split_off(before);
        let hotkey = self.hotkeys.take(&mut typed, Instant::now());
        self.input.append(&mut typed);
        hotkey
    }

    /// Offers what there is to the guest, which says how much of it it takes.
    pub(super) fn feed(&mut self, guest: impl FnOnce(&[u8]) -> usize) {
        if !self.input.is_empty() {
            let taken = guest(&self.input);
            self.input.drain(..taken);
        }
    }

    /// Stops the process, the terminal as it was before.
    pub(super) fn suspend(&self) {
        if let Some(terminal) = &self.terminal {
            terminal.leave();
        }
        if let Err(error) = signal_hook::low_level::emulate_default_handler(SIGTSTP) {
            tracing::warn!("cannot stop the process: {error}");
        }
    }
}
