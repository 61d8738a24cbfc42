//! Who serves the image: a process of its own for each measurement.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use crate::Result;
use crate::case::{Case, Format};
use crate::client::Client;
use crate::measure::Options;
use crate::processors::Processors;

/// How long a server may take to start, and to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// How QEMU does its I/O: `aio=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aio {
    /// io_uring.
    IoUring,
    /// Linux AIO: for O_DIRECT only.
    Native,
    /// QEMU's pool of threads, its default.
    Threads,
}

impl Aio {
    fn name(self) -> &'static str {
        match self {
            Aio::IoUring => "io_uring",
            Aio::Native => "native",
            Aio::Threads => "threads",
        }
    }
}

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `launcher disk serve`.
    Launcher,
    /// `qemu-storage-daemon`; the export is in its main loop, or has a thread of its own, which
    /// polls before it sleeps.
    Qemu {
        /// How it does its I/O.
        aio: Aio,
        /// Whether the export has an iothread.
        iothread: bool,
    },
}

impl Side {
    /// Those that a case is measured with, ours first. Linux AIO is for O_DIRECT only; through
    /// the page cache QEMU's threads take its place.
    pub fn all(case: &Case, iothread: bool) -> Vec<Side> {
        let other = match case.direct {
            true => Aio::Native,
            false => Aio::Threads,
        };
        let qemu = [Aio::IoUring, other].map(|aio| Side::Qemu { aio, iothread });
        [Side::Launcher].into_iter().chain(qemu).collect()
    }

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Side::Launcher => "launcher",
            Side::Qemu { aio, .. } => aio.name(),
        }
    }

    fn command(self, options: &Options, case: &Case, image: &Path, socket: &Path) -> Command {
        let format = case.format.name();
        match self {
            Side::Launcher => {
                let mut command = Command::new(&options.launcher);
                command.args(["disk", "serve"]).arg(image);
                command
                    .args(["--format", format])
                    .arg("--socket")
                    .arg(socket);
                if case.direct {
                    command.arg("--o-direct");
                }
                command.args(&options.serve);
                command
            }
            Side::Qemu { aio, iothread } => {
                let mut command = Command::new("qemu-storage-daemon");
                let direct = if case.direct { "on" } else { "off" };
                let aio = aio.name();
                let mut file = OsString::from(format!(
                    "driver=file,node-name=file,aio={aio},cache.direct={direct},filename="
                ));
                file.push(image);
                command.arg("--blockdev").arg(file);
                let mut node = "file";
                if case.format == Format::Qcow2 {
                    node = "disk";
                    command.arg("--blockdev").arg(format!(
                        "driver=qcow2,node-name=disk,file=file,cache.direct={direct}"
                    ));
                }
                let mut export = format!(
                    "type=vhost-user-blk,id=export,node-name={node},writable=on,addr.type=unix"
                );
                if iothread {
                    command.args(["--object", "iothread,id=thread"]);
                    export += ",iothread=thread";
                }
                let mut export = OsString::from(export + ",addr.path=");
                export.push(socket);
                command.arg("--export").arg(export);
                command
            }
        }
    }
}

/// A server that runs; killed if it is not ended.
pub struct Server {
    child: Child,
    /// As it was started, for errors.
    line: String,
    socket: PathBuf,
    said: PathBuf,
    ended: bool,
}

impl Server {
    /// Starts it, in a folder for its socket and what it says.
    pub fn start(
        side: Side,
        options: &Options,
        case: &Case,
        image: &Path,
        folder: &Path,
    ) -> Result<Server> {
        let (socket, said) = (folder.join("disk.sock"), folder.join("stderr"));
        let mut command = side.command(options, case, image, &socket);
        command
            .env("XDG_STATE_HOME", folder)
            .env_remove("LAUNCHER_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&said)?);
        let processors = case.apart.then(Processors::others).transpose()?;
        // SAFETY: it makes two system calls.
        unsafe {
            command.pre_exec(move || {
                if let Some(processors) = &processors {
                    processors.take()?;
                }
                Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
            });
        }
        let line = format!("{command:?}");
        let child = command
            .spawn()
            .map_err(|error| format!("{line} does not run: {error}"))?;
        Ok(Server {
            child,
            line,
            socket,
            said,
            ended: false,
        })
    }

    /// Connects as soon as it listens.
    pub fn connect(&mut self, memory: usize) -> Result<Client> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let error = match Client::connect(&self.socket, memory) {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            let early = matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            );
            if let Some(status) = self.child.try_wait()? {
                self.ended = true;
                return Err(self.error(&format!("ended before it served, with {status}")));
            }
            if !early || Instant::now() > deadline {
                return Err(self.error(&format!("could not be connected to: {error}")));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Processor time of the process so far: all its threads, those that ended and those that the
    /// kernel runs for its io_uring among them.
    pub fn processor(&self) -> io::Result<Duration> {
        let pid = Pid::from_child(&self.child).as_raw_nonzero().get();
        let (mut clock, mut time) = (
            0,
            libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
        );
        // SAFETY: both are written where they are.
        let (found, told) = unsafe {
            let found = libc::clock_getcpuclockid(pid, &mut clock);
            (found, libc::clock_gettime(clock, &mut time))
        };
        if found != 0 {
            return Err(io::Error::from_raw_os_error(found));
        }
        if told != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }

    /// Ends it as a user does, and waits until it has.
    pub fn end(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                return Err(self.error("does not end"));
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.ended = true;
        match status.success() {
            true => Ok(()),
            false => Err(self.error(&format!("ended with {status}"))),
        }
    }

    /// What went wrong, with what the server said.
    pub fn error(&self, what: &str) -> crate::Error {
        let said = fs::read_to_string(&self.said).unwrap_or_default();
        let mut text = format!("{} {what}", self.line);
        for line in said.lines() {
            text = text + "\n  it said: " + line;
        }
        text.into()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = fs::remove_file(&self.socket);
    }
}
