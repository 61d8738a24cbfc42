//! A back end that goes, and the next one: it is waited for, looked at, and taken if it serves the same
//! disk.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use formats::OpenError;

use super::link::Link;
use super::offer::{Offer, WRITEBACK};
use super::worker::Worker;
use super::{Shared, VhostUserOptions, lock};

/// The first pause between two tries to connect again, which doubles up to the longest.
pub(super) const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(1);

impl Worker {
    /// The back end is gone: the next one is waited for.
    pub(super) fn lost(&mut self, why: &io::Error) {
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

    pub(super) fn hang_up(&mut self) {
        self.link = None;
        lock(&self.shared.line).stream = None;
    }

    pub(super) fn try_again(&mut self) {
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
    pub(super) fn show(&mut self, offer: &Offer) {
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
}

/// Connects to the back end, and negotiates unless somebody has a command meanwhile.
pub(super) fn connect(options: &VhostUserOptions, shared: &Shared) -> io::Result<Link> {
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
pub(super) fn writeback(offer: &Offer) -> u8 {
    offer.config.0[WRITEBACK]
}

/// The error of a disk that nobody serves, or somebody who cannot.
pub(super) fn absent(shown: &str, error: &io::Error) -> OpenError {
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
