//! The serial console: what the guest prints goes to every place that shows it, and what is typed
//! at any of them to the guest.

mod attachment;
mod boot_mark;
mod input;
mod kept_log;
mod keys;
pub(crate) mod log_file;
mod output;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use attachment::Attachment;
use boot_mark::BootMark;
use output::Output;

pub(crate) use attachment::AttachError;
pub(crate) use input::Input;
pub(crate) use kept_log::KeptLog;
pub(crate) use keys::{Hotkey, Hotkeys};
pub(crate) use output::Outlet;

/// What was printed last and is kept for those who attach later, in bytes.
const SCROLLBACK: usize = 256 << 10;
/// How long the last output may take to be written without any progress.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// The same for an attachment.
const LAST_ATTACHED: Duration = Duration::from_millis(250);

/// The console of a VM, from its start to its end, reboots included.
pub(crate) struct Console {
    state: Mutex<State>,
    input: Input,
    /// What the guest prints once it is up.
    ready: Option<String>,
    on_boot: Box<dyn Fn() + Send + Sync>,
}

struct State {
    scrollback: VecDeque<u8>,
    /// There until the guest is up.
    boot_mark: Option<BootMark>,
    outputs: Vec<Output>,
    attachments: Vec<Attachment>,
    closed: bool,
}

impl Console {
    /// A console that shows what the guest prints at `outlets`, and calls `on_boot` when that
    /// tells that the guest is up: by the text `ready`, if there is one. It must not block.
    pub(crate) fn new(
        outlets: Vec<Outlet>,
        ready: Option<String>,
        on_boot: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Arc<Console>> {
        let outputs = outlets.into_iter().map(Output::start);
        let state = State {
            scrollback: VecDeque::new(),
            boot_mark: Some(BootMark::new(ready.clone())),
            outputs: outputs.collect::<io::Result<_>>()?,
            attachments: Vec::new(),
            closed: false,
        };
        Ok(Arc::new(Console {
            state: Mutex::new(state),
            input: Input::new()?,
            ready,
            on_boot: Box::new(on_boot),
        }))
    }

    /// The end that the serial port writes to. It never blocks.
    pub(crate) fn sink(self: &Arc<Self>) -> ConsoleSink {
        ConsoleSink(Arc::clone(self))
    }

    /// What was typed at attachments.
    pub(crate) fn input(&self) -> &Input {
        &self.input
    }

    /// The guest starts anew: it is to tell again when it is up.
    pub(crate) fn rebooted(&self) {
        self.lock().boot_mark = Some(BootMark::new(self.ready.clone()));
    }

    fn print(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let spilt = (state.scrollback.len() + bytes.len()).saturating_sub(SCROLLBACK);
        let spilt = spilt.min(state.scrollback.len());
        state.scrollback.drain(..spilt);
        state
            .scrollback
            .extend(&bytes[bytes.len().saturating_sub(SCROLLBACK)..]);
        for output in &state.outputs {
            output.push(bytes);
        }
        for attachment in &state.attachments {
            attachment.push(bytes);
        }
        let mark = state.boot_mark.as_mut();
        let booted = mark.is_some_and(|mark| mark.found_in(bytes));
        if booted {
            state.boot_mark = None;
            drop(state);
            (self.on_boot)();
        }
    }

    /// Writes the last output and ends all attachments.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let outputs = std::mem::take(&mut state.outputs);
        let attachments = std::mem::take(&mut state.attachments);
        drop(state);
        self.input.close();
        outputs.iter().for_each(Output::end);
        attachments.iter().for_each(Attachment::end);
        for output in outputs {
            output.finish(LAST_OUTPUT);
        }
        for attachment in attachments {
            attachment.finish(LAST_ATTACHED);
        }
    }

    /// Every change of the state is complete in itself, so a poisoned lock is taken all the same.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end that the serial port writes to.
pub(crate) struct ConsoleSink(Arc<Console>);

impl Write for ConsoleSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.print(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
