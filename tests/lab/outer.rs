//! Carries the lab into the outer machine and passes on what it prints there.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::{self, repository};
use crate::runner::{self, Case};

/// How long all cases may take. What runs then is ended by force.
const LIMIT: Duration = Duration::from_secs(3600);

/// How often the outer machine may be lost. What makes emulation lose a guest ([`runner`] tells what was
/// seen) can hit the outer machine's own kernel as well: it panics with its CPU's state half its guest's,
/// or stands still. The cases that had not passed run in another one; what is lost so often fails.
const MACHINES: usize = 3;

/// A machine that has printed nothing for so long is lost: the runner inside prints [`runner::ALIVE`] every
/// few seconds.
const SILENCE: Duration = Duration::from_secs(240);

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

/// Runs the cases in the outer machine. True if all passed: each has said so, and the machine ended with 0.
pub(crate) fn run(cases: &[Case], filtered: usize) -> bool {
    let started = Instant::now();
    println!("this host's KVM cannot boot a stock kernel: running in the outer machine");
    let files = guest::files();
    let launcher = strip(&guest::launcher(), &files.join("launcher"));
    let lab = strip(&std::env::current_exe().unwrap(), &files.join("lab"));
    let mut left = cases.to_vec();
    let mut succeeded = false;
    for machine in 1..=MACHINES {
        let limit = LIMIT.saturating_sub(started.elapsed());
        let command = machine_for(&left, &launcher, &lab, limit);
        if let End::Finished(status) = watch(command, limit, &mut left) {
            succeeded = status.success();
            break;
        }
        println!(
            "{}: outer machine {machine} of {MACHINES} was lost before {} cases had passed; its console: {}",
            if machine < MACHINES { "again" } else { "error" },
            left.len(),
            files.join("outer.log").display()
        );
    }
    let all = succeeded && left.is_empty();
    let failed = left.len().max(usize::from(!all));
    runner::summary(
        cases.len() - left.len(),
        failed,
        filtered,
        started.elapsed(),
    );
    all
}

/// The command that runs the cases in an outer machine.
fn machine_for(cases: &[Case], launcher: &Path, lab: &Path, limit: Duration) -> Command {
    let files = guest::files();
    // setpriv: the machine ends with this process, however that ends.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "TERM"])
        .arg(repository().join("scripts/outer"))
        .args(["--timeout", &limit.as_secs().max(1).to_string(), "--log"])
        .arg(files.join("outer.log"));
    for program in PROGRAMS.iter().map(Path::new).chain([launcher, lab]) {
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
        .arg(lab)
        .arg("--exact")
        .args(cases.iter().map(|case| case.name));
    command
}

/// How a machine ended.
enum End {
    /// With the runner's closing line, and this status.
    Finished(ExitStatus),
    /// Before its cases did.
    Lost,
}

/// Passes on what the machine prints, and takes each case that passed out of `left`.
fn watch(mut command: Command, limit: Duration, left: &mut Vec<Case>) -> End {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });

    let mut finished = false;
    loop {
        let line = match lines.recv_timeout(SILENCE) {
            Ok(line) if started.elapsed() <= limit + SILENCE => line,
            Ok(_) | Err(RecvTimeoutError::Timeout) => {
                println!("error: the outer machine stands still");
                let _ = terminate(&mut child);
                break;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if line == runner::ALIVE {
            continue;
        }
        let passed = passed(&line).and_then(|name| left.iter().position(|case| case.name == name));
        if let Some(passed) = passed {
            left.remove(passed);
        }
        // Its count of filtered cases is that of the machine inside; the closing line is printed here.
        if line.starts_with("test result:") {
            finished = true;
        } else {
            println!("{line}");
        }
    }
    let ended = child.wait().unwrap();
    if finished {
        End::Finished(ended)
    } else {
        End::Lost
    }
}

/// The case that the line says has passed.
fn passed(line: &str) -> Option<&str> {
    let (name, verdict) = line.strip_prefix("test ")?.split_once(" ... ")?;
    verdict.starts_with("ok").then_some(name)
}

/// Ends the machine as `timeout` does, and what does not end so.
fn terminate(child: &mut Child) -> std::io::Result<ExitStatus> {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    for _ in 0..100 {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        thread::sleep(Duration::from_millis(100));
    }
    child.kill()?;
    child.wait()
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
