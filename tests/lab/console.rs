//! The serial console on pipes, on a terminal, and on nothing.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Signal, ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

use crate::guest::{Folder, GUEST, PATIENCE, Vm, watch};
use crate::runner::cases;

cases![console:
    typed_input_is_echoed_and_read,
    long_input_arrives_whole,
    no_input_is_no_reason_to_end,
    slow_reader_stops_neither_guest_nor_input,
    log_has_what_the_guest_prints,
    ctrl_bracket_on_a_terminal_presses_the_power_button,
    second_ctrl_bracket_ends_the_vm,
    terminal_is_restored_after_a_signal,
    terminal_is_restored_after_an_error,
];

fn typed_input_is_echoed_and_read() {
    let folder = Folder::new();
    let mut vm = folder.up(GUEST);
    vm.ready();
    // cat starts behind the echo, when the shell has handed the terminal over.
    vm.send("echo 'here'is; cat\n");
    vm.wait_for("hereis\r\n");
    thread::sleep(Duration::from_millis(500));
    vm.send("typed by hand\n");
    // Once by the guest's terminal, once by cat.
    assert_eq!(vm.wait_for("typed by hand\r\n"), "");
    assert_eq!(vm.wait_for("typed by hand\r\n"), "");
    vm.send([4]); // Ctrl-D
    assert_eq!(vm.run("echo $((6 * 7))"), "42");
    vm.power_off();
}

fn long_input_arrives_whole() {
    let folder = Folder::new();
    let mut vm = folder.up(GUEST);
    vm.ready();
    vm.send("stty -echo; cat >/tmp/typed; stty echo\n");
    thread::sleep(Duration::from_secs(1));
    let line = "0123456789abcdef".repeat(4) + "\n";
    vm.send(line.repeat(64));
    vm.send([4]);
    assert_eq!(vm.run("wc -c </tmp/typed"), (65 * 64).to_string());
    assert_eq!(vm.run("sort -u /tmp/typed | wc -l"), "1");
    vm.power_off();
}

fn no_input_is_no_reason_to_end() {
    let folder = Folder::new();
    let mut vm = folder.up(GUEST);
    vm.close_input();
    vm.wait_for("lab: ready");
    thread::sleep(Duration::from_secs(1));
    assert!(vm.alive());
    vm.signal(Signal::TERM);
    assert_eq!(vm.exit(), 0, "{}", vm.errors());
}

/// Nobody reads standard output: the guest goes on, the log has everything, and what the guest
/// prints does not pile up in memory.
fn slow_reader_stops_neither_guest_nor_input() {
    let folder = Folder::new();
    let toml = format!("{GUEST}\n[console]\nlog = \"console.log\"");
    let mut vm = Vm::silent(&mut folder.command(&toml));
    let log = || fs::read_to_string(folder.path("console.log")).unwrap_or_default();
    let wait_for = |vm: &mut Vm, text: &str| {
        let deadline = Instant::now() + PATIENCE;
        while !log().contains(text) {
            let end = || log().chars().rev().take(2000).collect::<Vec<_>>();
            let end = || end().into_iter().rev().collect::<String>();
            assert!(vm.alive(), "launcher has ended: {}; {}", vm.errors(), end());
            assert!(
                Instant::now() < deadline,
                "no {text:?} in the log: {}",
                end()
            );
            thread::sleep(Duration::from_millis(100));
        }
    };
    wait_for(&mut vm, "lab: ready");
    let printed = 16 << 10; // the pipe holds 4 KiB
    vm.send(format!(
        "yes | head -c {printed}; echo all \"said\"; poweroff -f\n"
    ));
    wait_for(&mut vm, "all said");
    assert_eq!(vm.exit(), 0, "{}", vm.errors());
    assert_eq!(
        log().lines().filter(|line| *line == "y").count(),
        printed / 2
    );
}

fn log_has_what_the_guest_prints() {
    let folder = Folder::new();
    let mut vm = folder.up(&format!("{GUEST}\n[console]\nlog = \"console.log\""));
    vm.ready();
    vm.run("echo into-the-log");
    vm.power_off();
    let log = fs::read_to_string(folder.path("console.log")).unwrap();
    assert_eq!(log, vm.console.text());
}

/// A terminal: what is typed goes in at `keyboard`, programs run on its `line`.
pub(crate) struct Terminal {
    keyboard: File,
    line: OwnedFd,
}

impl Terminal {
    pub(crate) fn new() -> Self {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keyboard).unwrap();
        unlockpt(&keyboard).unwrap();
        let name = ptsname(&keyboard, Vec::new()).unwrap();
        let line = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        Terminal {
            keyboard: keyboard.into(),
            line,
        }
    }

    pub(crate) fn settings(&self) -> Termios {
        tcgetattr(&self.line).unwrap()
    }

    fn up(&self, folder: &Folder, toml: &str) -> Vm {
        self.start(folder.command(toml))
    }

    /// Starts a program in the foreground of this terminal.
    pub(crate) fn start(&self, mut command: Command) -> Vm {
        let stdio = || Stdio::from(self.line.try_clone().unwrap());
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // A session of its own, in the foreground of this terminal, as a shell's job would be.
        let own_terminal = || {
            setsid()?;
            Ok(ioctl_tiocsctty(rustix::stdio::stdin())?)
        };
        // SAFETY: between fork and exec only two system calls are made; nothing is allocated or locked.
        unsafe { command.pre_exec(own_terminal) };
        let child = command.spawn().unwrap();
        let screen = watch("terminal", self.keyboard.try_clone().unwrap());
        Vm::attach(child, screen).with_input(self.keyboard.try_clone().unwrap())
    }

    /// Checks that the settings are what they were.
    pub(crate) fn is_restored(&self, before: &Termios) {
        let after = self.settings();
        assert_eq!(
            (after.input_modes, after.output_modes, after.control_modes),
            (
                before.input_modes,
                before.output_modes,
                before.control_modes
            )
        );
        assert_eq!(after.local_modes, before.local_modes);
    }
}

pub(crate) const CTRL_BRACKET: [u8; 1] = [0x1d];

fn ctrl_bracket_on_a_terminal_presses_the_power_button() {
    let (folder, terminal) = (Folder::new(), Terminal::new());
    let before = terminal.settings();
    let mut vm = terminal.up(&folder, GUEST);
    vm.ready();
    let raw = terminal.settings().local_modes;
    assert!(!raw.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
    // Ctrl-C is the guest's.
    vm.send("sleep 1000\n");
    thread::sleep(Duration::from_secs(1));
    vm.send([3]);
    assert_eq!(vm.run("echo still here"), "still here");
    vm.send(CTRL_BRACKET);
    vm.wait_for("lab: power button");
    assert_eq!(vm.exit(), 0);
    terminal.is_restored(&before);
}

fn second_ctrl_bracket_ends_the_vm() {
    let (folder, terminal) = (Folder::new(), Terminal::new());
    let before = terminal.settings();
    let mut vm = terminal.up(&folder, GUEST);
    vm.ready();
    vm.run("kill $(cat /run/button)");
    vm.send(CTRL_BRACKET);
    thread::sleep(Duration::from_secs(1));
    assert!(vm.alive(), "one Ctrl-] has ended a guest that ignores it");
    vm.send(CTRL_BRACKET);
    assert_eq!(vm.exit(), 1);
    terminal.is_restored(&before);
}

fn terminal_is_restored_after_a_signal() {
    for signal in [Signal::INT, Signal::HUP] {
        let (folder, terminal) = (Folder::new(), Terminal::new());
        let before = terminal.settings();
        let mut vm = terminal.up(&folder, GUEST);
        vm.ready();
        vm.signal(signal);
        vm.exit();
        terminal.is_restored(&before);
    }
}

fn terminal_is_restored_after_an_error() {
    let (folder, terminal) = (Folder::new(), Terminal::new());
    let before = terminal.settings();
    let mut vm = terminal.up(&folder, GUEST);
    vm.ready();
    vm.send("echo c >/proc/sysrq-trigger\n");
    assert_eq!(vm.exit(), 34);
    terminal.is_restored(&before);
}
