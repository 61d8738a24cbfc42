//! The engine io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};

use super::merge::{Merges, Part};
use super::op::{Kind, Request};
use super::table::Token;
use super::tasks::Ready;

/// Submission queue entries; more operations than that are submitted in several goes.
const ENTRIES: u32 = 256;
/// Completions that fit in without the kernel having to put them aside.
const COMPLETIONS: u32 = 1024;

/// Marks the completion of a cancellation, which nobody waits for.
const CANCEL: u64 = u64::MAX;
/// Marks the completion of the poll for [`Ready`].
const NOTIFY: u64 = u64::MAX - 1;

/// An io_uring, and what did not fit into its submission queue.
pub(super) struct Uring {
    ring: IoUring,
    /// What came last, and may be continued by what comes next.
    merges: Merges,
    backlog: VecDeque<squeue::Entry>,
    /// A poll for [`Ready`] is under way.
    armed: bool,
}

impl Uring {
    /// Sets up a ring with what this kernel has. Fails where io_uring is refused or too old.
    pub(super) fn new() -> io::Result<Self> {
        let ring = Self::setup()?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
        ];
        let whole = needed.iter().all(|code| probe.is_supported(*code));
        if !whole || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Uring {
            ring,
            merges: Merges::default(),
            backlog: VecDeque::new(),
            armed: false,
        })
    }

    fn setup() -> io::Result<IoUring> {
        // Linux 6.1, 5.19 and earlier ones: the first answers EINVAL to what it does not know.
        let newest = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(COMPLETIONS)
            .build(ENTRIES);
        let invalid = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
        let newer = match newest {
            Err(error) if invalid(&error) => IoUring::builder()
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all()
                .setup_cqsize(COMPLETIONS)
                .build(ENTRIES),
            other => other,
        };
        match newer {
            Err(error) if invalid(&error) => {
                IoUring::builder().setup_cqsize(COMPLETIONS).build(ENTRIES)
            }
            other => other,
        }
    }

    /// Queues the request, which stays where it is until its result is reported.
    pub(super) fn push(&mut self, token: Token, request: &Request) {
        let fd = Fd(request.file.as_raw_fd());
        let offset = request.offset;
        let entry = match (&request.kind, request.iovecs()) {
            (Kind::Read | Kind::Counter, [piece]) => {
                opcode::Read::new(fd, piece.iov_base.cast(), clamp(piece.iov_len))
                    .offset(offset)
                    .build()
            }
            (Kind::Write, [piece]) => {
                opcode::Write::new(fd, piece.iov_base.cast(), clamp(piece.iov_len))
                    .offset(offset)
                    .build()
            }
            (Kind::Read | Kind::Counter, pieces) => {
                opcode::Readv::new(fd, pieces.as_ptr(), pieces.len() as u32)
                    .offset(offset)
                    .build()
            }
            (Kind::Write, pieces) => opcode::Writev::new(fd, pieces.as_ptr(), pieces.len() as u32)
                .offset(offset)
                .build(),
            (Kind::Sync, _) => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            (Kind::Fallocate { mode, len }, _) => opcode::Fallocate::new(fd, *len)
                .offset(offset)
                .mode(*mode)
                .build(),
            (Kind::Poll | Kind::Call(_), _) => {
                opcode::PollAdd::new(fd, libc::POLLIN as u32).build()
            }
        };
        let entry = if request.may_block {
            entry.flags(squeue::Flags::ASYNC)
        } else {
            entry
        };
        let entry = entry.user_data(token.0);
        let before = match Part::of(token, request) {
            Some(part) => self.merges.push(part, entry),
            None => {
                self.queue_last();
                Some(entry)
            }
        };
        if let Some(before) = before {
            self.queue(before);
        }
    }

    /// Nothing continues what came last.
    fn queue_last(&mut self) {
        if let Some(last) = self.merges.take() {
            self.queue(last);
        }
    }

    /// Queues the cancellation of an operation.
    pub(super) fn cancel(&mut self, token: Token) {
        self.queue_last();
        self.queue(opcode::AsyncCancel::new(token.0).build().user_data(CANCEL));
    }

    fn queue(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() && self.try_push(&entry) {
            return;
        }
        self.backlog.push_back(entry);
        self.submit(0);
    }

    fn try_push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: what the entry points to belongs to a request, which stays where it is until
        // its completion is reported.
        unsafe { self.ring.submission().push(entry).is_ok() }
    }

    fn fill(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            if !self.try_push(&entry) {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    fn submit(&mut self, want: usize) {
        loop {
            self.fill();
            let want = if self.backlog.is_empty() { want } else { 0 };
            match self.ring.submit_and_wait(want) {
                Ok(_) => {}
                // A signal; completions that are to be reaped first; no memory just now.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => {
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "io_uring_enter failed");
                    std::thread::sleep(Duration::from_millis(10));
                    return;
                }
            }
            if self.backlog.is_empty() {
                return;
            }
        }
    }

    /// Submits everything queued and, with `wait`, waits for a completion or a notification of
    /// `ready`, in one system call.
    pub(super) fn enter(&mut self, ready: &Ready, wait: bool) {
        self.queue_last();
        if wait && !self.armed {
            let fd = Fd(ready.as_fd().as_raw_fd());
            let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32).build();
            self.queue(poll.user_data(NOTIFY));
            self.armed = true;
        }
        // What is in already is not waited for.
        let wait = wait && self.ring.completion().is_empty();
        if wait || !self.is_idle() {
            self.submit(usize::from(wait));
        }
    }

    /// Submits everything queued.
    pub(super) fn submit_queued(&mut self) {
        self.queue_last();
        if !self.is_idle() {
            self.submit(0);
        }
    }

    /// Whether there is nothing to submit, and nothing that the kernel would report if asked.
    fn is_idle(&mut self) -> bool {
        let queue = self.ring.submission();
        let idle = queue.is_empty() && !queue.taskrun() && !queue.cq_overflow();
        drop(queue);
        idle && self.backlog.is_empty()
    }

    /// Whether completions are in, after the kernel has been asked for those that it holds back.
    ///
    /// That there is work for the kernel to do on this thread does not say so: it may come to no
    /// completion, and the flag for it is also left behind when the work is done already. Whoever
    /// has been told that something is in counts on it that [`Uring::enter`] does not wait.
    pub(super) fn has_completions(&mut self) -> bool {
        let queue = self.ring.submission();
        let held_back = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if held_back {
            self.submit(0);
        }
        !self.ring.completion().is_empty()
    }

    /// Appends the results that are in.
    pub(super) fn reap(&mut self, ready: &Ready, done: &mut Vec<(Token, i32)>) {
        for entry in self.ring.completion() {
            match entry.user_data() {
                CANCEL => {}
                NOTIFY => {
                    self.armed = false;
                    ready.clear();
                }
                token => {
                    let (token, result) = (Token(token), entry.result());
                    if !self.merges.report(token, result, done) {
                        done.push((token, result));
                    }
                }
            }
        }
    }
}

/// A length for the kernel, which transfers less than 2 GiB at a time anyway.
fn clamp(len: usize) -> u32 {
    const MAX: usize = 0x7fff_f000;
    len.min(MAX) as u32
}
