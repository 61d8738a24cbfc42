//! The thread of one disk: it keeps the connection to the back end, and makes a new one when that
//! is gone.

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
use super::{Command, Shared, VhostUserOptions, lock};
use crate::devices::event;
use crate::devices::throttle::Throttle;
use crate::devices::virtio::Activation;

/// The first pause between two tries to connect again, which doubles up to the longest.
const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(1);

/// The state of a disk's thread.
struct Worker {
    options: VhostUserOptions,
    shown: String,
    shared: Arc<Shared>,
    /// What the guest was shown.
    offer: Offer,
    link: Option<Link>,
    active: Option<Active>,
    /// What the back end signals for used buffers where the driver's interrupt cannot be signalled
    /// directly: one a virtqueue.
    calls: Vec<EventFd>,
    /// What it signals for rings that are broken.
    broken: EventFd,
    /// Since when.
    connected_at: Instant,
    pause: Duration,
    next_try: Instant,
    /// Limits what a back end that comes and goes can have us log.
    warnings: Throttle,
    /// Why the last try failed, once that is logged.
    refused: Option<String>,
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

    /// The back end is gone: the next one is waited for.
    fn lost(&mut self, why: &io::Error) {
        self.hang_up();
        self.shared.connected.store(false, Ordering::Relaxed);
        // One that goes as soon as it has come is no reason to be quick.
        if self.connected_at.elapsed() > LONGEST {
            self.pause = SHORTEST;
        }
        self.put_off();
        if !self.shared.ending.load(Ordering::Relaxed)
            && let Some(held_back) = self.warnings.pass()
        {
            let shown = &self.shown;
            tracing::warn!(
                held_back,
                "the server of the disk at `{shown}` is gone: {why}; its guest waits for the next"
            );
        }
    }

    /// The next try to connect is later, and the one after that later still.
    fn put_off(&mut self) {
        self.next_try = Instant::now() + self.pause;
        self.pause = (2 * self.pause).min(LONGEST);
    }

    fn hang_up(&mut self) {
        self.link = None;
        lock(&self.shared.line).stream = None;
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
    fn start(&mut self) {
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

    fn try_again(&mut self) {
        match self.connected_again() {
            Ok(()) => {
                if let Some(held_back) = self.warnings.pass() {
                    let shown = &self.shown;
                    tracing::warn!(held_back, "the disk at `{shown}` is served again");
                }
                self.shared.connected.store(true, Ordering::Relaxed);
                (self.connected_at, self.refused) = (Instant::now(), None);
                self.start();
            }
            Err(error) => {
                self.hang_up();
                self.put_off();
                // That nobody is there is known, and a command that comes between no reason.
                let known = matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::ConnectionRefused
                        | io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::ConnectionReset
                        | io::ErrorKind::BrokenPipe
                        | io::ErrorKind::Interrupted
                );
                let why = error.to_string();
                let said = self.refused.as_ref() == Some(&why);
                if !known && !said && self.warnings.pass().is_some() {
                    let shown = &self.shown;
                    tracing::warn!("the disk at `{shown}` cannot go on with what is there: {why}");
                    self.refused = Some(why);
                }
            }
        }
    }

    fn connected_again(&mut self) -> io::Result<()> {
        let link = connect(&self.options, &self.shared)?;
        let refused = |why: String| Err(io::Error::new(io::ErrorKind::InvalidData, why));
        if let Some(why) = link.offer.differs(&self.offer, self.options.queues) {
            return refused(why);
        }
        if let Some(active) = &self.active
            && active.started
            && active.in_flight.is_none()
            && active.waits()?
        {
            self.needs_reset();
            return refused("requests were in flight, and no record says which".into());
        }
        self.show(&link.offer);
        self.link = Some(link);
        Ok(())
    }

    /// Shows the guest a configuration space that may have changed.
    fn show(&mut self, offer: &Offer) {
        let mut config = lock(&self.shared.config);
        let shown = offer.config.shown(self.options.queues, config.0[WRITEBACK]);
        let changed = *config != shown;
        let (from, to) = (config.size(), shown.size());
        *config = shown;
        drop(config);
        if from != to
            && let Some(tell) = &*lock(&self.shared.on_resize)
        {
            tell(from, to);
        }
        self.offer.config = offer.config;
        // What a driver finds of the cache is as it was at first.
        if changed && let Some(interrupt) = &*lock(&self.shared.interrupt) {
            interrupt.config_changed();
        }
    }

    fn needs_reset(&self) {
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
            let shown = &self.shown;
            tracing::error!("the server of the disk at `{shown}` finds its virtqueues broken");
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

/// Connects to the back end, and negotiates unless somebody has a command meanwhile.
fn connect(options: &VhostUserOptions, shared: &Shared) -> io::Result<Link> {
    let stream = (options.connect)()?;
    {
        let mut line = lock(&shared.line);
        if shared.waiting.load(Ordering::SeqCst) > 0 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        line.stream = Some(stream.try_clone()?);
        line.negotiating = true;
    }
    let link = Link::new(stream, options.queues);
    lock(&shared.line).negotiating = false;
    link
}

/// The field `writeback` that a driver finds.
fn writeback(offer: &Offer) -> u8 {
    offer.config.0[WRITEBACK]
}

/// The error of a disk that nobody serves, or somebody who cannot.
fn absent(shown: &str, error: &io::Error) -> OpenError {
    let serve = format!("start its server first: `launcher disk serve IMAGE --socket {shown}`");
    let (message, help) = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            (format!("nobody serves a disk at `{shown}`"), serve)
        }
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => (
            format!("the server at `{shown}` has closed the connection"),
            "its own messages say why".into(),
        ),
        io::ErrorKind::InvalidData | io::ErrorKind::Other => {
            let help = "expected a server of vhost-user-blk, such as `launcher disk serve`";
            (
                format!("what is at `{shown}` cannot be used: {error}"),
                help.into(),
            )
        }
        _ => {
            let error = crate::error::text(error);
            (format!("cannot connect to `{shown}`: {error}"), serve)
        }
    };
    OpenError {
        message,
        help: Some(help),
        key: "vhost_user",
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs() as _,
        tv_nsec: duration.subsec_nanos().into(),
    }
}
