//! Threads for calls that block: all transfers where io_uring is refused, and everywhere the
//! calls that io_uring does not know.

use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::{io, thread};

use super::op::{Call, Kind, Request};
use super::table::Token;
use super::tasks::{Ready, lock};

/// As many as a disk of a few spindles or a page cache keeps busy; more would only contend.
const THREADS: usize = 4;

/// What a thread is to do.
enum Work {
    Readv,
    Writev,
    Sync,
    Fallocate { mode: i32, len: i64 },
    Call(Call),
}

/// One call, its arguments borrowed from a request that its table keeps until the result is in.
struct Job {
    token: Token,
    fd: RawFd,
    offset: i64,
    iov: *const libc::iovec,
    count: i32,
    work: Work,
}

// SAFETY: the pointers lead to memory that the ring's table owns until the result is reported,
// and that meanwhile only the kernel and raw copies access.
unsafe impl Send for Job {}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    available: Condvar,
    done: Mutex<Vec<(Token, i32)>>,
    ready: Arc<Ready>,
}

/// The threads, started when there is work for them.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn new(ready: Arc<Ready>) -> Self {
        Pool {
            shared: Arc::new(Shared {
                queue: Mutex::default(),
                available: Condvar::new(),
                done: Mutex::default(),
                ready,
            }),
            threads: Vec::new(),
        }
    }

    /// Has a thread carry out the request, which stays where it is until then.
    pub(super) fn push(&mut self, token: Token, request: &mut Request) {
        let offset = i64::try_from(request.offset).unwrap_or(i64::MAX);
        let (iov, count) = (request.iovecs().as_ptr(), request.iovecs().len() as i32);
        let work = match &mut request.kind {
            Kind::Read | Kind::Counter => Work::Readv,
            Kind::Write => Work::Writev,
            Kind::Sync => Work::Sync,
            Kind::Fallocate { mode, len } => Work::Fallocate {
                mode: *mode,
                len: i64::try_from(*len).unwrap_or(i64::MAX),
            },
            Kind::Call(call) => match call.take() {
                Some(call) => Work::Call(call),
                None => return self.report(token, -libc::EIO),
            },
            // Waits are not for the pool: they would occupy its threads.
            Kind::Poll => return self.report(token, -libc::EINVAL),
        };
        let job = Job {
            token,
            fd: request.file.as_raw_fd(),
            offset,
            iov,
            count,
            work,
        };
        let mut queue = lock(&self.shared.queue);
        queue.jobs.push_back(job);
        let idle = queue.idle >= queue.jobs.len();
        drop(queue);
        if idle {
            self.shared.available.notify_one();
        } else if self.threads.len() < THREADS {
            self.start();
        }
    }

    fn start(&mut self) {
        let shared = Arc::clone(&self.shared);
        match thread::Builder::new()
            .name("disk-io".into())
            .spawn(move || shared.serve())
        {
            Ok(thread) => self.threads.push(thread),
            // Others will get to it; without any, the ring's own thread has to.
            Err(_) if !self.threads.is_empty() => {}
            Err(error) => {
                tracing::warn!(%error, "no thread for disk I/O");
                while let Some(job) = self.shared.next() {
                    self.report(job.token, job.run());
                }
            }
        }
    }

    fn report(&self, token: Token, result: i32) {
        lock(&self.shared.done).push((token, result));
    }

    /// Appends the results that are in.
    pub(super) fn reap(&self, done: &mut Vec<(Token, i32)>) {
        done.append(&mut lock(&self.shared.done));
    }

    /// Whether results are in.
    pub(super) fn has_results(&self) -> bool {
        !lock(&self.shared.done).is_empty()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.available.notify_all();
        for thread in mem::take(&mut self.threads) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn next(&self) -> Option<Job> {
        lock(&self.queue).jobs.pop_front()
    }

    fn serve(&self) {
        let mut queue = lock(&self.queue);
        loop {
            while let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                let (token, result) = (job.token, job.run());
                lock(&self.done).push((token, result));
                self.ready.notify();
                queue = lock(&self.queue);
            }
            if queue.closed {
                return;
            }
            queue.idle += 1;
            queue = self
                .available
                .wait(queue)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}

impl Job {
    /// Carries out the call: a count, or a negated errno.
    fn run(self) -> i32 {
        let Job { fd, offset, .. } = self;
        // SAFETY: the request holds the file until the result is reported.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        // SAFETY: `iov` and the pieces it lists outlive the call (see `Send`); the other calls
        // touch no memory.
        let result = unsafe {
            match self.work {
                Work::Readv => libc::preadv(fd, self.iov, self.count, offset),
                Work::Writev => libc::pwritev(fd, self.iov, self.count, offset),
                Work::Sync => libc::fdatasync(fd) as isize,
                Work::Fallocate { mode, len } => libc::fallocate(fd, mode, offset, len) as isize,
                Work::Call(call) => {
                    return match call(borrowed) {
                        Ok(()) => 0,
                        Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
                    };
                }
            }
        };
        negated(result)
    }
}

/// A result of libc in the kernel's own form: a count, or a negated errno.
pub(super) fn negated(result: isize) -> i32 {
    match i32::try_from(result) {
        Ok(count) if count >= 0 => count,
        // No count is too large: the kernel transfers less than 2 GiB at a time.
        _ => {
            let errno = io::Error::last_os_error().raw_os_error();
            -errno.unwrap_or(libc::EIO)
        }
    }
}
