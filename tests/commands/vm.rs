//! A VM that is only a control socket.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};

use launcher::control::messages::{
    DiskStatus, Failure, FailureKind, How, Latency, MemoryStatus, Order, Progress, Resized, State,
    Status, Stopped, VcpuStatus,
};
use launcher::control::{Claim, Laid, Owner, Place, Publisher, Server, Subject};
use serde_json::Value;
use tempfile::TempDir;

use super::program::{Done, launcher};

/// A folder with VMs, and the run-time folder of their user.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        folder.write("vm.toml", "name = \"web\"\n[boot]\nkernel = \"k\"\n[[block]]\npath = \"a.img\" # first\nsize = \"1MiB\"\nid = \"ROOT\"\n");
        fs::write(folder.path("a.img"), vec![0; 1 << 20]).unwrap();
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().canonicalize().unwrap().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// `launcher` with these arguments, not started yet.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        launcher(self.0.path(), self.0.path(), arguments)
    }

    /// Runs `launcher` to its end.
    pub(crate) fn launcher(&self, arguments: &[&str]) -> Done {
        self.command(arguments).output().unwrap().into()
    }

    /// Runs `launcher`, which must succeed and complain of nothing; what it prints.
    pub(crate) fn does(&self, arguments: &[&str]) -> String {
        let done = self.launcher(arguments);
        assert_eq!((done.code, &*done.err), (0, ""), "{done:?}");
        done.out
    }

    pub(crate) fn place(&self, name: &str) -> Place {
        Place::under(&self.0.path().join("launcher"), Some(name), Path::new("-")).unwrap()
    }

    /// Has a VM run.
    pub(crate) fn start(&self, name: &str, file: &str) -> Vm {
        self.start_with(name, file, Laid::default())
    }

    /// Has a VM run, with what is laid over its file.
    pub(crate) fn start_with(&self, name: &str, file: &str, laid: Laid) -> Vm {
        let place = self.place(name);
        let owner = Owner {
            pid: std::process::id(),
            name: name.into(),
            file: self.path(file),
            started_ms: 1_700_000_000_000,
            laid,
        };
        let claim = place.claim(&owner).unwrap();
        let (orders, obeyed) = mpsc::channel();
        let fake = Arc::new(Fake {
            orders: Mutex::new(orders),
            status: Mutex::new(status(name, &self.path(file), &self.path("a.img"))),
            typed: Mutex::new(None),
        });
        let server = Server::start(&claim, None, fake.clone()).unwrap();
        Vm {
            place,
            publisher: server.publisher(),
            fake,
            obeyed,
            running: Some((server, claim)),
        }
    }
}

/// A VM that runs.
pub(crate) struct Vm {
    pub(crate) place: Place,
    pub(crate) publisher: Publisher,
    pub(crate) fake: Arc<Fake>,
    /// What it was told to do.
    pub(crate) obeyed: Receiver<Order>,
    running: Option<(Server, Claim)>,
}

impl Vm {
    /// Ends it so.
    pub(crate) fn end(&mut self, how: How, why: Option<&str>, exit_code: u8) {
        let (server, claim) = self.running.take().unwrap();
        server.close(Stopped {
            how,
            why: why.map(str::to_owned),
            exit_code,
        });
        drop(claim);
    }
}

/// Does what it is told, and notes it.
pub(crate) struct Fake {
    orders: Mutex<Sender<Order>>,
    pub(crate) status: Mutex<Status>,
    /// The console's other end, once one is attached.
    pub(crate) typed: Mutex<Option<UnixStream>>,
}

impl Subject for Fake {
    fn status(&self) -> Status {
        self.status.lock().unwrap().clone()
    }

    fn obey(&self, order: Order, progress: &mut dyn FnMut(Progress)) -> Result<Value, Failure> {
        self.orders.lock().unwrap().send(order.clone()).unwrap();
        match order {
            Order::Resize(resize) if resize.disk == "9" => Err(Failure {
                kind: FailureKind::NoSuchDisk,
                message: "there is no disk 9".into(),
                help: Some("its disk is 0".into()),
                errno: None,
            }),
            Order::Resize(_) => {
                progress(Progress { done: 1, of: 2 });
                let resized = Resized {
                    disk: 0,
                    from: 1 << 20,
                    to: 2 << 20,
                };
                self.status.lock().unwrap().disks[0].size = 2 << 20;
                Ok(serde_json::to_value(resized).unwrap())
            }
            Order::Pause if self.status().state == State::Paused => Err(Failure {
                kind: FailureKind::Unsupported,
                message: "it is paused already".into(),
                help: None,
                errno: None,
            }),
            Order::Pause => {
                self.status.lock().unwrap().state = State::Paused;
                Ok(Value::Null)
            }
            _ => Ok(Value::Null),
        }
    }

    fn attach(&self, mut connection: UnixStream, scrollback: bool) -> Result<(), Failure> {
        if scrollback {
            connection.write_all(b"before\r\n").unwrap();
        }
        connection.write_all(b"login: ").unwrap();
        *self.typed.lock().unwrap() = Some(connection);
        Ok(())
    }
}

fn status(name: &str, file: &Path, image: &Path) -> Status {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    Status {
        name: name.into(),
        file: text(file),
        pid: std::process::id(),
        state: State::Running,
        booted: false,
        uptime_ms: 61_000,
        vcpus: vec![VcpuStatus { time_ms: 500 }],
        memory: MemoryStatus {
            size: 512 << 20,
            resident: 100 << 20,
        },
        disks: vec![DiskStatus {
            index: 0,
            id: Some("ROOT".into()),
            path: text(image),
            format: "sparse-raw".into(),
            ro: false,
            ephemeral: false,
            size: 1 << 20,
            connected: None,
            host_size: Some(0),
            reads: 1,
            read_bytes: 4096,
            writes: 0,
            written_bytes: 0,
            flushes: 0,
            discards: 0,
            write_zeroes: 0,
            host_errors: 0,
            refused: 0,
            read_latency: Latency {
                p50: 80.0,
                p90: 80.0,
                p99: 80.0,
                p999: 80.0,
                max: 80.0,
            },
            write_latency: Latency::default(),
            flush_latency: Latency::default(),
        }],
    }
}
