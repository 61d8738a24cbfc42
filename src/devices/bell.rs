//! An eventfd that somebody else has too, signalled without ever waiting for it.
//!
//! A write to an eventfd waits while its counter is full, and whoever holds the eventfd too can
//! make it so at any time, between a look and a write also; that it does not wait (O_NONBLOCK) is
//! for all who hold it, so not ours to say, and a single write cannot ask for it (RWF_NOWAIT is
//! not supported). The kernel's own signals to an eventfd never wait. A completion of an io_uring
//! that has the eventfd registered is one of those, and so is one of the older AIO (io_submit(2))
//! that names it, which sandboxes and administrators that forbid io_uring leave.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;

use io_uring::{IoUring, opcode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// An eventfd that is signalled in one system call.
pub(crate) struct Bell<E> {
    event: E,
    way: Way,
}

/// How it is signalled.
enum Way {
    /// Completes nothing but requests to do nothing.
    Uring(Box<IoUring>),
    Aio(Aio),
    /// The host has neither.
    Write,
}

impl<E: AsFd> Bell<E> {
    pub(crate) fn new(event: E) -> Bell<E> {
        let way = match registered(event.as_fd()) {
            Ok(ring) => Way::Uring(Box::new(ring)),
            Err(error) => match Aio::new() {
                Ok(aio) => {
                    tracing::debug!(%error, "no io_uring: eventfds are signalled by AIO");
                    Way::Aio(aio)
                }
                Err(other) => {
                    tracing::debug!(%error, %other, "no io_uring, no AIO: eventfds are written to");
                    Way::Write
                }
            },
        };
        Bell { event, way }
    }

    /// Signals the eventfd; if its counter is full, that says enough.
    pub(crate) fn ring(&mut self) {
        let rung = match &mut self.way {
            Way::Uring(ring) => {
                // What completed earlier makes room.
                ring.completion().for_each(drop);
                let nop = opcode::Nop::new().build();
                // SAFETY: the entry points to no memory.
                let queued = unsafe { ring.submission().push(&nop) };
                queued.is_ok() && ring.submit().is_ok()
            }
            Way::Aio(aio) => aio.signal(self.event.as_fd()).is_ok(),
            Way::Write => false,
        };
        if !rung {
            // No memory for it just now: the other way still works, and once too often does no
            // harm.
            write(self.event.as_fd());
        }
    }
}

fn registered(event: BorrowedFd<'_>) -> io::Result<IoUring> {
    let ring = IoUring::new(1)?;
    ring.submitter().register_eventfd(event.as_raw_fd())?;
    Ok(ring)
}

/// Signals an eventfd unless that would block, as far as a look beforehand can tell.
fn write(event: BorrowedFd<'_>) {
    let mut ready = [PollFd::from_borrowed_fd(event, PollFlags::OUT)];
    if let Ok(1) = poll(&mut ready, Some(&Timespec::default())) {
        let _ = rustix::io::write(event, &1u64.to_ne_bytes());
    }
}

/// A context of the kernel's AIO (io_setup(2)).
struct Aio(libc::c_ulong);

/// linux/aio_abi.h.
const IOCB_CMD_POLL: u16 = 5;
const IOCB_FLAG_RESFD: u32 = 1;

/// Completions that are taken at once, which each make room.
const EVENTS: usize = 64;

/// `struct io_event` of linux/aio_abi.h.
type Event = [u64; 4];

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

impl Aio {
    /// Fails where the host has none, or no more of it (fs.aio-max-nr).
    fn new() -> io::Result<Aio> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the pointer is valid for a write of the context's number, which is 0 before.
        checked(unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) })?;
        Ok(Aio(context))
    }

    /// Signals an eventfd. It is asked whether it can be read or written, which it always can, so
    /// the request completes at once.
    fn signal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: all zeroes is a valid `iocb`.
        let mut request: libc::iocb = unsafe { mem::zeroed() };
        let fd = event.as_raw_fd().cast_unsigned();
        request.aio_lio_opcode = IOCB_CMD_POLL;
        request.aio_fildes = fd;
        request.aio_buf = (libc::POLLIN | libc::POLLOUT) as u64;
        request.aio_flags = IOCB_FLAG_RESFD;
        request.aio_resfd = fd;
        let mut requests = [&raw mut request];
        let mut submit = || {
            let requests = requests.as_mut_ptr();
            // SAFETY: it is a list of one request, which the kernel has read when it returns; no
            // memory is named in it.
            checked(unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, requests) })
        };
        match submit() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.take()?;
                submit().map(drop)
            }
            result => result.map(drop),
        }
    }

    /// Takes what has completed, which makes room.
    fn take(&self) -> io::Result<()> {
        let mut events = [Event::default(); EVENTS];
        let timeout = ptr::null_mut::<libc::timespec>();
        // SAFETY: there is room for so many events, and none is waited for.
        checked(unsafe {
            let events = events.as_mut_ptr();
            libc::syscall(libc::SYS_io_getevents, self.0, 0, EVENTS, events, timeout)
        })?;
        Ok(())
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: the context is ours, and nobody uses it any more.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    const FULL: u64 = u64::MAX - 1;

    /// Rings on a blocking eventfd whose counter is `before`, every way; returns what it is then.
    fn rung(before: u64, times: usize) -> [u64; 3] {
        let ways: [fn(BorrowedFd<'_>) -> Way; 3] = [
            |event| Way::Uring(Box::new(registered(event).unwrap())),
            |_| Way::Aio(Aio::new().unwrap()),
            |_| Way::Write,
        ];
        ways.map(|way| {
            let theirs = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let mut bell = Bell {
                way: way(theirs.as_fd()),
                event: theirs.try_clone().unwrap(),
            };
            if before > 0 {
                rustix::io::write(&theirs, &before.to_ne_bytes()).unwrap();
            }
            (0..times).for_each(|_| bell.ring());
            let mut value = [0; 8];
            rustix::io::read(&theirs, &mut value).unwrap();
            u64::from_ne_bytes(value)
        })
    }

    #[test]
    fn each_ring_counts() {
        assert_eq!(rung(0, 1), [1; 3]);
        assert_eq!(rung(0, 1000), [1000; 3]);
    }

    #[test]
    fn a_full_counter_is_not_waited_for() {
        for value in rung(FULL, 3) {
            assert!(value >= FULL);
        }
    }

    /// Forbids system calls to the calling thread, as containers do.
    fn forbid(calls: [libc::c_long; 2]) {
        let statement = |code: u32, jt, jf, k: u32| libc::sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        };
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
        let mut program = [
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            statement(equal, 1, 0, calls[0] as u32),
            statement(equal, 0, 1, calls[1] as u32),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, refuse),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: the program outlives the calls, which concern this thread alone.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            let mode = libc::SECCOMP_MODE_FILTER;
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &program), 0);
        }
    }

    #[test]
    fn where_io_uring_is_forbidden_nothing_is_written_that_could_wait() {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                forbid([libc::SYS_io_uring_setup, libc::SYS_write]);
                let mut bell = Bell::new(&event);
                (0..1000).for_each(|_| bell.ring());
            });
        });
        let mut value = [0; 8];
        rustix::io::read(&event, &mut value).unwrap();
        assert_eq!(u64::from_ne_bytes(value), 1000);
    }
}
