//! `launcher console`, with pipes and on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use launcher::control::messages::How;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::tcgetattr;

use super::vm::{Folder, Vm};

/// The guest's end of the console, once somebody is attached.
fn guest(vm: &Vm) -> UnixStream {
    loop {
        if let Some(stream) = vm.fake.typed.lock().unwrap().take() {
            stream.set_nonblocking(false).unwrap();
            return stream;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn expect(from: &mut impl Read, text: &[u8]) {
    let mut read = vec![0; text.len()];
    from.read_exact(&mut read).unwrap();
    assert_eq!(read, text);
}

#[test]
fn pipes_carry_every_byte_and_the_output_goes_on_after_the_input_s_end() {
    let folder = Folder::new();
    let mut web = folder.start("web", "vm.toml");
    let mut command = folder.command(&["console", "web"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut console = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut out = console.stdout.take().unwrap();
    expect(&mut out, b"before\r\nlogin: ");
    let mut guest = guest(&web);
    let mut input = console.stdin.take().unwrap();
    input.write_all(b"root\x1d\x03\n").unwrap();
    expect(&mut guest, b"root\x1d\x03\n");
    drop(input);
    guest.write_all(b"# \xff").unwrap();
    expect(&mut out, b"# \xff");
    drop(guest);
    web.end(How::Guest, None, 0);
    assert_eq!(console.wait().unwrap().code(), Some(0));
    let mut said = String::new();
    console
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(said, "");
}

#[test]
fn without_scrollback_it_begins_with_what_comes() {
    let folder = Folder::new();
    let web = folder.start("web", "vm.toml");
    let mut command = folder.command(&["console", "web", "--no-scrollback"]);
    let mut console = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = console.stdout.take().unwrap();
    expect(&mut out, b"login: ");
    drop(guest(&web));
    assert_eq!(console.wait().unwrap().code(), Some(0));
}

#[test]
fn a_reader_that_is_gone_ends_it() {
    let folder = Folder::new();
    let web = folder.start("web", "vm.toml");
    let mut command = folder.command(&["console", "web"]);
    let mut console = command.stdout(Stdio::piped()).spawn().unwrap();
    drop(console.stdout.take());
    let mut guest = guest(&web);
    let _ = guest.write_all(b"more");
    assert_eq!(console.wait().unwrap().code(), Some(0));
}

/// A terminal with `launcher console` on it.
struct Terminal {
    keyboard: File,
    line: OwnedFd,
}

impl Terminal {
    fn new() -> Terminal {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keyboard).unwrap();
        unlockpt(&keyboard).unwrap();
        let name = ptsname(&keyboard, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let line = rustix::fs::open(name, flags, Mode::empty()).unwrap();
        let keyboard = keyboard.into();
        Terminal { keyboard, line }
    }

    fn settings(&self) -> String {
        format!("{:?}", tcgetattr(&self.line).unwrap())
    }

    fn run(&self, command: &mut Command) -> Child {
        let stdio = || Stdio::from(self.line.try_clone().unwrap());
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: signal, setsid and ioctl are async-signal-safe, and nothing else is called.
        unsafe {
            command.pre_exec(|| {
                // The tests may run under nohup, or in a script's background.
                for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        command.spawn().unwrap()
    }

    /// Reads what is shown until it ends in `text`.
    fn shows(&self, text: &str) -> String {
        let mut shown = Vec::new();
        let mut byte = [0];
        while !shown.ends_with(text.as_bytes()) {
            (&self.keyboard).read_exact(&mut byte).unwrap();
            shown.extend(byte);
        }
        String::from_utf8_lossy(&shown).into_owned()
    }
}

#[test]
fn ctrl_bracket_detaches_and_the_vm_runs_on() {
    let (folder, terminal) = (Folder::new(), Terminal::new());
    let before = terminal.settings();
    let web = folder.start("web", "vm.toml");
    let mut console = terminal.run(&mut folder.command(&["console", "web"]));
    let shown = terminal.shows("login: ");
    assert_eq!(
        shown,
        "attached to web; Ctrl-] detaches\r\nbefore\r\nlogin: "
    );
    assert_ne!(terminal.settings(), before);
    let mut guest = guest(&web);
    (&terminal.keyboard).write_all(b"\x03\x1a\x04q").unwrap();
    expect(&mut guest, b"\x03\x1a\x04q");
    (&terminal.keyboard).write_all(b"ls\x1dlost").unwrap();
    expect(&mut guest, b"ls");
    terminal.shows("detached from web, which runs on\r\n");
    assert_eq!(console.wait().unwrap().code(), Some(0));
    assert_eq!(terminal.settings(), before);
    assert!(
        folder
            .does(&["status", "web"])
            .starts_with("web is booting")
    );
}

#[test]
fn a_stopped_console_gives_the_terminal_back_and_takes_it_again() {
    let (folder, terminal) = (Folder::new(), Terminal::new());
    let before = terminal.settings();
    let web = folder.start("web", "vm.toml");
    let mut console = terminal.run(&mut folder.command(&["console", "web"]));
    terminal.shows("login: ");
    let raw = terminal.settings();
    assert_ne!(raw, before);
    let mut guest = guest(&web);
    let pid = Pid::from_child(&console);
    for (signal, then) in [(Signal::TSTP, &before), (Signal::CONT, &raw)] {
        kill_process(pid, signal).unwrap();
        while terminal.settings() != *then {
            thread::sleep(Duration::from_millis(10));
        }
    }
    (&terminal.keyboard).write_all(b"x\x1d").unwrap();
    expect(&mut guest, b"x");
    assert_eq!(console.wait().unwrap().code(), Some(0));
    assert_eq!(terminal.settings(), before);
}

#[test]
fn the_terminal_is_restored_after_every_way_out() {
    let signals = [
        Signal::TERM,
        Signal::HUP,
        Signal::INT,
        Signal::QUIT,
        Signal::USR1,
    ];
    for signal in [None].into_iter().chain(signals.map(Some)) {
        let (folder, terminal) = (Folder::new(), Terminal::new());
        let before = terminal.settings();
        let mut web = folder.start("web", "vm.toml");
        let mut console = terminal.run(&mut folder.command(&["console", "web"]));
        terminal.shows("login: ");
        let guest = guest(&web);
        match signal {
            Some(signal) => {
                kill_process(Pid::from_child(&console), signal).unwrap();
            }
            None => {
                drop(guest);
                web.end(How::Guest, None, 0);
            }
        }
        use std::os::unix::process::ExitStatusExt;
        let status = console.wait().unwrap();
        assert_eq!(status.signal(), signal.map(Signal::as_raw), "{signal:?}");
        assert_eq!(terminal.settings(), before, "{signal:?}");
    }
}
