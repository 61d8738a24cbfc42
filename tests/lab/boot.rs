//! A stock Debian kernel gets as far as its init, and finds the machine it was promised.

use crate::guest::{Folder, GUEST};
use crate::runner::cases;

cases![boot:
    reaches_init_with_one_vcpu,
    reaches_init_with_two_vcpus,
    reaches_init_with_four_gib,
    elf_vmlinux_boots_by_pvh,
    command_line_is_launchers_then_the_users,
    guest_calibrates_no_clock,
    virtio_rng_feeds_the_kernel,
];

fn reaches_init_with_one_vcpu() {
    let folder = Folder::new();
    let mut vm = folder.up(GUEST);
    vm.ready();
    assert_eq!(vm.run("nproc"), "1");
    vm.power_off();
}

fn reaches_init_with_two_vcpus() {
    let folder = Folder::new();
    let mut vm = folder.up(&format!("cpus = 2\n{GUEST}"));
    vm.ready();
    assert_eq!(vm.run("nproc"), "2");
    // Both run at once, and interrupts reach both.
    vm.run("taskset 1 true && taskset 2 true");
    vm.power_off();
}

/// More than fits below the hole under 4 GiB.
fn reaches_init_with_four_gib() {
    let folder = Folder::new();
    let mut vm = folder.up(&format!("memory = \"4GiB\"\n{GUEST}"));
    vm.ready();
    let total = vm.run("awk '/^MemTotal/ { print $2 }' /proc/meminfo");
    let kib: u64 = total.parse().unwrap();
    assert!((3_500_000..4 << 20).contains(&kib), "MemTotal is {kib} KiB");
    vm.run("grep -q '^0*100000000-.*System RAM' /proc/iomem");
    vm.power_off();
}

fn elf_vmlinux_boots_by_pvh() {
    let folder = Folder::new();
    let mut vm = folder.up(&format!(
        "cpus = 2\n{}",
        GUEST.replace("vmlinuz", "vmlinux")
    ));
    vm.ready();
    assert_eq!(vm.run("nproc"), "2");
    vm.power_off();
}

fn command_line_is_launchers_then_the_users() {
    let folder = Folder::new();
    folder.root_disk("root.img");
    let toml = r#"
        [boot]
        kernel = "vmlinuz"
        initrd = "guest.img"
        cmdline = "quiet lab.word=last"
        [[block]]
        path = "root.img"
        root = true
    "#;
    let mut vm = folder.up(toml);
    vm.ready();
    let line = vm.run("cat /proc/cmdline");
    let words: Vec<_> = line.split(' ').collect();
    for word in ["console=ttyS0", "root=/dev/vda", "rw"] {
        assert!(words.contains(&word), "no {word} in {line:?}");
    }
    assert_eq!(words.last(), Some(&"lab.word=last"), "{line:?}");
    vm.power_off();
}

/// TSC and local APIC frequency come from CPUID or the KVM clock.
fn guest_calibrates_no_clock() {
    let folder = Folder::new();
    let mut vm = folder.up(GUEST);
    vm.ready();
    let log = vm.run("dmesg | grep -iE 'kvm-clock:|calibrati'");
    assert!(log.contains("kvm-clock: Using msrs"), "no KVM clock: {log}");
    assert!(
        log.contains("Calibrating delay loop (skipped)"),
        "the delay loop was calibrated: {log}"
    );
    for costly in ["TSC calibration", "calibrating APIC timer"] {
        assert!(!log.contains(costly), "{log}");
    }
    assert_eq!(
        vm.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "kvm-clock"
    );
    vm.power_off();
}

fn virtio_rng_feeds_the_kernel() {
    let folder = Folder::new();
    let mut vm = folder.up(GUEST);
    vm.ready();
    assert_eq!(
        vm.run("cat /sys/class/misc/hw_random/rng_current"),
        "virtio_rng.0"
    );
    let hex = vm.run("head -c 32 /dev/hwrng | xxd -p -c 64");
    assert_eq!(hex.len(), 64, "{hex:?}");
    assert_ne!(hex, "0".repeat(64));
    vm.power_off();
}
