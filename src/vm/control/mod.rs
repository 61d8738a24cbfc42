//! A running VM as its control socket sees it.

mod orders;
mod resize;
mod status;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::console::{AttachError, Console};
use super::devices::{Devices, DiskHandle};
use super::life::Life;
use crate::config::{Block, Vm};
use crate::control::Subject;
use crate::control::messages::{Event, Failure, FailureKind, Order, Progress, State, Status};

pub(crate) use orders::{Answer, Ask, Asked, Inbox, Orders, channel};

/// How long the vCPUs may take to leave the guest: one of them may wait for a disk.
const PATIENCE: Duration = Duration::from_secs(10);

/// Carries out what is asked of a running VM.
pub(crate) struct Control {
    name: String,
    /// Absolute.
    file: PathBuf,
    /// Bytes of guest memory.
    memory: u64,
    life: Arc<Life>,
    orders: Orders,
    console: Option<Arc<Console>>,
    disks: Vec<Disk>,
}

/// A disk of the VM.
struct Disk {
    block: Block,
    /// Its image, absolute.
    path: PathBuf,
    handle: DiskHandle,
    /// Held while it is resized.
    resizing: Mutex<()>,
}

impl Control {
    pub(crate) fn new(
        config: &Vm,
        devices: &Devices,
        life: Arc<Life>,
        orders: Orders,
        console: Option<Arc<Console>>,
    ) -> Control {
        let disks = config.block.iter().zip(devices.disks());
        Control {
            name: config.name.clone(),
            file: absolute(&config.file),
            memory: config.memory,
            life,
            orders,
            console,
            disks: disks
                .map(|(block, handle)| Disk::new(block, handle))
                .collect(),
        }
    }

    /// The console, if there is one.
    fn shown(&self) -> Result<&Arc<Console>, Failure> {
        self.console.as_ref().ok_or_else(|| Failure {
            help: Some("set `mode` of `[console]` to \"stdio\" or \"socket\"".into()),
            ..failure(FailureKind::Unsupported, "the VM has no console")
        })
    }

    /// Has the vCPUs stand still: when it returns, none runs.
    fn pause(&self) -> Result<(), Failure> {
        self.orders.ask(Ask::Pause)?;
        let deadline = Instant::now() + PATIENCE;
        while self.life.state() == State::Paused {
            let left = deadline.saturating_duration_since(Instant::now());
            let gate = self.life.gate();
            if gate.is_some_and(|gate| gate.wait_until_paused(left)) {
                self.life.publish(Event::Paused);
                return Ok(());
            }
            if left.is_zero() {
                break;
            }
            // The guest reboots at this moment: the next machine begins paused.
            std::thread::sleep(Duration::from_millis(5));
        }
        // Somebody else may have resumed it, or the VM is ending: then that is how it is.
        let _ = self.orders.ask(Ask::Resume);
        Err(failure(
            FailureKind::Busy,
            format!("a vCPU did not stand still within {PATIENCE:?}; the VM runs on"),
        ))
    }
}

impl Disk {
    fn new(block: &Block, handle: DiskHandle) -> Disk {
        Disk {
            block: block.clone(),
            path: absolute(&block.path),
            handle,
            resizing: Mutex::default(),
        }
    }
}

impl Subject for Control {
    fn status(&self) -> Status {
        self.status_now()
    }

    fn obey(&self, order: Order, progress: &mut dyn FnMut(Progress)) -> Result<Value, Failure> {
        let done = match order {
            Order::Stop { timeout_ms } => {
                let timeout = timeout_ms.map(Duration::from_millis);
                self.orders.ask(Ask::Stop(timeout))
            }
            Order::Kill => self.orders.ask(Ask::Kill),
            Order::Reboot => self.orders.ask(Ask::Reboot),
            Order::Pause => self.pause(),
            Order::Resume => self.orders.ask(Ask::Resume),
            Order::Resize(resize) => {
                let resized = self.resize(&resize, progress)?;
                return serde_json::to_value(resized)
                    .map_err(|error| failure(FailureKind::Host, error.to_string()));
            }
            Order::Status | Order::Console { .. } | Order::Subscribe => Err(failure(
                FailureKind::Invalid,
                "this is for the connection to carry out",
            )),
        };
        done.map(|()| json!({}))
    }

    fn may_attach(&self) -> Result<(), Failure> {
        let refusal = self.shown()?.refusal();
        refusal.map_or(Ok(()), |error| Err(unattached(error)))
    }

    fn attach(&self, connection: UnixStream, scrollback: bool) -> Result<(), Failure> {
        let attached = self.shown()?.attach(connection, scrollback);
        attached.map_err(unattached)
    }
}

fn unattached(error: AttachError) -> Failure {
    match error {
        AttachError::TooMany(limit) => failure(
            FailureKind::Busy,
            format!("{limit} connections show the console, which is the most there can be"),
        ),
        AttachError::Closed => failure(FailureKind::Ending, "the VM is ending"),
        AttachError::Host(error) => Failure {
            errno: error.raw_os_error(),
            ..failure(
                FailureKind::Host,
                format!("cannot show the console: {error}"),
            )
        },
    }
}

pub(in crate::vm) fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure {
        kind,
        message: message.into(),
        help: None,
        errno: None,
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
