//! Messages on standard error: nothing is held up where nobody reads them.

use std::borrow::Cow;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::terminal;

/// How long a line of the log waits for a slow reader.
const LINE: Duration = Duration::from_millis(100);
/// How long the last words of the process do.
const LAST: Duration = Duration::from_secs(2);
/// What a pipe that is ready for writing takes at once (PIPE_BUF).
const PIECE: usize = 4096;
/// A file with messages of this size becomes the older one, in bytes.
const LIMIT: u64 = 1 << 20;

/// The file that standard error is, if it is one that is bounded here.
static KEPT: Mutex<Option<Kept>> = Mutex::new(None);

/// A file for messages: it and the older one beside it take no more than twice the limit.
pub(crate) struct Kept {
    path: PathBuf,
    file: File,
    len: u64,
    limit: u64,
}

impl Kept {
    /// Begins a file; what an earlier VM has left there becomes the older one.
    pub(crate) fn begin(path: &Path) -> io::Result<Kept> {
        Kept::with_limit(path, LIMIT)
    }

    fn with_limit(path: &Path, limit: u64) -> io::Result<Kept> {
        if fs::symlink_metadata(path).is_ok_and(|meta| meta.len() > 0) {
            fs::rename(path, path.with_extension("log.1"))?;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(path)?;
        Ok(Kept {
            path: path.to_owned(),
            file,
            len: 0,
            limit,
        })
    }

    /// Makes it standard error, whose messages it takes from now on.
    pub(crate) fn become_standard_error(self) -> io::Result<()> {
        rustix::stdio::dup2_stderr(&self.file)?;
        *KEPT.lock().unwrap_or_else(PoisonError::into_inner) = Some(self);
        Ok(())
    }

    /// Makes room for a message; whether it is another file by now.
    fn room_for(&mut self, len: usize) -> bool {
        let full = self.len > 0 && self.len + len as u64 > self.limit;
        if full {
            match Kept::with_limit(&self.path, self.limit) {
                Ok(next) => *self = next,
                // Its folder is gone, say: bounded it stays.
                Err(_) => {
                    let _ = self.file.set_len(0);
                    self.len = 0;
                }
            }
        }
        self.len += len as u64;
        full
    }
}

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
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kept) = kept.as_mut()
        && kept.room_for(text.len())
    {
        // Else the older file goes on.
        let _ = rustix::stdio::dup2_stderr(&kept.file);
    }
    drop(kept);
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
    fn a_file_of_messages_is_bounded_and_its_end_is_kept() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("launcher.log");
        let mut kept = Kept::with_limit(&path, 100).unwrap();
        for number in 0..100 {
            let line = format!("line {number:04}\n");
            kept.room_for(line.len());
            kept.file.write_all(line.as_bytes()).unwrap();
        }
        let older = fs::read_to_string(folder.path().join("launcher.log.1")).unwrap();
        let text = older + &fs::read_to_string(&path).unwrap();
        assert!((100..=200).contains(&text.len()), "{}", text.len());
        assert!(text.ends_with("line 0098\nline 0099\n"), "{text}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        // Its folder is gone.
        drop(folder);
        for _ in 0..100 {
            kept.room_for(10);
            kept.file.write_all(&[b'x'; 10]).unwrap();
        }
        assert!(kept.file.metadata().unwrap().len() <= 100);
    }

    #[test]
    fn lines_return_the_carriage_while_the_terminal_is_raw() {
        assert_eq!(&*lines_for(b"a\nb\n", true), b"a\r\nb\r\n");
        assert_eq!(&*lines_for(b"a\nb\n", false), b"a\nb\n");
    }
}
