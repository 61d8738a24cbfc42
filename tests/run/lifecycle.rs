//! How a VM ends, and what `launcher` makes of it.

use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::kernel::*;
use crate::vm::{Folder, Vm};

/// The exit code and messages of a VM that runs `code`.
fn end_of(code: &[u8]) -> (i32, String) {
    Folder::new(code, "").up().end()
}

#[test]
fn power_off_ends_with_0_and_no_word() {
    assert_eq!(end_of(&power_off()), (0, String::new()));
}

#[test]
fn a_triple_fault_ends_with_33_and_says_so() {
    let (code, said) = end_of(&triple_fault());
    assert_eq!(
        (code, &*said),
        (33, "launcher: guest `vm` crashed (triple fault)\n")
    );
}

#[test]
fn a_panic_ends_with_34_and_says_so() {
    let (code, said) = end_of(&panic());
    assert_eq!((code, &*said), (34, "launcher: guest `vm` panicked\n"));
}

#[test]
fn all_vcpus_end_with_the_vm() {
    let folder = Folder::new(&[print("up"), power_off()].concat(), "cpus = 8");
    assert_eq!(folder.up().end(), (0, String::new()));
}

/// The same process, with no more open files and threads than before.
#[test]
fn reboots_leave_nothing_behind() {
    const REBOOTS: usize = 100;
    // Between two machines there are less of them, and the kernel's own threads for io_uring come
    // and go: what a reboot leaves behind is there a hundred times.
    const NOISE: usize = REBOOTS / 5;
    let disk = "[[block]]\npath = \"disk.raw\"\nsize = \"1MiB\"";
    let folder = Folder::new(&[print("up\r\n"), reset()].concat(), disk);
    let mut vm = folder.up();
    vm.out.wait_for("up\r\n", 2);
    let before = ["fd", "task"].map(|folder| vm.count(folder));
    vm.out.wait_for("up\r\n", 2 + REBOOTS);
    let after = ["fd", "task"].map(|folder| vm.count(folder));
    assert!(
        after[0] <= before[0] + NOISE && after[1] <= before[1] + NOISE,
        "open files and threads were {before:?}, are {after:?}"
    );
    vm.signal(Signal::TERM);
    assert_eq!(
        vm.exit(),
        0,
        "a guest that is asked to stop does not start anew"
    );
}

#[test]
fn on_reboot_stop_ends_with_0() {
    let folder = Folder::new(&reset(), "lifecycle.on_reboot = \"stop\"");
    assert_eq!(folder.up().end(), (0, String::new()));
}

#[test]
fn a_reboot_without_its_kernel_is_an_error_that_loses_no_output() {
    let code = [read_key(), print("the last words\r\n"), reset()].concat();
    let folder = Folder::new(&code, "");
    let mut vm = folder.up();
    fs::remove_file(folder.path("kernel")).unwrap();
    // If it was removed before the first start already, that is the same error without words.
    vm.type_in("x");
    let (code, out) = (vm.exit(), vm.out.whole());
    let said = vm.err.whole();
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("cannot open the kernel"), "{said}");
    assert!(out.is_empty() || out == "the last words\r\n", "{out:?}");
}

#[test]
fn sigterm_presses_the_power_button() {
    let folder = Folder::new(&[wait_for_button(), power_off()].concat(), "");
    let vm = folder.up();
    vm.out.wait_for("armed", 1);
    vm.signal(Signal::TERM);
    assert_eq!(vm.end(), (0, String::new()));
}

#[test]
fn a_second_sigterm_ends_a_guest_that_never_leaves_its_code() {
    for code in [spin(), halt(), forever(&print("x"))] {
        let folder = Folder::new(&[print("up\r\n"), code].concat(), "cpus = 2");
        let mut vm = folder.up();
        vm.out.wait_for("up\r\n", 1);
        vm.signal(Signal::TERM);
        thread::sleep(Duration::from_millis(300));
        assert!(vm.alive(), "one SIGTERM ended it");
        vm.signal(Signal::TERM);
        let (code, said) = vm.end();
        assert_eq!(code, 1);
        assert!(said.contains("ended by force: a second SIGTERM"), "{said}");
    }
}

#[test]
fn signals_that_the_parent_has_blocked_work() {
    let folder = Folder::new(&[print("up\r\n"), spin()].concat(), "");
    let mut command = std::process::Command::new("env");
    let piped = std::process::Stdio::piped;
    command
        .args(["--block-signal", env!("CARGO_BIN_EXE_launcher"), "up"])
        .arg("--force")
        .current_dir(folder.path(""))
        .env("XDG_RUNTIME_DIR", folder.path(""))
        .stdin(std::process::Stdio::null());
    let vm = Vm::spawn(command.stdout(piped()).stderr(piped()));
    vm.out.wait_for("up\r\n", 1);
    vm.signal(Signal::TERM);
    thread::sleep(Duration::from_millis(300));
    vm.signal(Signal::TERM);
    assert_eq!(vm.end().0, 1);
}

#[test]
fn a_closed_window_hangs_up_twice_and_means_one_press() {
    let code = [
        wait_for_button(),
        print("pressed\r\n"),
        read_key(),
        power_off(),
    ]
    .concat();
    let mut vm = Folder::new(&code, "").up();
    vm.out.wait_for("armed", 1);
    vm.signal(Signal::HUP);
    vm.out.wait_for("pressed", 1);
    vm.signal(Signal::HUP);
    thread::sleep(Duration::from_millis(300));
    vm.type_in("x");
    assert_eq!(vm.end(), (0, String::new()));
}

#[test]
fn signals_that_the_parent_ignores_stay_ignored() {
    let folder = Folder::new(&[print("up\r\n"), echo()].concat(), "");
    let launcher = env!("CARGO_BIN_EXE_launcher");
    let script = format!("trap '' HUP INT QUIT; exec {launcher} up --force");
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-c", &script])
        .current_dir(folder.path(""))
        .env("XDG_RUNTIME_DIR", folder.path(""));
    let piped = std::process::Stdio::piped;
    let mut vm = Vm::spawn(shell.stdin(piped()).stdout(piped()).stderr(piped()));
    vm.out.wait_for("up\r\n", 1);
    for signal in [Signal::HUP, Signal::INT, Signal::QUIT] {
        vm.signal(signal);
    }
    vm.type_in("still here");
    vm.out.wait_for("still here", 1);
    assert!(vm.alive());
}

#[test]
fn stop_timeout_ends_a_guest_that_ignores_the_button() {
    let code = [print("up\r\n"), spin()].concat();
    let folder = Folder::new(&code, "lifecycle.stop_timeout = \"500ms\"");
    let vm = folder.up();
    vm.out.wait_for("up\r\n", 1);
    let asked = Instant::now();
    vm.signal(Signal::TERM);
    let (code, said) = vm.end();
    assert!(asked.elapsed() >= Duration::from_millis(500));
    assert_eq!(code, 1);
    assert!(said.contains("it did not power off within 500ms"), "{said}");
}

#[test]
fn sigkill_leaves_nothing_in_the_way() {
    let disk = "[[block]]\npath = \"disk.raw\"\nsize = \"1MiB\"";
    let folder = Folder::new(&[print("up\r\n"), halt()].concat(), disk);
    for _ in 0..3 {
        let mut vm = folder.up();
        vm.out.wait_for("up\r\n", 1);
        vm.signal(Signal::KILL);
        assert_eq!(vm.exit(), -9);
    }
}

#[test]
fn a_disk_in_use_is_refused_with_its_place() {
    let disk = "[[block]]\npath = \"disk.raw\"\nsize = \"1MiB\"";
    let folder = Folder::new(&[print("up\r\n"), halt()].concat(), disk);
    let first = folder.up();
    first.out.wait_for("up\r\n", 1);
    let toml = fs::read(folder.path("vm.toml")).unwrap();
    fs::write(folder.path("other.toml"), toml).unwrap();
    let mut command = folder.command();
    command
        .arg("other.toml")
        .stderr(std::process::Stdio::piped());
    let (code, said) = Vm::spawn(&mut command).end();
    assert!(matches!(code, 1 | 2), "{code}");
    assert!(said.contains("disk.raw"), "{said}");
}

#[test]
fn thirty_disks_need_no_raised_limit_of_open_files() {
    let disks: String = (0..30)
        .map(|disk| format!("[[block]]\npath = \"{disk}.raw\"\nsize = \"1MiB\"\nqueues = 4\n"))
        .collect();
    let folder = Folder::new(&power_off(), &disks);
    let launcher = env!("CARGO_BIN_EXE_launcher");
    let mut shell = std::process::Command::new("sh");
    let script = format!("ulimit -Sn 64; exec {launcher} up --force");
    let vm = Vm::spawn(
        shell
            .args(["-c", &script])
            .current_dir(folder.path(""))
            .env("XDG_RUNTIME_DIR", folder.path(""))
            .stderr(std::process::Stdio::piped()),
    );
    assert_eq!(vm.end(), (0, String::new()));
}

#[test]
fn the_end_is_told_by_the_exit_code_where_nobody_reads_messages() {
    for (code, exit) in [(triple_fault(), 33), (panic(), 34)] {
        let folder = Folder::new(&code, "");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut vm = Vm::spawn(folder.command().stderr(writer));
        assert_eq!(vm.exit(), exit);
    }
}

#[test]
fn warnings_that_nobody_reads_do_not_stop_the_guest() {
    let bad_sleep = out(0x600, 3 << 2 | 1 << 5); // sleep type 3 is not offered
    let code = [bad_sleep, print("went on\r\n"), power_off()].concat();
    let folder = Folder::new(&code, "");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = folder.command();
    let mut vm = Vm::spawn(command.stdout(std::process::Stdio::piped()).stderr(writer));
    assert_eq!(vm.exit(), 0);
    assert_eq!(vm.out.whole(), "went on\r\n");
}

#[test]
fn a_full_disk_limit_is_the_guests_error_not_our_end() {
    // SIGXFSZ: the host limits the size of files, here of the log.
    let folder = Folder::new(
        &[print(&"x".repeat(3000)), power_off()].concat(),
        "console.log = \"console.log\"",
    );
    File::create(folder.path("console.log")).unwrap();
    let launcher = env!("CARGO_BIN_EXE_launcher");
    let mut shell = std::process::Command::new("sh");
    let script = format!("ulimit -f 1; exec {launcher} up --force");
    let vm = Vm::spawn(
        shell
            .args(["-c", &script])
            .current_dir(folder.path(""))
            .env("XDG_RUNTIME_DIR", folder.path(""))
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped()),
    );
    let (code, said) = vm.end();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("`console.log` cannot be written"), "{said}");
}
