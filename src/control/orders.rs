//! What becomes of a line: a reply at once, or a thread that carries an order out.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Subject;
use super::connection::{Connection, Doing};
use super::messages::{Failure, FailureKind, Order, Reply, Request, Stopped};
use super::server::{Limits, Note, Notes};

/// How far apart an order's reports of its progress are at least.
const APART: Duration = Duration::from_millis(100);

/// Carries out what clients ask for.
pub(super) struct Orders {
    subject: Arc<dyn Subject>,
    limits: Limits,
    notes: Notes,
    /// Threads that carry an order out which does not end the VM.
    pub(super) underway: usize,
    /// How the VM has ended, once it has.
    pub(super) ended: Option<Option<Stopped>>,
}

/// How many connections do what there is a limit for.
pub(super) struct Counts {
    pub(super) subscribers: usize,
    pub(super) stops: usize,
}

/// What is left to do with a connection after a line.
pub(super) enum Then {
    /// It goes on.
    Stay,
    /// It is a console now, the reply is on its way.
    Attach {
        /// Whether what the guest has printed comes first.
        scrollback: bool,
    },
}

impl Orders {
    pub(super) fn new(subject: Arc<dyn Subject>, limits: Limits, notes: Notes) -> Self {
        Orders {
            subject,
            limits,
            notes,
            underway: 0,
            ended: None,
        }
    }

    /// Does what a line asks for, or begins to.
    pub(super) fn line(&mut self, client: &mut Connection, line: &[u8], counts: &Counts) -> Then {
        let line = line.trim_ascii();
        if line.is_empty() {
            return Then::Stay;
        }
        let Request { id, order } = match request(line) {
            Ok(request) => request,
            Err(failure) => {
                client.answer(None, Reply::Error(failure));
                return Then::Stay;
            }
        };
        client.served = true;
        if let Some(stopped) = &self.ended {
            let reply = match stopped {
                Some(stopped) if ends(&order) => Reply::Ok(value(stopped)),
                _ => Reply::Error(ending()),
            };
            client.answer(id, reply);
            return Then::Stay;
        }
        let reply = match order {
            Order::Status => {
                client.answer_ok(id, &self.subject.status());
                return Then::Stay;
            }
            Order::Subscribe
                if !client.subscribed && counts.subscribers >= self.limits.subscribers =>
            {
                busy("subscribers", self.limits.subscribers)
            }
            Order::Subscribe => {
                client.subscribed = true;
                Reply::Ok(json!({}))
            }
            Order::Console { scrollback } => match self.subject.may_attach() {
                Ok(()) => {
                    client.answer(id, Reply::Ok(json!({})));
                    return Then::Attach { scrollback };
                }
                Err(failure) => Reply::Error(failure),
            },
            order => match self.begin(client, id, order, counts) {
                Ok(()) => return Then::Stay,
                Err(reply) => reply,
            },
        };
        client.answer(id, reply);
        Then::Stay
    }

    /// Has an order carried out on a thread of its own.
    fn begin(
        &mut self,
        client: &mut Connection,
        id: Option<u64>,
        order: Order,
        counts: &Counts,
    ) -> Result<(), Reply> {
        let ends = ends(&order);
        if ends && counts.stops >= self.limits.stops {
            return Err(busy("orders to end the VM", self.limits.stops));
        }
        if !ends && self.underway >= self.limits.orders {
            return Err(busy("orders", self.limits.orders));
        }
        let (subject, notes, number) = (self.subject.clone(), self.notes.clone(), client.number);
        let thread = thread::Builder::new().name("order".to_owned());
        let thread = thread.spawn(move || {
            let mut last: Option<Instant> = None;
            let mut progress = |progress| {
                if last.is_none_or(|last| last.elapsed() >= APART) {
                    last = Some(Instant::now());
                    notes.leave(Note::Progress(number, progress));
                }
            };
            // Whoever asked is told in any case.
            let done = catch_unwind(AssertUnwindSafe(|| subject.obey(order, &mut progress)));
            let done = done.unwrap_or_else(|_| Err(host("the order failed inside", None)));
            notes.leave(Note::Done { number, ends, done });
        });
        match thread {
            Ok(_) => {
                self.underway += usize::from(!ends);
                client.doing = Doing::Obeying { id, ends };
                Ok(())
            }
            Err(error) => Err(Reply::Error(host(
                format!("cannot start a thread: {error}"),
                error.raw_os_error(),
            ))),
        }
    }

    /// Makes a connection the console. The reply has been sent.
    pub(super) fn attach(&self, client: Connection, scrollback: bool) {
        let stream = client.into_stream();
        if let Err(failure) = self.subject.attach(stream, scrollback) {
            tracing::warn!("a console could not be attached: {}", failure.message);
        }
    }
}

/// Whether an order ends the VM.
fn ends(order: &Order) -> bool {
    matches!(order, Order::Stop { .. } | Order::Kill)
}

fn request(line: &[u8]) -> Result<Request, Failure> {
    // An array would do as well otherwise: serde takes its elements for the fields.
    let error = match line.first() {
        Some(b'{') => match serde_json::from_slice(line) {
            Ok(request) => return Ok(request),
            Err(error) => error.to_string(),
        },
        _ => "it is no JSON object".to_owned(),
    };
    Err(Failure {
        kind: FailureKind::Invalid,
        message: format!("the line is no request: {error}"),
        help: Some(r#"write one as {"command": "status"}, and a line feed"#.to_owned()),
        errno: None,
    })
}

/// A part of a reply. None of these types can fail.
pub(super) fn value(part: &impl serde::Serialize) -> Value {
    serde_json::to_value(part).unwrap_or_default()
}

pub(super) fn ending() -> Failure {
    Failure {
        kind: FailureKind::Ending,
        message: "the VM is ending".to_owned(),
        help: None,
        errno: None,
    }
}

fn host(message: impl Into<String>, errno: Option<i32>) -> Failure {
    Failure {
        kind: FailureKind::Host,
        message: message.into(),
        help: None,
        errno,
    }
}

fn busy(what: &str, most: usize) -> Reply {
    Reply::Error(Failure {
        kind: FailureKind::Busy,
        message: format!("there are {most} {what} already, which is the most at once"),
        help: Some("try again when one has ended".to_owned()),
        errno: None,
    })
}

/// Why a client is sent away.
pub(super) fn dismissal(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure {
        kind,
        message: message.into(),
        help: None,
        errno: None,
    }
}
