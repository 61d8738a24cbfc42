//! The console on pipes, files and nothing.

use std::fs;
use std::io::Read;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::kernel::*;
use crate::vm::{Folder, PATIENCE, Vm, eventually};

#[test]
fn what_the_guest_prints_is_standard_output() {
    let vm = Folder::new(&[print("hello\r\n\x00\x1b[0m"), power_off()].concat(), "").up();
    assert_eq!(vm.out.whole(), "hello\r\n\x00\x1b[0m");
}

#[test]
fn a_string_instruction_prints_every_byte() {
    let text = "a line of more bytes than the serial port has registers\r\n".repeat(100);
    let vm = Folder::new(&[print_string(&text), power_off()].concat(), "").up();
    assert_eq!(vm.out.whole(), text);
}

#[test]
fn input_from_a_pipe_arrives_whole_and_ctrl_bracket_is_a_byte_of_it() {
    let mut vm = Folder::new(&echo(), "").up();
    let text = "0123456789 \x1d\x1d\r\n".repeat(200);
    vm.type_in(&text);
    vm.close_input();
    let deadline = Instant::now() + PATIENCE;
    while vm.out.wait_for("\n", 1).len() < text.len() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(vm.out.wait_for("\n", 200), text);
    assert!(vm.alive(), "the end of input is no end of the VM");
}

#[test]
fn a_closed_pipe_stops_no_guest() {
    let folder = Folder::new(&[print(&"x".repeat(2000)), power_off()].concat(), "");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = folder.command();
    let vm = Vm::spawn(command.stdout(writer).stderr(Stdio::piped()));
    assert_eq!(vm.end(), (0, String::new()));
}

/// Prints 128 KiB: twice what a pipe holds.
fn more_than_a_pipe_holds() -> Vec<u8> {
    print_string(&("x".repeat(1022) + "\r\n").repeat(128))
}

#[test]
fn a_reader_that_takes_nothing_stops_neither_the_guest_nor_its_end_nor_the_log() {
    let code = [more_than_a_pipe_holds(), print("all printed"), power_off()].concat();
    let folder = Folder::new(&code, "console.log = \"console.log\"");
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = folder.command();
    // Messages go to the same full pipe.
    let mut vm = Vm::spawn(command.stdout(writer.try_clone().unwrap()).stderr(writer));
    assert_eq!(vm.exit(), 0);
    let log = fs::read_to_string(folder.path("console.log")).unwrap();
    assert_eq!(log.len(), (128 << 10) + "all printed".len());
    assert!(log.ends_with("all printed"));
    drop(reader);
}

#[test]
fn a_full_pipe_delays_no_end_by_force() {
    let folder = Folder::new(&forever(&print_string(&"x".repeat(4000))), "");
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = folder.command();
    let mut vm = Vm::spawn(command.stdout(writer.try_clone().unwrap()).stderr(writer));
    thread::sleep(Duration::from_millis(500));
    vm.signal(Signal::TERM);
    thread::sleep(Duration::from_millis(300));
    vm.signal(Signal::TERM);
    assert_eq!(vm.exit(), 1);
    drop(reader);
}

#[test]
fn a_slow_reader_gets_all_of_it() {
    let code = [more_than_a_pipe_holds(), print("all printed"), power_off()].concat();
    let folder = Folder::new(&code, "");
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut vm = Vm::spawn(folder.command().stdout(writer));
    let mut text = Vec::new();
    let mut buffer = [0; 8192];
    // Longer in all than the patience with a reader that takes nothing.
    loop {
        thread::sleep(Duration::from_millis(250));
        match reader.read(&mut buffer).unwrap() {
            0 => break,
            count => text.extend_from_slice(&buffer[..count]),
        }
    }
    assert_eq!(vm.exit(), 0);
    assert_eq!(text.len(), (128 << 10) + "all printed".len());
    assert!(text.ends_with(b"all printed"));
}

#[test]
fn a_guest_that_floods_nobody_takes_no_memory_without_bound() {
    let folder = Folder::new(&forever(&print_string(&"x".repeat(4000))), "");
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = folder.command();
    let vm = Vm::spawn(command.stdout(writer));
    let resident = || {
        let status = fs::read_to_string(format!("/proc/{}/status", vm.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib
    };
    thread::sleep(Duration::from_secs(2));
    // A megabyte waits for the reader, another is on its way.
    assert!(resident() < 40 << 10, "{} KiB", resident());
    drop(reader);
}

#[test]
fn the_log_is_appended_to_and_has_raw_bytes() {
    let folder = Folder::new(
        &[print("one\r\n\x00\x07"), power_off()].concat(),
        "console.log = \"console.log\"",
    );
    assert_eq!(folder.up().end(), (0, String::new()));
    assert_eq!(folder.up().end(), (0, String::new()));
    let log = fs::read(folder.path("console.log")).unwrap();
    assert_eq!(log, b"one\r\n\x00\x07one\r\n\x00\x07");
}

#[test]
fn a_log_that_cannot_be_opened_is_an_error_before_the_guest_runs() {
    let code = [print("ran"), power_off()].concat();
    for (log, what) in [
        ("missing/console.log", "No such file"),
        ("fifo", "No such device"),
    ] {
        let folder = Folder::new(&code, &format!("console.log = \"{log}\""));
        let fifo = folder.path("fifo");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let vm = folder.up();
        let out = vm.out.clone();
        let (code, said) = vm.end();
        assert_eq!((code, &*out.whole()), (2, ""));
        assert!(said.contains("cannot open the console's log"), "{said}");
        assert!(said.contains(what), "{said}");
    }
}

#[test]
fn a_log_that_is_a_disk_or_the_kernel_is_refused() {
    for (log, name) in [("disk.raw", "disk.raw"), ("link", "kernel")] {
        let disk = "[[block]]\npath = \"disk.raw\"\nsize = \"1MiB\"";
        let folder = Folder::new(&[print("x"), power_off()].concat(), disk);
        let toml = fs::read_to_string(folder.path("vm.toml")).unwrap();
        let toml = format!("console.log = \"{log}\"\n{toml}");
        fs::write(folder.path("vm.toml"), toml).unwrap();
        fs::hard_link(folder.path("kernel"), folder.path("link")).unwrap();
        let (code, said) = folder.up().end();
        assert_eq!(code, 2, "{said}");
        assert!(said.contains("is the same file as"), "{said}");
        assert!(said.contains(name), "{said}");
    }
}

#[test]
fn without_a_console_the_guest_runs_and_input_is_left_alone() {
    let code = [print("nobody listens"), power_off()].concat();
    let folder = Folder::new(&code, "console.mode = \"off\"");
    let vm = folder.up();
    let out = vm.out.clone();
    assert_eq!(vm.end(), (0, String::new()));
    assert_eq!(out.whole(), "");
}

#[test]
fn input_that_came_while_the_port_was_in_loopback_is_not_stuck() {
    let loopback_on = out(0x3fc, 0x10);
    let loopback_off = out(0x3fc, 0);
    // While in loopback the port takes nothing; no interrupt tells when that has passed.
    let pause: Vec<u8> = out(0x80, 0).repeat(2000);
    let code = [
        loopback_on,
        pause,
        loopback_off,
        print_string("on\r\n"),
        echo(),
    ];
    let mut vm = Folder::new(&code.concat(), "").up();
    vm.type_in("typed early\r\n");
    vm.out.wait_for("on\r\n", 1);
    vm.out.wait_for("typed early\r\n", 1);
    eventually("it is alive", || vm.alive());
}
