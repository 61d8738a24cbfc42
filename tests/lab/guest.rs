//! A VM under test: its folder, its `launcher up`, its console.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::hang;
use crate::stream::{Missed, Stream};

/// Environment variable: the folder of kernel and guests. Set where the cases are to run right here.
pub(crate) const FILES: &str = "LAB_FILES";
/// Environment variable: the `launcher` under test, if not the one cargo built.
pub(crate) const LAUNCHER: &str = "LAB_LAUNCHER";
/// Environment variable: set to see all that guest kernels print.
const VERBOSE: &str = "LAB_VERBOSE";

/// How long anything may take. An outer machine on a busy host is slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// The test guest from its initramfs. Without `quiet` each line the kernel prints is hundreds of exits.
pub(crate) const GUEST: &str = r#"
    [boot]
    kernel = "vmlinuz"
    initrd = "guest.img"
    cmdline = "quiet"
"#;

/// Where kernel and guests are.
pub(crate) fn files() -> PathBuf {
    std::env::var_os(FILES).map_or_else(|| repository().join(".work/lab"), PathBuf::from)
}

/// The project's folder; inside the outer machine there is little of it, at the same place.
pub(crate) fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A root disk with Debian that nothing writes: where the cases run in an outer machine, not the one that
/// configs/debian has there.
pub(crate) fn debian_base() -> PathBuf {
    repository().join("configs/debian-qcow2/base.img")
}

/// The `launcher` under test.
pub(crate) fn launcher() -> PathBuf {
    std::env::var_os(LAUNCHER).map_or_else(
        || PathBuf::from(env!("CARGO_BIN_EXE_launcher")),
        PathBuf::from,
    )
}

thread_local! {
    /// The case that runs on this thread, and what its processes print.
    static CASE: RefCell<(&'static str, Vec<(String, Stream)>)> =
        const { RefCell::new(("", Vec::new())) };
}
/// Processes of running cases, for the watchdog.
static LIVE: Mutex<Vec<(&'static str, Pid)>> = Mutex::new(Vec::new());

/// A case begins on this thread.
pub(crate) fn begin(case: &'static str) {
    CASE.with_borrow_mut(|current| *current = (case, Vec::new()));
}

/// The case on this thread has ended.
pub(crate) fn end() {
    CASE.with_borrow_mut(|current| current.1.clear());
}

/// Kills what a case has started, so that its waits end.
pub(crate) fn kill_all(case: &str) {
    for (_, pid) in LIVE
        .lock()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name == case)
    {
        let _ = kill_process(*pid, Signal::KILL);
    }
}

/// The last that the processes of this thread's case have printed.
pub(crate) fn transcripts() -> String {
    CASE.with_borrow(|(_, streams)| {
        let mut text = String::new();
        for (name, stream) in streams {
            let all = stream.text().replace('\r', "");
            let lines: Vec<_> = all.lines().collect();
            text += &format!("\n---- {name}: {} lines\n", lines.len());
            for line in &lines[lines.len().saturating_sub(120)..] {
                text.extend(line.chars().filter(|c| !c.is_control() || *c == '\t'));
                text.push('\n');
            }
        }
        text
    })
}

/// Collects what a process of this thread's case prints.
pub(crate) fn watch(name: &str, source: impl std::io::Read + Send + 'static) -> Stream {
    let stream = Stream::collect(source);
    CASE.with_borrow_mut(|(_, streams)| streams.push((name.to_owned(), stream.clone())));
    stream
}

/// A VM's own folder, with links to the kernel (`vmlinuz`, `vmlinux`) and the test guest (`guest.img`).
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        let folder = Folder(tempfile::tempdir().unwrap());
        for name in ["vmlinuz", "vmlinux", "guest.img"] {
            symlink(files().join(name), folder.path(name)).unwrap();
        }
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    /// An empty image of `len` bytes.
    pub(crate) fn image(&self, name: &str, len: u64) {
        File::create(self.path(name)).unwrap().set_len(len).unwrap();
    }

    /// A root disk of the test guest.
    pub(crate) fn root_disk(&self, name: &str) {
        fs::copy(files().join("root.img"), self.path(name)).unwrap();
    }

    /// What a checked-in configuration boots, as links; its vm.toml.
    pub(crate) fn config(&self, name: &str) -> String {
        let config = repository().join("configs").join(name);
        for file in ["vmlinuz", "initrd.img", "base.img"] {
            let _ = fs::remove_file(self.path(file));
            if config.join(file).exists() {
                symlink(config.join(file), self.path(file)).unwrap();
            }
        }
        fs::read_to_string(config.join("vm.toml")).unwrap_or_default()
    }

    /// `launcher up vm.toml` with this vm.toml.
    pub(crate) fn command(&self, toml: &str) -> Command {
        let toml = if std::env::var_os(VERBOSE).is_some() {
            toml.replace("quiet", "ignore_loglevel")
        } else {
            toml.to_owned()
        };
        self.write("vm.toml", toml);
        self.launcher(&["up", "vm.toml"])
    }

    /// `launcher` with these arguments. Every VM that it sees is of this folder.
    pub(crate) fn launcher(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(launcher());
        command
            .args(arguments)
            .current_dir(self.0.path())
            .env("XDG_RUNTIME_DIR", self.0.path());
        command
    }

    /// Runs a command of `launcher` to its end: its exit code, what it prints and what it complains of.
    pub(crate) fn order(&self, arguments: &[&str]) -> (i32, String, String) {
        let mut process = Vm::start(&mut self.launcher(arguments));
        let code = process.exit();
        let errors = process.errors();
        assert!(
            process.console.wait_for_end(PATIENCE),
            "standard output is still open"
        );
        (code, process.console.text(), errors)
    }

    /// The same for one that has to succeed and to complain of nothing; what it prints.
    pub(crate) fn ordered(&self, arguments: &[&str]) -> String {
        let (code, printed, errors) = self.order(arguments);
        assert_eq!((code, &*errors), (0, ""), "{arguments:?}: {printed}");
        printed
    }

    /// Starts a VM with pipes for its console.
    pub(crate) fn up(&self, toml: &str) -> Vm {
        Vm::start(&mut self.command(toml))
    }

    /// Runs a `launcher up` that is to fail: its exit code and what it says.
    pub(crate) fn refused(&self, toml: &str) -> (i32, String) {
        let mut vm = self.up(toml);
        let code = vm.exit();
        (code, vm.errors())
    }

    /// Runs a program of the host in this folder; panics with what it printed if it fails.
    pub(crate) fn host(&self, program: &str, arguments: &[&str]) -> String {
        let output: Output = Command::new(program)
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}\n{text}{errors}",
            output.status
        );
        text
    }
}

/// A `launcher up` that was started.
pub(crate) struct Vm {
    child: Child,
    /// What it prints on standard output: the guest's console.
    pub(crate) console: Stream,
    stderr: Option<Stream>,
    input: Option<mpsc::Sender<Vec<u8>>>,
    /// Up to here the console has been read.
    at: usize,
    commands: u32,
}

impl Vm {
    /// Starts it with pipes for its console.
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut vm = Vm::silent(command);
        vm.console = watch("console", vm.child.stdout.take().unwrap());
        vm
    }

    /// Starts it with pipes for its console, and reads nothing of what the guest prints.
    pub(crate) fn silent(command: &mut Command) -> Self {
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut vm = Vm::attach(child, Stream::default());
        let unread = vm.child.stdout.as_ref().unwrap();
        rustix::pipe::fcntl_setpipe_size(unread, 4096).unwrap();
        let stdin = vm.child.stdin.take().unwrap();
        vm.input = Some(writer(stdin));
        vm.stderr = Some(watch("stderr", vm.child.stderr.take().unwrap()));
        vm
    }

    /// A process whose console is read elsewhere, as on a terminal.
    pub(crate) fn attach(child: Child, console: Stream) -> Self {
        let case = CASE.with_borrow(|(name, _)| *name);
        LIVE.lock().unwrap().push((case, pid(&child)));
        Vm {
            child,
            console,
            stderr: None,
            input: None,
            at: 0,
            commands: 0,
        }
    }

    /// Takes its input from elsewhere, as on a terminal.
    pub(crate) fn with_input(mut self, sink: impl Write + Send + 'static) -> Self {
        self.input = Some(writer(sink));
        self
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a text on the console; what came before it.
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        /// A guest that is lost takes a CPU from all others: it is not waited for to the end.
        const LOOK: Duration = Duration::from_secs(10);
        let (started, mut watch) = (Instant::now(), None);
        loop {
            match self.console.wait_for(text, self.at, LOOK) {
                Ok((before, at)) => {
                    self.at = at;
                    return before;
                }
                Err(Missed::Late)
                    if started.elapsed() < PATIENCE
                        && !watch
                            .get_or_insert_with(|| hang::Watch::new(self.id()))
                            .is_lost() => {}
                Err(Missed::Late) => {
                    let (waited, doing) = (started.elapsed().as_secs(), hang::describe(self.id()));
                    panic!("no {text:?} on the console within {waited} s\n{doing}")
                }
                Err(Missed::Ended) => {
                    let code = self.exit();
                    panic!("launcher ended with {code} before {text:?} was on the console")
                }
            }
        }
    }

    /// Waits until the guest's shell is there.
    pub(crate) fn ready(&mut self) {
        self.wait_for("lab: ready");
        self.wait_for("lab# ");
    }

    /// Types something.
    pub(crate) fn send(&self, bytes: impl AsRef<[u8]>) {
        let input = self.input.as_ref().expect("the input is still open");
        // A process that has ended takes no input; the next wait says so.
        let _ = input.send(bytes.as_ref().to_vec());
    }

    /// Ends its input.
    pub(crate) fn close_input(&mut self) {
        self.input = None;
    }

    /// Runs a shell command in the guest: its exit status and what it printed.
    pub(crate) fn attempt(&mut self, command: &str) -> (i32, String) {
        self.commands += 1;
        let n = self.commands;
        // The quotes keep the echo of this line from looking like the markers it prints.
        self.send(format!(
            "echo '<'\"<{n}\"; {{ {command}; }} 2>&1; echo '>'\">{n}:$?:\"\n"
        ));
        self.wait_for(&format!("<<{n}\r\n"));
        let printed = self.wait_for(&format!(">>{n}:"));
        let status = self.wait_for(":").parse().unwrap();
        (status, printed.replace("\r\n", "\n"))
    }

    /// Runs a shell command in the guest, which has to succeed; what it printed, trimmed.
    pub(crate) fn run(&mut self, command: &str) -> String {
        let (status, printed) = self.attempt(command);
        assert_eq!(
            status, 0,
            "`{command}` in the guest: status {status}\n{printed}"
        );
        printed.trim_end().to_owned()
    }

    /// Powers off from inside and checks that this ends `launcher` with 0.
    pub(crate) fn power_off(&mut self) {
        self.send("poweroff -f\n");
        assert_eq!(
            self.exit(),
            0,
            "exit code after the guest has powered off\n{}",
            self.errors()
        );
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(pid(&self.child), signal).unwrap();
    }

    /// Whether it still runs.
    pub(crate) fn alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for the end; the exit code, or minus the signal that killed it.
    pub(crate) fn exit(&mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                use std::os::unix::process::ExitStatusExt;
                self.forget();
                return status
                    .code()
                    .unwrap_or_else(|| -status.signal().unwrap_or(0));
            }
            assert!(
                Instant::now() < deadline,
                "launcher has not ended within {PATIENCE:?}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it has printed on standard error until its end.
    pub(crate) fn errors(&self) -> String {
        let stderr = self.stderr.as_ref().expect("standard error is a pipe");
        assert!(
            stderr.wait_for_end(PATIENCE),
            "standard error is still open"
        );
        stderr.text()
    }

    fn forget(&self) {
        let pid = pid(&self.child);
        LIVE.lock().unwrap().retain(|(_, other)| *other != pid);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.forget();
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Writes on a thread of its own: a guest that reads nothing must not stop the case.
fn writer(mut sink: impl Write + Send + 'static) -> mpsc::Sender<Vec<u8>> {
    let (sender, receiver) = mpsc::channel::<Vec<u8>>();
    thread::spawn(move || {
        for bytes in receiver {
            if sink.write_all(&bytes).and_then(|()| sink.flush()).is_err() {
                break;
            }
        }
    });
    sender
}
