//! QEMU's emulation of a computer, with a stock Linux kernel in it and a shell to which a test speaks.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::Folder;

const QEMU: &str = "qemu-system-x86_64";
const MISSING: &str = "qemu-system-x86_64 is needed; run: scripts/install-packages";

/// How long anything in an emulated machine may take: it is slow, and not alone.
const PATIENCE: Duration = Duration::from_secs(400);

/// One at a time: each has more threads than a small host has processors.
static ONE: Mutex<()> = Mutex::new(());

/// A machine, ended when it is dropped.
pub(crate) struct Machine {
    qemu: Child,
    shell: ChildStdin,
    lines: Receiver<String>,
    /// What QEMU says, and what the kernel.
    said: PathBuf,
    console: PathBuf,
    _one: MutexGuard<'static, ()>,
}

/// The folder with kernel and initramfs, which are made once.
fn files() -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let made = MADE.get_or_init(|| {
        let script = root.join("tests/serve/linux/prepare");
        let status = Command::new(&script).status().unwrap();
        assert!(status.success(), "{}: {status}", script.display());
        root.join(".work/serve")
    });
    made.clone()
}

/// How QEMU is told to connect again: since 9.2 in milliseconds.
fn reconnect() -> &'static str {
    let output = Command::new(QEMU).arg("--version").output();
    let output = output.unwrap_or_else(|error| match error.kind() {
        ErrorKind::NotFound => panic!("{MISSING}"),
        _ => panic!("{QEMU}: {error}"),
    });
    let text = String::from_utf8(output.stdout).unwrap();
    let number = text.split_whitespace().nth(3).unwrap_or_default();
    let mut parts = number.split('.').map_while(|part| part.parse::<u32>().ok());
    match (parts.next(), parts.next()) {
        (Some(major), Some(minor)) if (major, minor) >= (9, 2) => "reconnect-ms=100",
        _ => "reconnect=1",
    }
}

impl Machine {
    /// Boots, with the disk that is served in `folder` at `disk.sock`.
    pub(crate) fn boot(folder: &Folder, queues: usize) -> Machine {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let files = files();
        let console = folder.path("console.log");
        let said = folder.path("qemu.log");
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", QEMU])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-cpu", "max", "-m", "768M"])
            .args([
                "-accel",
                "tcg,thread=multi",
                "-machine",
                "q35,memory-backend=ram",
            ])
            .args(["-object", "memory-backend-memfd,id=ram,size=768M,share=on"])
            .args(["-smp", &queues.to_string()])
            .arg("-kernel")
            .arg(files.join("vmlinuz"))
            .arg("-initrd")
            .arg(files.join("initrd.img"))
            .args(["-append", "console=ttyS0 panic=-1 nokaslr mitigations=off"])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .args([
                "-chardev",
                "stdio,id=shell,signal=off",
                "-serial",
                "chardev:shell",
            ])
            .arg("-chardev")
            .arg(format!(
                "socket,id=disk,path={},{}",
                folder.path("disk.sock").display(),
                reconnect()
            ))
            .arg("-device")
            .arg(format!(
                "vhost-user-blk-pci,chardev=disk,num-queues={queues}"
            ))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&said).unwrap());
        let mut qemu = command.spawn().unwrap();
        let output = BufReader::new(qemu.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let machine = Machine {
            shell: qemu.stdin.take().unwrap(),
            qemu,
            lines,
            said,
            console,
            _one: one,
        };
        while machine.line() != "ready" {}
        machine
    }

    /// The next line that the shell prints.
    fn line(&self) -> String {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => line.trim_end().into(),
            Err(error) => {
                let qemu = fs::read_to_string(&self.said).unwrap_or_default();
                panic!(
                    "the guest says nothing: {error}\n{qemu}\n{}",
                    self.console()
                )
            }
        }
    }

    /// What its kernel has printed.
    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into()
    }

    /// Runs a command in the guest: its exit code and what it prints.
    pub(crate) fn run(&mut self, command: &str) -> (i32, String) {
        writeln!(self.shell, "{command}").unwrap();
        let mut said = String::new();
        loop {
            let line = self.line();
            if let Some(code) = line.strip_prefix("exit code ") {
                return (code.parse().unwrap(), said);
            }
            said.push_str(&line);
            said.push('\n');
        }
    }

    /// The same, of a command that succeeds.
    pub(crate) fn done(&mut self, command: &str) -> String {
        let (code, said) = self.run(command);
        assert_eq!(code, 0, "{command}: {said}\n{}", self.console());
        said
    }

    /// Has a command done again until it prints this.
    pub(crate) fn until(&mut self, command: &str, done: impl Fn(&str) -> bool) {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let (_, said) = self.run(command);
            if done(said.trim()) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{command}: {said}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
