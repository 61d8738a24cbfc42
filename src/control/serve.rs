//! The loop of the thread `control`. Nothing in it waits for a client, the guest or a disk.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use super::Subject;
use super::connection::{Connection, Doing, Input};
use super::listener::{self, Listener};
use super::messages::{Event, Failure, FailureKind, Reply, Stopped};
use super::orders::{Counts, Orders, Then, dismissal, ending, value};
use super::server::{Limits, Note, Notes, Underway};

/// How long no connection is accepted after the host could not, for want of descriptors perhaps.
const DEAF: Duration = Duration::from_millis(100);
/// Connections that are accepted before it is the clients' turn.
const ACCEPTED: usize = 64;

pub(super) struct Loop {
    listeners: Vec<Listener>,
    clients: Vec<Connection>,
    orders: Orders,
    limits: Limits,
    received: Receiver<Note>,
    wake: Arc<OwnedFd>,
    underway: Arc<Underway>,
    /// The next connection's number.
    number: u64,
    deaf_until: Option<Instant>,
    /// When somebody was last sent away for who he is: such lines come once a second.
    warned: Option<Instant>,
}

/// What polling has found.
#[derive(Default)]
struct Ready {
    connections: bool,
    /// By position.
    clients: Vec<PollFlags>,
}

impl Loop {
    pub(super) fn new(
        listeners: Vec<Listener>,
        subject: Arc<dyn Subject>,
        limits: Limits,
        notes: Notes,
        received: Receiver<Note>,
        wake: Arc<OwnedFd>,
        underway: Arc<Underway>,
    ) -> Self {
        Loop {
            listeners,
            clients: Vec::new(),
            orders: Orders::new(subject, limits.clone(), notes),
            limits,
            received,
            wake,
            underway,
            number: 0,
            deaf_until: None,
            warned: None,
        }
    }

    pub(super) fn run(mut self) {
        let mut ready = Ready::default();
        loop {
            self.wait(&mut ready, self.next_deadline());
            // From behind, for those that go.
            for index in (0..ready.clients.len()).rev() {
                if !ready.clients[index].is_empty() {
                    self.turn(index, ready.clients[index]);
                }
            }
            if ready.connections {
                self.accept();
            }
            // After the clients' turns, which go by position.
            if let Some(stopped) = self.notes() {
                return self.farewell(stopped);
            }
            self.dismiss_the_slow();
        }
    }

    /// Waits until there is something to do, or a deadline has passed.
    fn wait(&self, ready: &mut Ready, deadline: Option<Instant>) {
        let accepts = match self.deaf_until {
            Some(until) if until > Instant::now() => PollFlags::empty(),
            _ => PollFlags::IN,
        };
        let mut polled = Vec::with_capacity(1 + self.listeners.len() + self.clients.len());
        polled.push(PollFd::new(&*self.wake, PollFlags::IN));
        let listener = |listener| PollFd::new(listener, accepts);
        polled.extend(self.listeners.iter().map(listener));
        let client = |client| PollFd::new(client, Connection::interest(client));
        polled.extend(self.clients.iter().map(client));
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs() as _,
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        ready.clients.clear();
        ready.connections = false;
        // A signal, or too little memory for a moment: as if nothing had happened.
        if poll(&mut polled, timeout.as_ref()).is_err() {
            return;
        }
        let (own, clients) = polled.split_at(1 + self.listeners.len());
        ready.connections = own[1..].iter().any(|own| !own.revents().is_empty());
        ready.clients.extend(clients.iter().map(PollFd::revents));
        let mut count = [0; 8];
        // Nothing to read is fine, too.
        let _ = rustix::io::read(&*self.wake, &mut count);
    }

    fn next_deadline(&self) -> Option<Instant> {
        let patience = self.limits.patience;
        let clients = self.clients.iter();
        let deadlines = clients.filter_map(|client| client.deadline(patience));
        deadlines.chain(self.deaf_until).min()
    }

    /// Reads what others have left; how the VM has ended, if that is among it.
    fn notes(&mut self) -> Option<Option<Stopped>> {
        while let Ok(note) = self.received.try_recv() {
            match note {
                Note::Event(event) => {
                    self.underway.count.fetch_sub(1, Ordering::Relaxed);
                    self.publish(&event);
                }
                Note::Progress(number, progress) => {
                    if let Some(client) = self.client(number)
                        && let Doing::Obeying { id, .. } = client.doing
                        // Who does not read gets the next one.
                        && client.unread() == 0
                    {
                        client.report(id, progress);
                    }
                }
                Note::Done { number, ends, done } => self.done(number, ends, done),
                Note::Close(stopped) => return Some(stopped),
            }
        }
        if self.underway.lost.swap(false, Ordering::Relaxed) {
            for client in self.clients.iter_mut().filter(|client| client.subscribed) {
                client.dismiss(dismissal(FailureKind::Busy, "there are too many events"));
            }
        }
        self.flush();
        None
    }

    fn client(&mut self, number: u64) -> Option<&mut Connection> {
        let mut clients = self.clients.iter_mut();
        clients.find(|client| client.number == number)
    }

    fn done(&mut self, number: u64, ends: bool, done: Result<Value, Failure>) {
        self.orders.underway -= usize::from(!ends);
        let Some(client) = self.client(number) else {
            return;
        };
        let Doing::Obeying { id, .. } = client.doing else {
            return;
        };
        match done {
            // The answer comes when the VM has ended.
            Ok(_) if ends => {}
            Ok(Value::Null) => client.answer(id, Reply::Ok(json!({}))),
            Ok(value) => client.answer(id, Reply::Ok(value)),
            Err(failure) => client.answer(id, Reply::Error(failure)),
        }
    }

    fn publish(&mut self, event: &Event) {
        let most = self.limits.unread;
        self.clients.retain_mut(|client| {
            if client.subscribed {
                client.tell(event);
            }
            // Who does not read is cut off: a part of a line may be in the socket already.
            client.unread() <= most || client.flush().is_ok() && client.unread() <= most
        });
    }

    /// Hands over what there is to hand over.
    fn flush(&mut self) {
        self.clients
            .retain_mut(|client| client.flush().is_ok() && !client.is_done());
    }

    fn counts(&self) -> Counts {
        let count = |what: fn(&Connection) -> bool| {
            let clients = self.clients.iter();
            clients.filter(|client| what(client)).count()
        };
        Counts {
            subscribers: count(|client| client.subscribed),
            stops: count(|client| matches!(client.doing, Doing::Obeying { ends: true, .. })),
        }
    }

    /// A client's turn: what it has sent, a few lines at the most.
    fn turn(&mut self, index: usize, ready: PollFlags) {
        let mut counts = self.counts();
        let client = &mut self.clients[index];
        if client.flush().is_err() {
            self.clients.swap_remove(index);
            return;
        }
        // Who has hung up can be heard only while it is his turn to speak.
        if ready.intersects(PollFlags::HUP | PollFlags::ERR) && !client.listens() {
            self.clients.swap_remove(index);
            return;
        }
        let mut left = match client.listens() {
            true => self.limits.turn,
            false => 0,
        };
        while left > 0 && client.goes_on() {
            left -= 1;
            let line = match client.line(self.limits.line) {
                Ok(Input::Line(line)) => line,
                Ok(Input::Unfinished) => break,
                Ok(Input::End) => {
                    client.leaving = true;
                    break;
                }
                Ok(Input::TooLong) => {
                    let most = self.limits.line;
                    let message = format!("a line is longer than {most} bytes");
                    client.dismiss(dismissal(FailureKind::Invalid, message));
                    break;
                }
                Err(_) => {
                    self.clients.swap_remove(index);
                    return;
                }
            };
            let subscribed = client.subscribed;
            if let Then::Attach { scrollback } = self.orders.line(client, &line, &counts) {
                let mut client = self.clients.swap_remove(index);
                // Who has not even read earlier replies has no use for a console.
                if client.flush().is_ok() && client.unread() == 0 {
                    self.orders.attach(client, scrollback);
                }
                return;
            }
            counts.subscribers += usize::from(client.subscribed && !subscribed);
        }
        if client.flush().is_err() || client.is_done() {
            self.clients.swap_remove(index);
        }
    }

    fn accept(&mut self) {
        for index in 0..self.listeners.len() {
            for _ in 0..ACCEPTED {
                match self.listeners[index].accept() {
                    Ok(Some(stream)) => self.welcome(stream),
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!("cannot accept a connection: {error}");
                        self.deaf_until = Some(Instant::now() + DEAF);
                        return;
                    }
                }
            }
        }
    }

    /// Takes a connection in, in place of the one that needs its own least if there are too many.
    fn welcome(&mut self, stream: UnixStream) {
        if let Some(stranger) = listener::stranger(&stream) {
            if self
                .warned
                .is_none_or(|warned| warned.elapsed().as_secs() >= 1)
            {
                self.warned = Some(Instant::now());
                tracing::warn!("{stranger} was refused at the control socket");
            }
            return;
        }
        self.number += 1;
        let client = Connection::new(stream, self.number);
        if self.clients.len() >= self.limits.connections {
            let most = self.limits.connections;
            let message =
                format!("there are {most} connections already, which is the most at once");
            let failure = dismissal(FailureKind::Busy, message);
            let clients = self.clients.iter().enumerate();
            let idle = clients.filter(|(_, client)| client.is_idle());
            match idle.min_by_key(|(_, client)| (client.served, client.since())) {
                Some((index, _)) => {
                    let idle = self.clients.swap_remove(index);
                    part(idle, failure);
                }
                None => return part(client, failure),
            }
        }
        self.clients.push(client);
        // Most have sent their line by now.
        self.turn(self.clients.len() - 1, PollFlags::IN);
    }

    fn dismiss_the_slow(&mut self) {
        let now = Instant::now();
        self.deaf_until = self.deaf_until.filter(|until| *until > now);
        let patience = self.limits.patience;
        let late = |client: &Connection| client.deadline(patience).is_some_and(|at| at <= now);
        for index in (0..self.clients.len()).rev() {
            if late(&self.clients[index]) {
                let message = format!("there was no request within {} s", patience.as_secs());
                let client = self.clients.swap_remove(index);
                part(client, dismissal(FailureKind::Invalid, message));
            }
        }
    }

    /// Answers who has asked for the VM's end, tells the subscribers, and ends the connections.
    fn farewell(mut self, stopped: Option<Stopped>) {
        self.orders.ended = Some(stopped.clone());
        // Who has connected in time is told, too.
        self.accept();
        self.listeners.clear();
        for client in &mut self.clients {
            if let Doing::Obeying { id, ends } = client.doing {
                let reply = match &stopped {
                    Some(stopped) if ends => Reply::Ok(value(stopped)),
                    _ => Reply::Error(ending()),
                };
                client.answer(id, reply);
            }
        }
        if let Some(stopped) = stopped {
            self.publish(&Event::Stopped(stopped));
        }
        for index in (0..self.clients.len()).rev() {
            self.turn(index, PollFlags::IN);
        }
        let deadline = Instant::now() + self.limits.farewell;
        let mut ready = Ready::default();
        loop {
            self.clients.retain_mut(|client| {
                client.leaving = true;
                let unread = client.flush().is_ok() && client.unread() > 0;
                if !unread {
                    client.discard();
                }
                unread
            });
            if self.clients.is_empty() || Instant::now() >= deadline {
                return;
            }
            self.wait(&mut ready, Some(deadline));
        }
    }
}

/// Sends a client away, with a reason if it takes one.
fn part(mut client: Connection, failure: Failure) {
    // Behind the half of a line, it would be read as the other half.
    if client.unread() == 0 {
        client.dismiss(failure);
        // It is closed either way.
        let _ = client.flush();
    }
    client.discard();
}
