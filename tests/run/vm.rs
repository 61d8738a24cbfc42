//! A `launcher up` under test, and what it talks to: pipes or a terminal.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, tcgetattr};
use tempfile::TempDir;

use crate::kernel;

/// How long anything may take: far more than it needs, on a machine that is busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with a kernel, and `vm.toml` to boot it.
#[derive(Clone)]
pub(crate) struct Folder(Arc<TempDir>);

impl Folder {
    /// A VM that runs `code`, with these lines in its file.
    pub(crate) fn new(code: &[u8], toml: &str) -> Folder {
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            panic!("these tests run VMs, but /dev/kvm: {error} (see `launcher doctor`)");
        }
        let folder = Folder(Arc::new(tempfile::tempdir().unwrap()));
        fs::write(folder.path("kernel"), kernel::bzimage(code)).unwrap();
        let toml = format!("memory = \"16MiB\"\nboot.kernel = \"kernel\"\n{toml}");
        fs::write(folder.path("vm.toml"), toml).unwrap();
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `launcher up`, with nothing connected.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_launcher"));
        command
            .args(["up", "--force"])
            .current_dir(self.0.path())
            .env_remove("LAUNCHER_LOG")
            .env("XDG_RUNTIME_DIR", self.0.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// The folder of its VM, once there is one.
    pub(crate) fn place(&self) -> Option<PathBuf> {
        let mut places = fs::read_dir(self.path("launcher")).ok()?;
        Some(places.next()?.ok()?.path())
    }

    /// Starts it with pipes on all ends.
    pub(crate) fn up(&self) -> Vm {
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut vm = Vm::spawn(command.stderr(Stdio::piped()));
        vm.folder = Some(self.clone());
        vm
    }
}

/// What was printed so far.
#[derive(Clone, Default)]
pub(crate) struct Printed(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

impl Printed {
    /// Reads `from` to its end, on a thread of its own.
    fn watch(mut from: File) -> Printed {
        let printed = Printed::default();
        let shared = printed.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let count = from.read(&mut buffer).unwrap_or(0);
                let mut state = shared.0.state.lock().unwrap();
                state.bytes.extend_from_slice(&buffer[..count]);
                state.ended = count == 0;
                shared.0.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        printed
    }

    /// What there is of it.
    pub(crate) fn so_far(&self) -> String {
        self.until("anything", |_, _| true)
    }

    /// All of it, once it has come to its end.
    pub(crate) fn whole(&self) -> String {
        self.until("its end", |_, ended| ended)
    }

    /// Waits until `text` is printed `count` times; returns all there is then.
    pub(crate) fn wait_for(&self, text: &str, count: usize) -> String {
        self.until(text, |printed, _| printed.matches(text).count() >= count)
    }

    fn until(&self, what: &str, enough: impl Fn(&str, bool) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.0.state.lock().unwrap();
        loop {
            let text = String::from_utf8_lossy(&state.bytes).into_owned();
            if enough(&text, state.ended) {
                return text;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero() && !state.ended,
                "waited for {what:?} in vain: {text:?}"
            );
            state = self.0.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

/// A `launcher up`. It is killed when a test is through with it.
pub(crate) struct Vm {
    child: Child,
    input: Option<File>,
    /// Kept for as long as it runs.
    folder: Option<Folder>,
    pub(crate) out: Printed,
    pub(crate) err: Printed,
}

impl Vm {
    pub(crate) fn spawn(command: &mut Command) -> Vm {
        let mut child = command.spawn().unwrap();
        let watch = |end: Option<OwnedFd>| end.map(|end| Printed::watch(end.into()));
        Vm {
            input: child.stdin.take().map(|end| OwnedFd::from(end).into()),
            out: watch(child.stdout.take().map(Into::into)).unwrap_or_default(),
            err: watch(child.stderr.take().map(Into::into)).unwrap_or_default(),
            child,
            folder: None,
        }
    }

    pub(crate) fn type_in(&mut self, bytes: impl AsRef<[u8]>) {
        let input = self.input.as_mut().unwrap();
        input.write_all(bytes.as_ref()).unwrap();
    }

    pub(crate) fn close_input(&mut self) {
        self.input = None;
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The state of the process, as /proc/PID/stat has it: `T` is stopped.
    pub(crate) fn state(&self) -> char {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
        let (_, rest) = stat.rsplit_once(") ").unwrap();
        rest.chars().next().unwrap()
    }

    /// The number of entries in a folder of /proc/PID.
    pub(crate) fn count(&self, folder: &str) -> usize {
        let folder = format!("/proc/{}/{folder}", self.id());
        fs::read_dir(folder).unwrap().count()
    }

    pub(crate) fn alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end: the exit code, or minus the signal that ended it.
    pub(crate) fn exit(&mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status
                    .code()
                    .unwrap_or_else(|| -status.signal().unwrap_or_default());
            }
            assert!(Instant::now() < deadline, "launcher does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its exit code and its messages.
    pub(crate) fn end(mut self) -> (i32, String) {
        (self.exit(), self.err.whole())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Fails only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until something is so.
pub(crate) fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A terminal with `launcher` on it, alone in its session.
pub(crate) struct Terminal {
    keyboard: File,
    line: OwnedFd,
}

impl Terminal {
    pub(crate) fn new() -> Terminal {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let keyboard = openpt(flags).unwrap();
        grantpt(&keyboard).unwrap();
        unlockpt(&keyboard).unwrap();
        let name = ptsname(&keyboard, Vec::new()).unwrap();
        let line = rustix::fs::open(
            name,
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap();
        Terminal {
            keyboard: keyboard.into(),
            line,
        }
    }

    pub(crate) fn stdio(&self) -> Stdio {
        self.line.try_clone().unwrap().into()
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings::of(&tcgetattr(&self.line).unwrap())
    }

    /// Starts `launcher` in the foreground of this terminal, which is on its standard input.
    pub(crate) fn up(&self, command: &mut Command) -> Vm {
        // SAFETY: setsid and ioctl are async-signal-safe, and nothing else is called.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let mut vm = Vm::spawn(command.stdin(self.stdio()));
        vm.input = Some(self.keyboard.try_clone().unwrap());
        vm
    }

    /// The same with everything on the terminal.
    pub(crate) fn up_on_all(&self, folder: &Folder) -> Vm {
        let mut command = folder.command();
        let mut vm = self.up(command.stdout(self.stdio()).stderr(self.stdio()));
        vm.out = Printed::watch(self.keyboard.try_clone().unwrap());
        vm
    }
}

/// The settings of a terminal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Settings(String);

impl Settings {
    fn of(termios: &Termios) -> Settings {
        Settings(format!(
            "{:?} {:?} {:?} {:?}",
            termios.input_modes, termios.output_modes, termios.control_modes, termios.local_modes
        ))
    }
}
