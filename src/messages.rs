//! Messages on standard error: nothing is held up where nobody reads them.

use std::borrow::Cow;
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::terminal;

/// How long a line of the log waits for a slow reader.
const LINE: Duration = Duration::from_millis(100);
/// How long the last words of the process do.
const LAST: Duration = Duration::from_secs(2);
/// What a pipe that is ready for writing takes at once (PIPE_BUF).
const PIECE: usize = 4096;

/// Writes a message, line ends included. A reader that is gone, or takes nothing for a tenth of
/// a second, misses it.
pub(crate) fn log(text: &[u8]) {
    let raw = terminal::RAW.load(Ordering::Relaxed);
    write(&lines_for(text, raw), LINE);
}

/// Writes the last words of a command: a slow reader has two seconds.
pub fn say(text: impl std::fmt::Display) {
    write(format!("{text}\n").as_bytes(), LAST);
}

fn write(mut text: &[u8], patience: Duration) {
    let _one_at_a_time = io::stderr().lock();
    let stderr = rustix::stdio::stderr();
    let mut deadline = Instant::now() + patience;
    while !text.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs() as _,
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
        match poll(&mut ready, Some(&timeout)) {
            Ok(0) => return,
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => return,
        }
        match rustix::io::write(stderr, &text[..text.len().min(PIECE)]) {
            Ok(0) => return,
            Ok(written) => {
                text = &text[written..];
                deadline = Instant::now() + patience;
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}

/// `text` with line ends for a terminal in raw mode, or as it is.
fn lines_for(text: &[u8], raw: bool) -> Cow<'_, [u8]> {
    if !raw {
        return Cow::Borrowed(text);
    }
    let mut lines = Vec::with_capacity(text.len() + 8);
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        match line.strip_suffix(b"\n") {
            Some(line) => lines.extend([line, b"\r\n"].concat()),
            None => lines.extend(line),
        }
    }
    Cow::Owned(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_return_the_carriage_while_the_terminal_is_raw() {
        assert_eq!(&*lines_for(b"a\nb\n", true), b"a\r\nb\r\n");
        assert_eq!(&*lines_for(b"a\nb\n", false), b"a\nb\n");
    }
}
