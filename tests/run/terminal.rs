//! The console on a terminal: keys, job control, and the settings after each way out.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::kernel::*;
use crate::vm::{Folder, Terminal, Vm, eventually};

const CTRL_BRACKET: [u8; 1] = [0x1d];

/// Boots `code` on a terminal, has `then` end it, and checks the settings before and after.
fn on_a_terminal(code: &[u8], then: impl FnOnce(&mut Vm)) -> i32 {
    let (folder, terminal) = (Folder::new(code, ""), Terminal::new());
    let before = terminal.settings();
    let mut vm = terminal.up_on_all(&folder);
    then(&mut vm);
    let code = vm.exit();
    assert_eq!(terminal.settings(), before, "after exit code {code}");
    code
}

#[test]
fn settings_are_restored_after_every_way_out() {
    let up = || print("up\r\n");
    let key = |then: Vec<u8>| [up(), read_key(), then].concat();
    for (then, exit) in [(power_off(), 0), (triple_fault(), 33), (panic(), 34)] {
        let code = on_a_terminal(&key(then), |vm| {
            vm.out.wait_for("up\r\n", 1);
            vm.type_in("x");
        });
        assert_eq!(code, exit);
    }
    for (signal, exit) in [
        (Signal::QUIT, 1),
        (Signal::ABORT, -6),
        (Signal::SEGV, -11),
        (Signal::USR1, -10),
        (Signal::USR2, -12),
        (Signal::ALARM, -14),
        (Signal::XCPU, -24),
    ] {
        let code = on_a_terminal(&[up(), spin()].concat(), |vm| {
            vm.out.wait_for("up\r\n", 1);
            vm.signal(signal);
        });
        assert_eq!(code, exit, "{signal:?}");
    }
}

#[test]
fn keys_reach_the_guest_raw() {
    let terminal = Terminal::new();
    let before = terminal.settings();
    let folder = Folder::new(&[print("up\r\n"), echo()].concat(), "");
    let mut vm = terminal.up_on_all(&folder);
    vm.out.wait_for("up\r\n", 1);
    assert_ne!(terminal.settings(), before);
    vm.type_in("\x03\x1a\x04\x1c\x11\x13q");
    vm.out.wait_for("\x03\x1a\x04\x1c\x11\x13q", 1);
}

#[test]
fn ctrl_bracket_presses_the_power_button() {
    let code = on_a_terminal(&[wait_for_button(), power_off()].concat(), |vm| {
        vm.out.wait_for("armed", 1);
        vm.type_in(CTRL_BRACKET);
    });
    assert_eq!(code, 0);
}

#[test]
fn a_second_ctrl_bracket_ends_a_guest_that_has_not_read_what_was_typed_before() {
    let code = on_a_terminal(&[print("up\r\n"), spin()].concat(), |vm| {
        vm.out.wait_for("up\r\n", 1);
        // More than the serial port takes.
        vm.type_in("is anybody there? ".repeat(10));
        thread::sleep(Duration::from_millis(300));
        vm.type_in(CTRL_BRACKET);
        thread::sleep(Duration::from_millis(300));
        assert!(vm.alive(), "one Ctrl-] ended it");
        vm.type_in(CTRL_BRACKET);
    });
    assert_eq!(code, 1);
}

#[test]
fn a_paste_arrives_whole() {
    let terminal = Terminal::new();
    let folder = Folder::new(&[print("up\r\n"), echo()].concat(), "");
    let mut vm = terminal.up_on_all(&folder);
    vm.out.wait_for("up\r\n", 1);
    let text = "0123456789abcdef\r\n".repeat(300);
    vm.type_in(&text);
    assert!(vm.out.wait_for("\r\n", 301).ends_with(&text));
}

#[test]
fn keys_work_where_standard_output_is_no_terminal() {
    let terminal = Terminal::new();
    let before = terminal.settings();
    let folder = Folder::new(&[print("up\r\n"), echo()].concat(), "");
    let mut command = folder.command();
    let mut vm = terminal.up(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    vm.out.wait_for("up\r\n", 1);
    vm.type_in("typed\r");
    vm.out.wait_for("typed\r", 1);
    vm.type_in([0x1d, 0x1d]);
    assert_eq!(vm.exit(), 1);
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_stopped_vm_gives_the_terminal_back_and_takes_it_again() {
    let terminal = Terminal::new();
    let before = terminal.settings();
    let folder = Folder::new(&[print("up\r\n"), echo()].concat(), "");
    let mut command = folder.command();
    // A session leader cannot be stopped by SIGTSTP alone: a shell stands between.
    let mut vm = terminal.up(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    vm.out.wait_for("up\r\n", 1);
    let raw = terminal.settings();
    vm.signal(Signal::TSTP);
    eventually("it stops", || vm.state() == 'T');
    assert_eq!(terminal.settings(), before);
    vm.signal(Signal::CONT);
    eventually("it is raw again", || terminal.settings() == raw);
    vm.type_in("typed\r");
    vm.out.wait_for("typed\r", 1);
}

#[test]
fn a_job_in_the_background_leaves_the_terminal_alone() {
    let terminal = Terminal::new();
    let before = terminal.settings();
    let folder = Folder::new(
        &[print("up\r\n"), wait_for_button(), power_off()].concat(),
        "",
    );
    let launcher = env!("CARGO_BIN_EXE_launcher");
    // With job control a shell starts it in a process group of its own.
    let script = format!(
        "set -m; {launcher} up --force <&0 & job=$!; sleep 0.1; \
         read line; kill -0 $job && echo read $line >&2; \
         kill -CONT $job; kill -TERM $job; wait $job; echo ended with $? >&2"
    );
    let mut shell = Command::new("bash");
    shell
        .args(["-c", &script])
        .current_dir(folder.path(""))
        .env("XDG_RUNTIME_DIR", folder.path(""))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut vm = terminal.up(&mut shell);
    vm.out.wait_for("armed", 1);
    assert_eq!(terminal.settings(), before);
    vm.type_in("a line for the shell\n");
    vm.err.wait_for("read a line for the shell", 1);
    vm.err.wait_for("ended with 0", 1);
    assert_eq!(vm.exit(), 0);
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_vm_moved_to_the_background_leaves_the_terminal_alone() {
    let terminal = Terminal::new();
    let before = terminal.settings();
    let folder = Folder::new(
        &[print("up\r\n"), wait_for_button(), power_off()].concat(),
        "",
    );
    let launcher = env!("CARGO_BIN_EXE_launcher");
    // Stopped in the foreground, then `bg`.
    let script = format!(
        "set -m; (until grep -q armed out 2>/dev/null; do sleep 0.05; done; kill -STOP $(cat pid)) & \
         sh -c 'echo $$ >pid; exec {launcher} up --force >out'; \
         echo stopped >&2; bg >/dev/null; sleep 0.3; kill -TERM $(cat pid); \
         wait %2; echo ended with $? >&2"
    );
    let mut shell = Command::new("bash");
    shell
        .args(["-c", &script])
        .current_dir(folder.path(""))
        .env("XDG_RUNTIME_DIR", folder.path(""))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut vm = terminal.up(&mut shell);
    vm.err.wait_for("stopped", 1);
    vm.err.wait_for("ended with 0", 1);
    assert_eq!(vm.exit(), 0);
    assert_eq!(terminal.settings(), before);
}
