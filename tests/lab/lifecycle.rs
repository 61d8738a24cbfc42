//! Life and death: how a VM ends, and what `launcher` makes of it.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::guest::{Folder, GUEST};
use crate::runner::cases;

cases![lifecycle:
    guest_power_off_ends_with_0,
    guest_reboot_restarts_in_the_same_process,
    on_reboot_stop_ends_with_0,
    sigterm_presses_the_power_button,
    second_sigterm_ends_the_vm,
    stop_timeout_ends_the_vm,
    kernel_panic_ends_with_34,
    triple_fault_ends_with_33,
    sigkill_leaves_nothing_in_the_way,
];

fn guest_power_off_ends_with_0() {
    let folder = Folder::new();
    let mut vm = folder.up(&format!("cpus = 2\n{GUEST}"));
    vm.ready();
    vm.power_off();
}

fn guest_reboot_restarts_in_the_same_process() {
    let folder = Folder::new();
    folder.image("data.img", 1 << 20);
    let mut vm = folder.up(&format!(
        "cpus = 2\n{GUEST}\n[[block]]\npath = \"data.img\""
    ));
    vm.ready();
    let process = vm.id();
    let threads = threads(process);
    let descriptors = descriptors(process);
    for round in 1..=2 {
        vm.run(&format!("touch /tmp/{round}; echo {round} >/dev/vda; sync"));
        vm.send("reboot -f\n");
        vm.ready();
        let (status, _) = vm.attempt(&format!("test -e /tmp/{round}"));
        assert_ne!(status, 0, "the guest has not started anew");
        assert_eq!(vm.run("head -n 1 /dev/vda"), round.to_string());
        assert_eq!(vm.run("nproc"), "2");
    }
    assert!(vm.alive());
    assert_eq!(self::threads(process), threads, "threads after two reboots");
    assert_eq!(
        self::descriptors(process),
        descriptors,
        "open files after two reboots"
    );
    vm.power_off();
}

fn on_reboot_stop_ends_with_0() {
    let folder = Folder::new();
    let mut vm = folder.up(&format!("{GUEST}\n[lifecycle]\non_reboot = \"stop\""));
    vm.ready();
    vm.send("reboot -f\n");
    assert_eq!(vm.exit(), 0, "{}", vm.errors());
}

fn sigterm_presses_the_power_button() {
    let folder = Folder::new();
    let mut vm = folder.up(GUEST);
    vm.ready();
    vm.signal(Signal::TERM);
    vm.wait_for("lab: power button");
    assert_eq!(vm.exit(), 0, "{}", vm.errors());
}

fn second_sigterm_ends_the_vm() {
    let folder = Folder::new();
    folder.image("data.img", 1 << 20);
    let mut vm = folder.up(&format!("{GUEST}\n[[block]]\npath = \"data.img\""));
    vm.ready();
    ignore_button(&mut vm);
    vm.run("echo kept | dd of=/dev/vda conv=sync,fsync 2>/dev/null");
    vm.signal(Signal::TERM);
    thread::sleep(Duration::from_secs(2));
    assert!(vm.alive(), "one SIGTERM has ended a guest that ignores it");
    let asked = Instant::now();
    vm.signal(Signal::TERM);
    ended_by_force(&mut vm);
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "it took {:?}",
        asked.elapsed()
    );
    assert!(
        fs::read(folder.path("data.img"))
            .unwrap()
            .starts_with(b"kept\n")
    );
}

fn stop_timeout_ends_the_vm() {
    let folder = Folder::new();
    let mut vm = folder.up(&format!("{GUEST}\n[lifecycle]\nstop_timeout = \"3s\""));
    vm.ready();
    ignore_button(&mut vm);
    let asked = Instant::now();
    vm.signal(Signal::TERM);
    ended_by_force(&mut vm);
    let took = asked.elapsed();
    assert!(
        took >= Duration::from_secs(3),
        "it ended after {took:?} already"
    );
    assert!(took < Duration::from_secs(20), "it took {took:?}");
}

fn kernel_panic_ends_with_34() {
    let folder = Folder::new();
    let mut vm = folder.up(GUEST);
    vm.ready();
    vm.send("echo c >/proc/sysrq-trigger\n");
    assert_eq!(vm.exit(), 34);
    assert!(vm.errors().contains("panic"), "{:?}", vm.errors());
}

fn triple_fault_ends_with_33() {
    let folder = Folder::new();
    let mut vm = folder.up(&GUEST.replace("quiet", "quiet reboot=t"));
    vm.ready();
    vm.send("reboot -f\n");
    assert_eq!(vm.exit(), 33);
    assert!(vm.errors().contains("triple fault"), "{:?}", vm.errors());
}

fn sigkill_leaves_nothing_in_the_way() {
    let folder = Folder::new();
    folder.root_disk("root.img");
    let toml = format!("{GUEST}\n[[block]]\npath = \"root.img\"\nroot = true");
    let mut vm = folder.up(&toml);
    vm.ready();
    vm.run("echo kept >/kept && sync");
    vm.signal(Signal::KILL);
    assert_eq!(vm.exit(), -9);
    let mut vm = folder.up(&toml);
    vm.ready();
    assert_eq!(vm.run("cat /kept"), "kept");
    vm.power_off();
}

/// Leaves the power button without an answer.
fn ignore_button(vm: &mut crate::guest::Vm) {
    vm.run("kill $(cat /run/button)");
}

/// It ended by its own hand, not by a signal, and says why.
fn ended_by_force(vm: &mut crate::guest::Vm) {
    assert_eq!(vm.exit(), 1, "{}", vm.errors());
    assert!(!vm.errors().trim().is_empty(), "it says nothing");
}

fn threads(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/task"))
        .unwrap()
        .count()
}

fn descriptors(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}
