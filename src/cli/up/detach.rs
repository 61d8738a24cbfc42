//! `launcher up --detach`: a process of its own runs the VM. Until the VM runs, it is bound to the
//! one that started it: its errors and progress go to the same terminal, and they die together.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::FdFlags;
use rustix::process::{Signal, set_parent_process_death_signal, setsid};

use super::{Up, Wait};
use crate::control::Place;
use crate::messages::Kept;
use crate::{Error, Result, exit};

/// What the detached process tells: its VM runs.
const RUNNING: u8 = b'R';
/// Its guest is up.
const BOOTED: u8 = b'B';

/// Starts the process and waits until its VM runs, or is up.
pub(super) fn start(up: &Up, vm: Option<&Path>) -> Result<u8> {
    let mut detached = Detached::spawn(up, vm, Stdio::inherit())?;
    match next(&mut detached.told, None)? {
        Some(RUNNING) => detached.wait(up),
        // It has told the user why.
        _ => ended(detached.child),
    }
}

/// Starts the process and waits until its VM runs, as one of several: what it says meanwhile is
/// returned. Without a [`Detached`] it has ended, with this exit code.
pub(super) fn running(up: &Up, vm: &Path) -> Result<(u8, String, Option<Detached>)> {
    /// More than anything says; the rest is read and forgotten.
    const MOST: u64 = 1 << 20;
    let mut detached = Detached::spawn(up, Some(vm), Stdio::piped())?;
    let mut said = Vec::new();
    if let Some(mut errors) = detached.child.stderr.take() {
        // They go to a file as soon as the VM runs: that is the end.
        let read = errors.by_ref().take(MOST).read_to_end(&mut said);
        read.and_then(|_| io::copy(&mut errors, &mut io::sink()))
            .map_err(failed("read from a pipe"))?;
    }
    let said = String::from_utf8_lossy(&said).trim_end().to_owned();
    match next(&mut detached.told, None)? {
        Some(RUNNING) => Ok((exit::DONE, said, Some(detached))),
        _ => Ok((ended(detached.child)?, said, None)),
    }
}

/// The process, and what it tells.
pub(super) struct Detached {
    child: Child,
    told: PipeReader,
}

impl Detached {
    fn spawn(up: &Up, vm: Option<&Path>, errors: Stdio) -> Result<Detached> {
        let (told, tell) = io::pipe().map_err(failed("make a pipe"))?;
        let fd = tell.as_raw_fd();
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("launcher")
            .args(["up", "--ready", &fd.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors);
        for (given, flag) in [
            (up.force, "--force"),
            (up.locked, "--locked"),
            (up.ephemeral, "--ephemeral"),
        ] {
            if given {
                command.arg(flag);
            }
        }
        if let Some(name) = &up.name {
            command.arg(format!("--name={name}"));
        }
        if let Some(socket) = &up.socket {
            command.arg("--socket").arg(socket);
        }
        command.args(up.chosen.arguments());
        if let Some(vm) = vm {
            command.arg("--").arg(vm);
        }
        let begin = move || {
            setsid()?;
            set_parent_process_death_signal(Some(Signal::TERM))?;
            keep_no_files();
            // SAFETY: the pipe is open: the process that was forked has not closed it, nor does
            // this.
            let tell = unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) };
            rustix::io::fcntl_setfd(tell, FdFlags::empty())?;
            Ok(())
        };
        // SAFETY: four system calls, which are async-signal-safe; nothing is allocated or locked.
        unsafe { command.pre_exec(begin) };
        let child = command.spawn().map_err(failed("start a process"))?;
        Ok(Detached { child, told })
    }

    /// Its VM runs: waits for what is to be waited for.
    pub(super) fn wait(mut self, up: &Up) -> Result<u8> {
        match up.wait {
            None => Ok(exit::DONE),
            Some(Wait::Boot) => wait_for_boot(up, self.child, &mut self.told),
        }
    }
}

/// What this process happens to have open (a lock's file, a pipe that somebody reads to its end)
/// is not for one that lives on: all is closed on exec, but for standard input and output.
fn keep_no_files() {
    const FIRST: libc::c_int = libc::STDERR_FILENO + 1;
    // SAFETY: close_range(2) with this flag closes nothing now, and touches no memory. A kernel
    // older than 5.11 refuses it: then they stay open.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
    }
}

fn wait_for_boot(up: &Up, child: Child, told: &mut PipeReader) -> Result<u8> {
    let logs = "`launcher logs` shows what it printed";
    match next(told, Some(Instant::now() + up.wait_timeout))? {
        Some(BOOTED) => Ok(exit::DONE),
        Some(_) => Err(Error::failed(format!(
            "the guest is not up after {:?}; it runs on",
            up.wait_timeout
        ))
        .help(logs)),
        None => {
            let code = ended(child)?;
            let mut error = Error::failed(format!(
                "the guest ended before it was up, with exit code {code}"
            ));
            if code != exit::DONE {
                error.exit = code;
            }
            Err(error.help(logs))
        }
    }
}

/// The next thing told: `None` at the end of the process, 0 when time is up.
fn next(told: &mut PipeReader, deadline: Option<Instant>) -> Result<Option<u8>> {
    loop {
        let left = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs() as _,
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let mut fds = [PollFd::new(told, PollFlags::IN)];
        match poll(&mut fds, left.as_ref()) {
            Ok(0) => return Ok(Some(0)),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(failed("wait for a process")(errno.into())),
        }
        let mut byte = [0];
        match told.read(&mut byte) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(byte[0])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("read from a pipe")(error)),
        }
    }
}

/// The exit code of the detached process.
fn ended(mut child: Child) -> Result<u8> {
    let status = child.wait().map_err(failed("wait for a process"))?;
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(u8::try_from(code).unwrap_or(exit::FAILED)),
        (None, signal) => Err(Error::failed(format!(
            "the VM's process was killed by signal {}",
            signal.unwrap_or_default()
        ))),
    }
}

/// In the detached process: who waits for its VM.
pub(super) struct Ready(File);

impl Ready {
    /// The pipe that was handed over.
    pub(super) fn inherited(fd: i32) -> Result<Ready> {
        let wrong = || Error::usage("--ready is for `launcher up --detach` to use");
        // SAFETY: fcntl(F_GETFL) of a number that is no open file is an error, and no more.
        if fd <= libc::STDERR_FILENO || unsafe { libc::fcntl(fd, libc::F_GETFL) } == -1 {
            return Err(wrong());
        }
        // SAFETY: it is open, and in the process that the pipe was made for nobody else has it:
        // this is the first that it does.
        let pipe = unsafe { OwnedFd::from_raw_fd(fd) };
        let stat = rustix::fs::fstat(&pipe).map_err(|_| wrong())?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_fifo() {
            // It is somebody else's after all.
            std::mem::forget(pipe);
            return Err(wrong());
        }
        rustix::io::fcntl_setfd(&pipe, FdFlags::CLOEXEC).map_err(|_| wrong())?;
        // "exe", after the file that was executed, would tell nobody anything.
        let _ = rustix::thread::set_name(c"launcher");
        Ok(Ready(pipe.into()))
    }

    /// The VM runs: from here on this process is on its own, and its messages go to a file.
    pub(super) fn running(mut self, place: &Place) -> Result<Waiting> {
        let path = place.launcher_log();
        let log = Kept::begin(&path)
            .map_err(|error| Error::failed(format!("cannot create {}: {error}", path.display())))?;
        set_parent_process_death_signal(None)
            .map_err(|errno| failed("leave the process that started it")(errno.into()))?;
        let told = self.0.write_all(&[RUNNING]);
        told.map_err(|_| Error::failed("whoever started this VM is gone"))?;
        log.become_standard_error()
            .map_err(failed("open its log"))?;
        Ok(Waiting(self.0))
    }
}

/// Somebody may wait for the guest to be up.
pub(super) struct Waiting(File);

impl Waiting {
    /// It is.
    pub(super) fn booted(mut self) {
        // Nobody has waited: then nobody misses it.
        let _ = self.0.write_all(&[BOOTED]);
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| Error::failed(format!("cannot {what}: {error}"))
}
