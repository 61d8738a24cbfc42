//! `launcher console`.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGCONT, SIGTSTP};

use super::output::complain;
use super::target::Target;
use crate::signals::Signals;
use crate::terminal::{self, RawMode};
use crate::{Error, Result, exit, stdout};

/// The key that detaches: Ctrl-].
const DETACH: u8 = 0x1d;
/// What is read at once: bytes.
const PIECE: usize = 16 << 10;
/// Input that waits for the guest at most: bytes.
const WAITING: usize = 64 << 10;

/// Attach to the console of a running VM; Ctrl-] detaches
///
/// What the guest has printed before is shown first. With a pipe instead of a terminal, what
/// comes from it goes to the guest as it is, and after its end the output goes on until the VM
/// ends.
#[derive(Args)]
#[command(after_help = "Example:\n  launcher console web")]
pub(super) struct Console {
    /// TOML file of the VM, the folder of its vm.toml, or its name [default: vm.toml]
    vm: Option<PathBuf>,
    /// Begin with what comes from now on
    #[arg(long)]
    no_scrollback: bool,
}

impl Console {
    pub(super) fn run(self) -> Result<u8> {
        let target = Target::running(self.vm)?;
        let stream = target.connect()?.console(!self.no_scrollback)?;
        stream
            .set_nonblocking(true)
            .map_err(|error| failed("set up the connection", &error))?;
        let keyboard = terminal::in_foreground();
        if keyboard {
            complain(&format!("attached to {}; Ctrl-] detaches", target.name()));
        }
        let mut attached = Attached {
            stream,
            signals: Signals::catch()?,
            terminal: None,
            keyboard,
            input: Vec::new(),
            input_ended: false,
        };
        if keyboard {
            attached.terminal =
                RawMode::enter().map_err(|error| failed("set up the terminal", &error))?;
        }
        let end = attached.run();
        // Whatever the end is, the terminal is as it was before anything is said of it.
        drop(attached);
        match end? {
            End::Detached => complain(&format!("\ndetached from {}, which runs on", target.name())),
            End::Ended if keyboard => complain(&format!("\n{} has ended", target.name())),
            End::Ended | End::Unread => {}
            End::Signal(signal) => {
                // As the signal would have ended it.
                let _ = signal_hook::low_level::emulate_default_handler(signal);
                return Ok(exit::FAILED);
            }
        }
        Ok(exit::DONE)
    }
}

/// Why the console is left.
enum End {
    /// The user wanted it.
    Detached,
    /// The VM has ended.
    Ended,
    /// Nobody reads standard output any more.
    Unread,
    /// A signal that ends processes.
    Signal(i32),
}

/// A terminal or a pipe on one side, the guest's console on the other.
struct Attached {
    stream: UnixStream,
    signals: Signals,
    terminal: Option<RawMode>,
    keyboard: bool,
    /// Read, but not taken by the VM yet.
    input: Vec<u8>,
    input_ended: bool,
}

impl Attached {
    fn run(&mut self) -> Result<End> {
        loop {
            let ready = self.wait()?;
            if ready.signals
                && let Some(end) = self.on_signals()
            {
                return Ok(end);
            }
            if ready.output
                && let Some(end) = self.show()?
            {
                return Ok(end);
            }
            if ready.keys && self.read_keys()? {
                return Ok(End::Detached);
            }
            if ready.room {
                self.send()?;
            }
        }
    }

    /// Sleeps until there is something to do: signals, keys, output, room for input.
    fn wait(&self) -> Result<Ready> {
        let stdin = rustix::stdio::stdin();
        let mut of_stream = PollFlags::IN;
        if !self.input.is_empty() {
            of_stream |= PollFlags::OUT;
        }
        let reads = !self.input_ended && self.input.len() < WAITING;
        let of_stdin = if reads {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
            PollFd::new(&self.stream, of_stream),
        ];
        if reads {
            fds.push(PollFd::from_borrowed_fd(stdin, of_stdin));
        }
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(errno) => return Err(failed("wait for the console", &errno.into())),
        }
        let stream = fds[1].revents();
        let gone = PollFlags::HUP | PollFlags::ERR;
        Ok(Ready {
            signals: !fds[0].revents().is_empty(),
            output: stream.intersects(PollFlags::IN | gone),
            room: stream.contains(PollFlags::OUT),
            keys: fds.get(2).is_some_and(|stdin| !stdin.revents().is_empty()),
        })
    }

    fn on_signals(&mut self) -> Option<End> {
        for signal in self.signals.take() {
            match signal {
                // A shell has had the terminal meanwhile, and has changed its settings.
                SIGCONT => {
                    if let Some(terminal) = &self.terminal
                        && terminal::in_foreground()
                        && let Err(error) = terminal.apply()
                    {
                        tracing::warn!("cannot set up the terminal again: {error}");
                    }
                }
                SIGTSTP => {
                    if let Some(terminal) = &self.terminal {
                        terminal.leave();
                    }
                    // Stops the process; what follows comes after it goes on.
                    if let Err(error) = signal_hook::low_level::emulate_default_handler(SIGTSTP) {
                        tracing::warn!("cannot stop the process: {error}");
                    }
                }
                signal => return Some(End::Signal(signal)),
            }
        }
        None
    }

    /// Shows what the guest prints.
    fn show(&mut self) -> Result<Option<End>> {
        let mut piece = [0; PIECE];
        match rustix::io::read(&self.stream, &mut piece) {
            Ok(0) | Err(Errno::CONNRESET) => Ok(Some(End::Ended)),
            Ok(count) => match stdout::write_all(&piece[..count]) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Some(End::Unread)),
                Err(error) => Err(failed("write to standard output", &error)),
                Ok(()) => Ok(None),
            },
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => Err(failed("read the console", &errno.into())),
        }
    }

    /// Reads what is for the guest; whether the user detaches.
    fn read_keys(&mut self) -> Result<bool> {
        let mut piece = [0; 4096];
        match rustix::io::read(rustix::stdio::stdin(), &mut piece) {
            // A terminal that is gone reports an error for good: nobody is there any more.
            Ok(0) | Err(Errno::IO) => {
                self.input_ended = true;
                Ok(self.keyboard)
            }
            Ok(count) => {
                let typed = &piece[..count];
                // In a pipe or a file the byte is data like any other.
                let detach = typed.iter().position(|byte| *byte == DETACH);
                let detach = detach.filter(|_| self.keyboard);
                self.input.extend(&typed[..detach.unwrap_or(count)]);
                if detach.is_some() {
                    self.send()?;
                }
                Ok(detach.is_some())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(errno) => Err(failed("read standard input", &errno.into())),
        }
    }

    /// Sends the guest what it takes.
    fn send(&mut self) -> Result<()> {
        while !self.input.is_empty() {
            match rustix::net::send(&self.stream, &self.input, rustix::net::SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.input.drain(..count)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                // Its end is told where output is read.
                Err(Errno::PIPE | Errno::CONNRESET) => self.input.clear(),
                Err(errno) => return Err(failed("send to the console", &errno.into())),
            }
        }
        Ok(())
    }
}

/// What there is to do.
#[derive(Default)]
struct Ready {
    signals: bool,
    /// The guest has printed something, or the connection has ended.
    output: bool,
    /// The guest takes input.
    room: bool,
    keys: bool,
}

fn failed(what: &str, error: &io::Error) -> Error {
    Error::failed(format!("cannot {what}: {error}"))
}
