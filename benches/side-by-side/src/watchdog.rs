//! Nobody waits for ever: who sleeps on an eventfd is woken when it takes too long, or when the
//! program is to end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio_driver::EventFd;

use crate::Result;

/// Watches over one sleeper until it is dropped.
pub struct Watchdog {
    late: Arc<AtomicBool>,
    limit: Duration,
    /// Dropped first: it ends the thread.
    alive: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Wakes who sleeps on the eventfd after the limit.
    pub fn new(call: Arc<EventFd>, limit: Duration) -> Watchdog {
        let late = Arc::new(AtomicBool::new(false));
        let (alive, watched) = channel();
        let deadline = Instant::now() + limit;
        let thread = std::thread::spawn({
            let late = Arc::clone(&late);
            move || {
                let ended = || watched.recv_timeout(Duration::from_millis(200));
                while ended() == Err(RecvTimeoutError::Timeout) {
                    if interrupted() || Instant::now() > deadline {
                        late.store(true, Ordering::Relaxed);
                        // The sleeper looks why it was woken.
                        let _ = call.write(1);
                    }
                }
            }
        });
        Watchdog {
            late,
            limit,
            alive: Some(alive),
            thread: Some(thread),
        }
    }

    /// An error once it is too late.
    #[inline]
    pub fn check(&self) -> Result<()> {
        match self.late.load(Ordering::Relaxed) {
            false => Ok(()),
            true if interrupted() => Err("interrupted".into()),
            true => Err(format!("not all requests were answered within {:?}", self.limit).into()),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.alive = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on SIGINT and SIGTERM have the program end in order.
pub fn catch_signals() -> std::io::Result<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in [libc::SIGINT, libc::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(flag))?;
    }
    Ok(())
}

/// Whether the program is to end.
pub fn interrupted() -> bool {
    let flag = INTERRUPTED.get();
    flag.is_some_and(|flag| flag.load(Ordering::Relaxed))
}
