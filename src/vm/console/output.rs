//! The guest's output on its way to one place.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::kept_log::KeptLog;
use crate::stdout;

/// Output that waits for a reader at most, in bytes; more is dropped, and the reader told.
const OUTPUT_LIMIT: usize = 1 << 20;
/// How long a lone byte waits for others: an interrupt's worth of output is written at once.
const GATHER: Duration = Duration::from_millis(1);
/// How much output is worth no wait.
const ENOUGH: usize = 4096;
/// What is written at once, in bytes: each piece that is taken is a sign of a living reader.
const PIECE: usize = 4096;

/// The guest's output on its way to one place, written by a thread of its own so that a slow
/// reader holds up neither the guest nor the other places.
pub(super) struct Output {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

/// Where an output goes.
pub(crate) enum Outlet {
    /// Standard output.
    Stdout,
    /// The file `console.log`.
    Log(File),
    /// The log in the VM's folder.
    Kept(KeptLog),
    /// A connection.
    Attachment(UnixStream),
}

#[derive(Default)]
struct Shared {
    pending: Mutex<Pending>,
    /// Signalled when output arrives, and when the end does.
    arrived: Condvar,
    /// Signalled when output is written, and when the thread ends.
    written: Condvar,
}

#[derive(Default)]
struct Pending {
    bytes: VecDeque<u8>,
    dropped: u64,
    /// No more output will come.
    closing: bool,
    /// Bytes written so far, and whether all is.
    progress: u64,
    done: bool,
}

impl Output {
    /// Starts writing to `outlet`.
    pub(super) fn start(outlet: Outlet) -> io::Result<Output> {
        let shared = Arc::<Shared>::default();
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("console".into())
            .stack_size(128 << 10)
            .spawn(move || for_thread.pump(outlet))?;
        Ok(Output { shared, thread })
    }

    /// Takes output. It never blocks.
    pub(super) fn push(&self, bytes: &[u8]) {
        self.shared.push(bytes);
    }

    /// Tells that no more output will come.
    pub(super) fn end(&self) {
        self.shared.lock().closing = true;
        self.shared.arrived.notify_one();
    }

    /// After [`Output::end`]: waits until all is written. A reader that takes nothing for as long
    /// as `patience` is left.
    pub(super) fn finish(self, patience: Duration) {
        // One that hangs in a write ends with the process.
        if self.shared.finish(patience) {
            // It is done; a panic in it has been reported.
            let _ = self.thread.join();
        }
    }
}

impl Shared {
    /// Every change of the state is complete in itself, so a poisoned lock is taken all the same.
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut pending = self.lock();
        let room = OUTPUT_LIMIT - pending.bytes.len();
        let (kept, dropped) = bytes.split_at(room.min(bytes.len()));
        pending.dropped += dropped.len() as u64;
        let before = pending.bytes.len();
        pending.bytes.extend(kept);
        let wake = before == 0 || (before < ENOUGH && pending.bytes.len() >= ENOUGH);
        drop(pending);
        if wake {
            self.arrived.notify_one();
        }
    }

    /// Waits until all is written: false if there was no progress for so long.
    fn finish(&self, patience: Duration) -> bool {
        let mut pending = self.lock();
        let mut progress = pending.progress;
        let mut deadline = Instant::now() + patience;
        while !pending.done {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            pending = match self.written.wait_timeout(pending, left) {
                Ok((pending, _)) => pending,
                Err(poisoned) => poisoned.into_inner().0,
            };
            if pending.progress != progress {
                progress = pending.progress;
                deadline = Instant::now() + patience;
            }
        }
        true
    }

    /// Writes until the end. An outlet that fails is given up: what comes is dropped.
    fn pump(&self, outlet: Outlet) {
        let mut batch = Vec::new();
        let mut open = Some(outlet);
        while self.next_batch(&mut batch) {
            for piece in batch.chunks(PIECE) {
                if let Some(outlet) = &mut open
                    && outlet.write(piece).is_err()
                {
                    open = None;
                }
                self.lock().progress += piece.len() as u64;
                self.written.notify_one();
            }
        }
        self.lock().done = true;
        self.written.notify_one();
    }

    /// Waits for output and takes all there is; false once there will be none.
    fn next_batch(&self, batch: &mut Vec<u8>) -> bool {
        batch.clear();
        let none_yet = |pending: &mut Pending| pending.bytes.is_empty() && !pending.closing;
        let few = |pending: &mut Pending| pending.bytes.len() < ENOUGH && !pending.closing;
        let pending = self
            .arrived
            .wait_while(self.lock(), none_yet)
            .unwrap_or_else(PoisonError::into_inner);
        let mut pending = match self.arrived.wait_timeout_while(pending, GATHER, few) {
            Ok((pending, _)) => pending,
            Err(poisoned) => poisoned.into_inner().0,
        };
        let (front, back) = pending.bytes.as_slices();
        batch.extend_from_slice(front);
        batch.extend_from_slice(back);
        pending.bytes.clear();
        let dropped = std::mem::take(&mut pending.dropped);
        if dropped > 0 {
            let note = format!("\r\n[launcher: {dropped} bytes of console output dropped]\r\n");
            batch.extend_from_slice(note.as_bytes());
        }
        !batch.is_empty()
    }
}

impl Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Outlet::Stdout => stdout::write_all(bytes).inspect_err(|error| match error.kind() {
                io::ErrorKind::BrokenPipe => {
                    tracing::debug!("console output has no reader any more");
                }
                _ => tracing::error!("standard output cannot be written any more: {error}"),
            }),
            Outlet::Log(file) => file.write_all(bytes).inspect_err(|error| {
                tracing::error!("`console.log` cannot be written any more: {error}");
            }),
            Outlet::Kept(log) => log.write(bytes).inspect_err(|error| {
                tracing::error!("the console's log cannot be written any more: {error}");
            }),
            // It is gone: whoever reads from it finds out as well.
            Outlet::Attachment(stream) => stream.write_all(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn everything_written_before_the_close_is_in_the_log() {
        let mut log = tempfile::tempfile().unwrap();
        let output = Output::start(Outlet::Log(log.try_clone().unwrap())).unwrap();
        for line in 0..1000 {
            output.push(format!("line {line}\r\n").as_bytes());
        }
        output.end();
        output.finish(Duration::from_secs(20));
        let mut text = String::new();
        log.rewind().unwrap();
        log.read_to_string(&mut text).unwrap();
        assert_eq!(text.lines().count(), 1000);
        assert!(text.ends_with("line 999\r\n"));
    }

    #[test]
    fn output_without_a_reader_is_bounded_and_what_is_lost_is_counted() {
        let shared = Arc::<Shared>::default();
        for _ in 0..OUTPUT_LIMIT / 1000 + 2 {
            shared.push(&[b'x'; 1000]);
        }
        let dropped = (OUTPUT_LIMIT / 1000 + 2) * 1000 - OUTPUT_LIMIT;
        assert_eq!(shared.lock().bytes.len(), OUTPUT_LIMIT);
        let mut batch = Vec::new();
        assert!(shared.next_batch(&mut batch));
        let note = format!("[launcher: {dropped} bytes of console output dropped]\r\n");
        assert!(String::from_utf8(batch).unwrap().ends_with(&note));
    }
}
