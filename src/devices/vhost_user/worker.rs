//! The thread of one disk: it does what others ask of the back end, and listens to it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use formats::OpenError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::link::{Active, Link};
use super::offer::{Offer, WRITEBACK};
use super::reconnect::{SHORTEST, absent, connect, writeback};
use super::{Command, Shared, VhostUserOptions, lock};
use crate::devices::event;
use crate::devices::throttle::Throttle;
use crate::devices::virtio::Activation;

/// The state of a disk's thread.
pub(super) struct Worker {
    pub(super) options: VhostUserOptions,
    pub(super) shown: String,
    pub(super) shared: Arc<Shared>,
    /// What the guest was shown.
    pub(super) offer: Offer,
    pub(super) link: Option<Link>,
    pub(super) active: Option<Active>,
    /// What the back end signals for used buffers where the driver's interrupt cannot be signalled
    /// directly: one a virtqueue.
    pub(super) calls: Vec<EventFd>,
    /// What it signals for rings that are broken.
    pub(super) broken: EventFd,
    /// Since when.
    pub(super) connected_at: Instant,
    pub(super) pause: Duration,
    pub(super) next_try: Instant,
    /// Limits what a back end that comes and goes can have us log.
    pub(super) warnings: Throttle,
    /// The same for virtqueues that it finds broken, which hides nothing else.
    complaints: Throttle,
    /// Why the last try failed, once that is logged.
    pub(super) refused: Option<String>,
}

/// Tells the driver when the thread panics: its requests will never be answered.
struct OnPanic<'a>(&'a Shared);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking()
            && let Some(interrupt) = &*lock(&self.0.interrupt)
        {
            interrupt.needs_reset();
        }
    }
}

/// Connects, tells what the back end offers, and serves until it is told to close.
pub(super) fn run(
    options: VhostUserOptions,
    shared: &Arc<Shared>,
    commands: Receiver<Command>,
    opened: SyncSender<Result<Offer, OpenError>>,
) {
    let _on_panic = OnPanic(shared);
    match Worker::open(options, shared) {
        Ok(mut worker) => {
            // Nobody to hear it: the disk is closed already.
            let _ = opened.send(Ok(worker.offer.clone()));
            drop(opened);
            if let Err(error) = worker.serve(&commands) {
                let shown = &worker.shown;
                tracing::error!("the disk at `{shown}` is lost: {error}");
                worker.needs_reset();
            }
        }
        Err(error) => drop(opened.send(Err(error))),
    }
    // Whoever still watches the disk keeps no connection.
    lock(&shared.line).stream = None;
}

impl Worker {
    fn open(options: VhostUserOptions, shared: &Arc<Shared>) -> Result<Worker, OpenError> {
        let shown = options.socket.display().to_string();
        let (queues, ro) = (options.queues, options.ro);
        let failed = |error: io::Error| OpenError {
            message: format!("no eventfd for the disk at `{shown}`: {error}"),
            help: Some("raise the limit on open files (`ulimit -n`)".into()),
            key: OpenError::HOST,
        };
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed);
        let calls = (0..queues).map(|_| event()).collect::<Result<_, _>>()?;
        let broken = event()?;
        let link = connect(&options, shared).map_err(|error| absent(&shown, &error))?;
        link.offer.fits(queues, ro, &shown)?;
        *lock(&shared.config) = link.offer.config.shown(queues, writeback(&link.offer));
        shared.connected.store(true, Ordering::Relaxed);
        Ok(Worker {
            shown,
            shared: Arc::clone(shared),
            offer: link.offer.clone(),
            link: Some(link),
            active: None,
            calls,
            broken,
            connected_at: Instant::now(),
            pause: SHORTEST,
            next_try: Instant::now(),
            warnings: Throttle::default(),
            complaints: Throttle::default(),
            refused: None,
            options,
        })
    }

    /// Stays with the disk to its end. The error is the host's.
    fn serve(&mut self, commands: &Receiver<Command>) -> io::Result<()> {
        loop {
            loop {
                let command = match commands.try_recv() {
                    Ok(Command::Close(answer)) => {
                        let _ = answer.send(());
                        return Ok(());
                    }
                    Err(TryRecvError::Disconnected) => return Ok(()),
                    Ok(command) => command,
                    Err(TryRecvError::Empty) => break,
                };
                self.shared.waiting.fetch_sub(1, Ordering::SeqCst);
                self.obey(command);
            }
            if self.link.is_none() && Instant::now() >= self.next_try {
                self.try_again();
            }
            self.wait()?;
        }
    }

    fn obey(&mut self, command: Command) {
        let answer = match command {
            Command::Activate(activation, answer) => {
                self.activate(activation);
                answer
            }
            Command::Reset(answer) => {
                self.reset();
                answer
            }
            Command::Writeback(writeback, answer) => {
                self.with_link(|link| link.set_writeback(writeback));
                answer
            }
            Command::Remap(answer) => {
                self.remap();
                answer
            }
            Command::Close(answer) => answer,
        };
        let _ = answer.send(());
    }

    /// Does something with the back end, if there is one. If that fails, there is none any more.
    fn with_link<T: Default>(&mut self, work: impl FnOnce(&mut Link) -> io::Result<T>) -> T {
        let Some(link) = &mut self.link else {
            return T::default();
        };
        match work(link) {
            Ok(done) => done,
            Err(error) => {
                self.lost(&error);
                T::default()
            }
        }
    }

    fn activate(&mut self, activation: Activation) {
        let Activation {
            memory,
            features,
            queues,
            interrupt,
        } = activation;
        self.active = Some(Active {
            memory,
            features,
            queues,
            interrupt,
            started: false,
            in_flight: None,
        });
        self.start();
    }

    /// Hands the virtqueues to the back end.
    pub(super) fn start(&mut self) {
        let Some(mut active) = self.active.take() else {
            return;
        };
        // What an earlier one has signalled is not news.
        event::take(&self.broken);
        let writeback = lock(&self.shared.config).0[WRITEBACK];
        let calls = self.calls_of(&active);
        let again = active.started;
        if let Some(link) = &mut self.link
            && let Err(error) =
                calls.and_then(|calls| link.start(&mut active, writeback, &calls, &self.broken))
        {
            self.lost(&error);
        }
        if again && self.link.is_some() {
            // The one before may have died between the used ring and the interrupt.
            for queue in &active.queues {
                active.interrupt.queue(queue.index);
            }
        }
        self.active = Some(active);
    }

    /// What the back end signals for each virtqueue: the driver's interrupt itself, or else what
    /// this thread listens to.
    fn calls_of(&self, active: &Active) -> io::Result<Vec<EventFd>> {
        let queues = active.queues.iter();
        let call = |index: u16| match active.interrupt.eventfd(index) {
            Some(direct) => Ok(direct),
            None => match self.calls.get(usize::from(index)) {
                Some(call) => call.try_clone(),
                None => Err(io::ErrorKind::NotFound.into()),
            },
        };
        queues.map(|queue| call(queue.index)).collect()
    }

    /// The driver has changed where interrupts go.
    fn remap(&mut self) {
        let Some(active) = self.active.take() else {
            return;
        };
        let calls = self.calls_of(&active);
        self.with_link(|link| {
            let mut queues = active.queues.iter().zip(calls?);
            queues.try_for_each(|(queue, call)| link.set_call(queue.index, &call))
        });
        // What was signalled on the way that is no more.
        for queue in &active.queues {
            active.interrupt.queue(queue.index);
        }
        self.active = Some(active);
    }

    /// Takes the virtqueues back. What a back end that is gone has left undone is forgotten: its
    /// driver has given it up.
    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            self.with_link(|link| link.stop(&active));
        }
    }

    pub(super) fn needs_reset(&self) {
        if let Some(interrupt) = &*lock(&self.shared.interrupt) {
            interrupt.needs_reset();
        }
    }

    /// Sleeps until there is something to do, and does what is not a command.
    fn wait(&mut self) -> io::Result<()> {
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let timeout = match &self.link {
            Some(_) => None,
            None => Some(timespec(
                self.next_try.saturating_duration_since(Instant::now()),
            )),
        };
        let mut ready = vec![readable(self.shared.wake.as_fd())];
        if let Some(link) = &self.link {
            ready.push(readable(event::fd(&self.broken)));
            ready.push(readable(link.as_fd()));
            ready.extend(self.calls.iter().map(event::fd).map(readable));
            ready.extend(link.channel_fd().map(readable));
        }
        match poll(&mut ready, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_ready = |index: usize| {
            let found: Option<&PollFd<'_>> = ready.get(index);
            found.is_some_and(|fd| !fd.revents().is_empty())
        };
        let (woken, broken, gone) = (is_ready(0), is_ready(1), is_ready(2));
        let called: Vec<_> = (0..self.calls.len())
            .filter(|index| is_ready(3 + index))
            .collect();
        let news = is_ready(3 + self.calls.len());
        drop(ready);
        if woken {
            let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        }
        self.pass_on(&called);
        if broken && event::take(&self.broken) {
            if let Some(held_back) = self.complaints.pass() {
                tracing::error!(
                    held_back,
                    "the server of the disk at `{}` finds its virtqueues broken",
                    self.shown
                );
            }
            self.needs_reset();
        }
        if news && self.with_link(Link::listen) {
            let offer = self.link.as_ref().map(|link| link.offer.clone());
            if let Some(offer) = offer {
                self.show(&offer);
            }
        }
        if gone && self.link.is_some() {
            self.lost(&io::Error::other("it has closed the connection"));
        }
        Ok(())
    }

    /// Interrupts the driver for the virtqueues whose eventfds were signalled here.
    fn pass_on(&self, called: &[usize]) {
        for index in called {
            let Some(call) = self.calls.get(*index) else {
                continue;
            };
            if event::take(call)
                && let Some(active) = &self.active
            {
                active.interrupt.queue(*index as u16);
            }
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs() as _,
        tv_nsec: duration.subsec_nanos().into(),
    }
}
