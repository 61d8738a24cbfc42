//! What goes over the control socket: one JSON object a line.
//!
//! A client sends a [`Request`] and gets one [`Reply`] with the same `id`, after any number of
//! [`Reply::Progress`] if the order takes long. On a connection that has subscribed, an [`Event`]
//! comes whenever there is one.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// One line from a client: `{"id": 1, "command": "resize", "arguments": {"disk": "0", "size": 2147483648}}`.
/// Arguments that all have defaults may be left out as a whole.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Request {
    /// Comes back in the reply; a client that waits for each reply needs none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// What is asked for.
    #[serde(flatten)]
    pub order: Order,
}

impl<'de> Deserialize<'de> for Request {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Line {
            id: Option<u64>,
            command: String,
            arguments: Option<Value>,
        }
        let Line {
            id,
            command,
            arguments,
        } = Line::deserialize(deserializer)?;
        let none = || Value::Object(serde_json::Map::new());
        let arguments = match command.as_str() {
            "stop" | "console" | "resize" => Some(arguments.unwrap_or_else(none)),
            _ => arguments.filter(|arguments| *arguments != none()),
        };
        let mut order = serde_json::Map::new();
        order.insert("command".to_owned(), Value::String(command));
        order.extend(arguments.map(|arguments| ("arguments".to_owned(), arguments)));
        let order = Order::deserialize(Value::Object(order)).map_err(D::Error::custom)?;
        Ok(Request { id, order })
    }
}

/// What a client can ask of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "command",
    content = "arguments",
    rename_all = "kebab-case",
    deny_unknown_fields
)]
pub enum Order {
    /// How it is: answered with a [`Status`].
    Status,
    /// Presses the power button; when the guest has not powered off within `timeout_ms` (default:
    /// the VM's `stop_timeout`) it is ended by force, its disks flushed. Answered once it has
    /// ended, with a [`Stopped`].
    Stop {
        /// Milliseconds.
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// Ends it at once, its disks flushed. Answered with a [`Stopped`].
    Kill,
    /// Resets it as the button on a case does: a new machine around the same disks, flushed.
    Reboot,
    /// Stops its vCPUs. Requests that its disks have taken are still completed.
    Pause,
    /// Lets its vCPUs run again.
    Resume,
    /// Changes a disk's size; answered with a [`Resized`].
    Resize(Resize),
    /// Turns the connection into the guest's console: after the reply, bytes both ways, no JSON.
    Console {
        /// Begins with what the guest printed before, as far as it is kept.
        #[serde(default)]
        scrollback: bool,
    },
    /// Has events sent on this connection from now on.
    Subscribe,
}

/// A new size for a disk of a running VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Its index over `[[block]]` from 0, or its `id`.
    pub disk: String,
    /// Bytes, or a text: `"8GiB"`, or `"+1GiB"` on top of the size that it has. None: what the
    /// host block device has now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// A smaller size is meant: what lies beyond it is lost.
    #[serde(default)]
    pub shrink: bool,
    /// Shrinks although a guest may use what is cut off.
    #[serde(default)]
    pub force: bool,
}

/// A size as a client writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Size {
    /// Bytes.
    Bytes(u64),
    /// As in a VM's file, or with `+` in front.
    Text(String),
}

/// One line to a client, in answer to its request: `{"id": 1, "ok": {}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The request's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// What it is answered with.
    #[serde(flatten)]
    pub reply: Reply,
}

/// What a request is answered with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It is done; what there is to tell.
    Ok(serde_json::Value),
    /// It is not done, and nothing has changed.
    Error(Failure),
    /// It is under way.
    Progress(Progress),
}

/// Why an order was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs.
    pub kind: FailureKind,
    /// For people: one sentence.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// The host's error number, where one is the cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The line is no request, or a wrong one.
    Invalid,
    /// There is no such disk.
    NoSuchDisk,
    /// The VM or the disk does not do this: it is read-only, its size is fixed, it is paused already.
    Unsupported,
    /// It would lose data, and was not asked to.
    Refused,
    /// Too much is asked for at once.
    Busy,
    /// The VM is ending.
    Ending,
    /// The host failed: see the error number.
    Host,
}

/// How far a long order is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes so far.
    pub done: u64,
    /// Bytes in all.
    pub of: u64,
}

/// A disk's new size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resized {
    /// Index over `[[block]]`.
    pub disk: usize,
    /// Bytes before.
    pub from: u64,
    /// Bytes now.
    pub to: u64,
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    /// Who ended it.
    pub how: How,
    /// One sentence, where there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What `launcher up` exits with.
    pub exit_code: u8,
}

/// Who ended a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// The guest powered itself off, or rebooted where that ends it.
    Guest,
    /// By force: the guest had no chance to unmount its disks.
    Forced,
    /// The guest crashed or panicked.
    Crashed,
    /// The host could not go on, or failed to flush a disk.
    Failed,
}

/// What happens to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A disk has a new size.
    Resized(Resized),
    /// Its vCPUs stand still.
    Paused,
    /// Its vCPUs run again.
    Resumed,
    /// The guest starts anew.
    Rebooted,
    /// The guest has told that it is up; see `console.ready`.
    Booted,
    /// The guest's kernel panicked.
    GuestPanic,
    /// It has ended, its disks are closed; the connection ends.
    Stopped(Stopped),
}

/// How a VM is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Its TOML file, absolute.
    pub file: String,
    /// Process id of its `launcher up`.
    pub pid: u32,
    /// What it is doing.
    pub state: State,
    /// Whether the guest has told that it is up.
    pub booted: bool,
    /// Milliseconds since it was started.
    pub uptime_ms: u64,
    /// Its vCPUs.
    pub vcpus: Vec<VcpuStatus>,
    /// Its memory.
    pub memory: MemoryStatus,
    /// Its disks, in the order of its file.
    pub disks: Vec<DiskStatus>,
}

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// They were paused.
    Paused,
    /// The power button was pressed for the user.
    Stopping,
}

/// A vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStatus {
    /// Processor time that its thread has taken, in milliseconds.
    pub time_ms: u64,
}

/// A VM's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// Bytes that the guest has.
    pub size: u64,
    /// Bytes of host memory that the process takes, the guest's pages included.
    pub resident: u64,
}

/// A disk and what it has done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Index over `[[block]]`.
    pub index: usize,
    /// Its `id`.
    pub id: Option<String>,
    /// Its image, absolute.
    pub path: String,
    /// Its format.
    pub format: String,
    /// Whether the guest may only read it.
    pub ro: bool,
    /// Whether what the guest writes is dropped at the end.
    pub ephemeral: bool,
    /// Bytes that the guest sees.
    pub size: u64,
    /// Bytes that the image takes on the host; none where the host does not tell.
    pub host_size: Option<u64>,
    /// Of a disk that another process serves, at the socket `path`: whether that is there. What
    /// such a disk does is not counted: requests do not pass through the VM's process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected: Option<bool>,
    /// Requests that succeeded, and their bytes.
    pub reads: u64,
    /// See `reads`.
    pub read_bytes: u64,
    /// See `reads`.
    pub writes: u64,
    /// See `reads`.
    pub written_bytes: u64,
    /// See `reads`.
    pub flushes: u64,
    /// See `reads`.
    pub discards: u64,
    /// See `reads`.
    pub write_zeroes: u64,
    /// Requests that the host failed.
    pub host_errors: u64,
    /// Requests that the device refused: the guest's mistakes.
    pub refused: u64,
    /// How long reads took, from the queue to the queue.
    pub read_latency: Latency,
    /// How long writes took.
    pub write_latency: Latency,
    /// How long flushes took.
    pub flush_latency: Latency,
}

/// How long requests took, in microseconds; zeroes where there were none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Half of them took no longer.
    pub p50: f64,
    /// Nine of ten.
    pub p90: f64,
    /// Ninety-nine of a hundred.
    pub p99: f64,
    /// 999 of a thousand.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_a_command_and_its_arguments() {
        let line = r#"{"id":7,"command":"resize","arguments":{"disk":"0","size":"+1GiB"}}"#;
        let request: Request = serde_json::from_str(line).unwrap();
        let resize = Resize {
            disk: "0".into(),
            size: Some(Size::Text("+1GiB".into())),
            shrink: false,
            force: false,
        };
        assert_eq!(request.id, Some(7));
        assert_eq!(request.order, Order::Resize(resize));
    }

    #[test]
    fn a_command_without_arguments_needs_none() {
        let request: Request = serde_json::from_str(r#"{"command":"status"}"#).unwrap();
        assert_eq!(
            request,
            Request {
                id: None,
                order: Order::Status
            }
        );
    }

    #[test]
    fn arguments_with_defaults_may_be_left_out_as_a_whole() {
        let stop = Order::Stop { timeout_ms: None };
        let console = Order::Console { scrollback: false };
        for (line, order) in [
            (r#"{"command":"stop"}"#, &stop),
            (r#"{"command":"stop","arguments":{}}"#, &stop),
            (r#"{"command":"stop","arguments":null}"#, &stop),
            (r#"{"command":"console"}"#, &console),
            (r#"{"command":"status","arguments":{}}"#, &Order::Status),
            (r#"{"command":"kill","arguments":null}"#, &Order::Kill),
        ] {
            let request: Request = serde_json::from_str(line).unwrap();
            assert_eq!(request.order, *order, "{line}");
        }
    }

    #[test]
    fn every_order_is_read_as_it_is_written() {
        for order in [
            Order::Status,
            Order::Stop {
                timeout_ms: Some(5),
            },
            Order::Kill,
            Order::Reboot,
            Order::Pause,
            Order::Resume,
            Order::Resize(Resize {
                disk: "ROOT".into(),
                size: Some(Size::Bytes(1 << 40)),
                shrink: true,
                force: true,
            }),
            Order::Console { scrollback: true },
            Order::Subscribe,
        ] {
            let request = Request { id: None, order };
            let line = serde_json::to_string(&request).unwrap();
            assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
        }
    }

    #[test]
    fn an_answer_carries_the_requests_id() {
        let ok = Answer {
            id: Some(7),
            reply: Reply::Ok(serde_json::json!({})),
        };
        let line = serde_json::to_string(&ok).unwrap();
        assert_eq!(line, r#"{"id":7,"ok":{}}"#);
        assert_eq!(serde_json::from_str::<Answer>(&line).unwrap(), ok);
    }

    #[test]
    fn what_a_command_does_not_know_is_an_error() {
        for line in [
            r#"{"command":"resize","arguments":{"disk":"0","sice":1}}"#,
            r#"{"command":"stop","arguments":{"now":true}}"#,
            r#"{"command":"fly"}"#,
            r#"{"id":-1,"command":"status"}"#,
            r#"{"command":"status","disk":"0"}"#,
            r#"{"command":"status","arguments":[]}"#,
            r#"{"command":"resize"}"#,
            r#"{"command":"kill","command":"status"}"#,
        ] {
            assert!(serde_json::from_str::<Request>(line).is_err(), "{line}");
        }
    }

    #[test]
    fn an_event_carries_its_kind() {
        let event = Event::Resized(Resized {
            disk: 1,
            from: 512,
            to: 1024,
        });
        let line = serde_json::to_string(&event).unwrap();
        assert_eq!(line, r#"{"event":"resized","disk":1,"from":512,"to":1024}"#);
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
    }
}
