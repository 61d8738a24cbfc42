//! What a process prints, collected as it comes, so that waiting for a text has a bound.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Everything read so far, and whether more can come.
#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

/// One output of a process.
#[derive(Clone, Default)]
pub(crate) struct Stream(Arc<(Mutex<State>, Condvar)>);

/// Why a text did not come.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Missed {
    /// The stream ended first.
    Ended,
    /// The time was over first.
    Late,
}

impl Stream {
    /// Collects what `source` gives until it ends.
    pub(crate) fn collect(mut source: impl Read + Send + 'static) -> Self {
        let stream = Stream::default();
        let writer = stream.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let len = match source.read(&mut buffer) {
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    // A terminal whose other side has closed reads as EIO.
                    Ok(0) | Err(_) => break,
                    Ok(len) => len,
                };
                writer.0.0.lock().unwrap().bytes.extend(&buffer[..len]);
                writer.0.1.notify_all();
            }
            writer.0.0.lock().unwrap().ended = true;
            writer.0.1.notify_all();
        });
        stream
    }

    /// Waits until `text` appears at or after byte `from`; what came before it, and the place behind it.
    pub(crate) fn wait_for(
        &self,
        text: &str,
        from: usize,
        limit: Duration,
    ) -> Result<(String, usize), Missed> {
        let deadline = Instant::now() + limit;
        let mut state = self.0.0.lock().unwrap();
        let mut start = from;
        loop {
            let found = state.bytes[start.min(state.bytes.len())..]
                .windows(text.len())
                .position(|window| window == text.as_bytes());
            if let Some(position) = found {
                let at = start + position;
                let before = String::from_utf8_lossy(&state.bytes[from..at]).into_owned();
                return Ok((before, at + text.len()));
            }
            if state.ended {
                return Err(Missed::Ended);
            }
            start = from.max(state.bytes.len().saturating_sub(text.len()));
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Missed::Late);
            }
            state = self.0.1.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Waits until nothing more can come.
    pub(crate) fn wait_for_end(&self, limit: Duration) -> bool {
        let state = self.0.0.lock().unwrap();
        let waited = self
            .0
            .1
            .wait_timeout_while(state, limit, |state| !state.ended);
        waited.unwrap().0.ended
    }

    /// All of it so far.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap().bytes).into_owned()
    }
}
