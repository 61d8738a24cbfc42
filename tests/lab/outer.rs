//! Carries the lab into the outer machine and passes on what it prints there.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::guest::{self, repository};
use crate::runner::{self, Case};

/// Seconds after which the outer machine is ended by force; scripts/outer prints its console then.
const LIMIT: u64 = 3600;

/// Programs with which cases check on the host side what guests have written.
const PROGRAMS: [&str; 6] = [
    "/sbin/e2fsck",
    "/sbin/debugfs",
    "/sbin/mke2fs",
    "/sbin/sfdisk",
    "/usr/bin/qemu-img",
    "/usr/bin/qemu-io",
];

/// Makes the kernel, the test guest and the configurations the cases boot.
pub(crate) fn prepare(cases: &[Case]) -> Result<(), String> {
    let script = repository().join("tests/lab/prepare");
    let debian = needs_debian(cases).then_some("--debian");
    match Command::new(&script).args(debian).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{}: {status}", script.display())),
        Err(error) => Err(format!("{}: {error}", script.display())),
    }
}

/// Whether this host's KVM boots an unmodified kernel: the same test as in scripts/lib.sh.
pub(crate) fn kvm_boots() -> bool {
    let opens = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let hardware = cpuinfo.split_whitespace().any(|w| w == "vmx" || w == "svm");
    opens && hardware && !Path::new("/sys/module/kvm_pvm").exists()
}

/// Runs the cases in the outer machine. True if all passed: its closing line says so and it ended with 0.
pub(crate) fn run(cases: &[Case], filtered: usize) -> bool {
    let started = Instant::now();
    let files = guest::files();
    println!("this host's KVM cannot boot a stock kernel: running in the outer machine");
    let launcher = strip(&guest::launcher(), &files.join("launcher"));
    let lab = strip(&std::env::current_exe().unwrap(), &files.join("lab"));
    let outer = repository().join("scripts/outer");
    let log = files.join("outer.log");
    // setpriv: the machine ends with this process, however that ends.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "TERM"])
        .arg(outer)
        .args(["--timeout", &LIMIT.to_string(), "--log"])
        .arg(&log);
    for program in PROGRAMS.iter().map(Path::new).chain([&*launcher, &*lab]) {
        command.arg("--program").arg(program);
    }
    let mut carried: Vec<_> = ["vmlinuz", "vmlinux", "guest.img", "root.img"]
        .map(|name| files.join(name))
        .into();
    for (config, names) in [
        ("hello", &["vm.toml", "vmlinuz", "initrd.img"][..]),
        ("kernel-dev", &["vm.toml", "vmlinuz", "rootfs"]),
        (
            "blocklab",
            &["vm.toml", "vmlinuz", "initrd.img", "base.img"],
        ),
        ("debian", &["vm.toml"]),
        ("debian-qcow2", &["vm.toml"]),
        ("fleet", &["base.toml", "web.toml", "db.toml", "cache.toml"]),
    ] {
        let folder = repository().join("configs").join(config);
        carried.extend(names.iter().map(|name| folder.join(name)));
    }
    if needs_debian(cases) {
        // A gigabyte is not carried in memory: the image is a disk of the outer machine. Another of it is never
        // written.
        let configs = repository().join("configs");
        for (config, disk, name) in [
            ("debian", "/dev/vda", "root.img"),
            ("debian-qcow2", "/dev/vdb", "base.img"),
            ("fleet", "/dev/vdb", "base.img"),
        ] {
            let place = configs.join(config).join(name);
            if config != "fleet" {
                command.arg("--disk").arg(&place);
            }
            command
                .arg("--link")
                .arg(format!("{disk}={}", place.display()));
        }
    }
    for file in carried.iter().filter(|file| file.exists()) {
        let path = file.display();
        command.arg("--file").arg(format!("{path}={path}"));
    }
    for (name, value) in std::env::vars().filter(|(name, _)| name.starts_with("LAB_")) {
        command.arg("--env").arg(format!("{name}={value}"));
    }
    command
        .arg("--env")
        .arg(format!("{}={}", guest::FILES, files.display()))
        .arg("--env")
        .arg(format!("{}={}", guest::LAUNCHER, launcher.display()))
        .arg("--")
        .arg(&lab)
        .arg("--exact")
        .args(cases.iter().map(|case| case.name));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();

    let (mut passed, mut finished) = (0, false);
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for line in lines.map_while(Result::ok) {
        passed += usize::from(line.starts_with("test ") && line.contains(" ... ok"));
        // Its count of filtered cases is that of the machine inside; the closing line is printed here.
        finished |= line.starts_with("test result:");
        if !line.starts_with("test result:") {
            println!("{line}");
        }
    }
    let ended = child.wait().unwrap();
    if !finished {
        println!(
            "error: the outer machine ended ({ended}) before its cases did; its console: {}",
            log.display()
        );
    }
    let all = finished && ended.success() && passed == cases.len();
    let failed = (cases.len() - passed.min(cases.len())).max(usize::from(!all));
    runner::summary(passed, failed, filtered, started.elapsed());
    all
}

/// Whether one of the cases boots Debian, which takes minutes to make.
fn needs_debian(cases: &[Case]) -> bool {
    let debian = |case: &Case| case.name.contains("debian") || case.name.contains("fleet");
    cases.iter().any(debian)
}

/// A copy without debug information, which is most of the file and would all be carried.
fn strip(program: &Path, to: &Path) -> PathBuf {
    let status = Command::new("strip")
        .args(["--strip-debug", "-o"])
        .args([to, program])
        .status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "strip failed on {}",
        program.display()
    );
    to.to_owned()
}
