//! Transfers that need no engine, because the page cache has or takes the bytes at once.
//!
//! io_uring hands a buffered transfer to a kernel thread wherever the file system cannot promise
//! not to wait: every buffered write to ext4, every transfer of tmpfs. That costs several times
//! the copy itself. So a transfer of the page cache is first tried on the spot: with RWF_NOWAIT
//! where that is understood, and else with a plain call whose duration is watched. A call that
//! took long enough to have waited sends those after it to the engine for a while.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, OFlags};

use super::op::{Kind, Request};

/// Whether, and how, a transfer of a file is tried before the engine is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shortcut {
    /// Not at all.
    Never,
    /// With RWF_NOWAIT, which fails rather than waits; after `misses` in a row not for the next
    /// `skip` transfers.
    Nowait { misses: u32, skip: u32 },
    /// With a plain call, but not before this time. `watch` further calls are watched more
    /// closely, for one took long a moment ago.
    Timed { after: Option<Instant>, watch: u32 },
}

/// Longer transfers are left to the engine: their copy would hold up other requests, and is
/// work enough for another thread.
pub(super) const MAX_LEN: usize = 64 << 10;

/// A plain call that takes longer than this and a nanosecond a byte was held up: it waited for
/// the file system, or its thread for a processor.
const PROMPT: Duration = Duration::from_micros(50);

/// Two calls held up within so many are no accident of scheduling.
const WATCH: u32 = 8;

/// For how many times its duration a call that waited keeps others off: so the ring's thread
/// spends no more than about one part in eight waiting.
const REST: u32 = 16;

impl Shortcut {
    const PLAIN: Shortcut = Shortcut::Timed {
        after: None,
        watch: 0,
    };

    /// For reads and for writes of a newly opened file.
    pub(super) fn of(fd: &OwnedFd, flags: OFlags) -> Shortcut {
        let regular = rustix::fs::fstat(fd)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        if regular && !flags.intersects(OFlags::DIRECT | OFlags::SYNC | OFlags::DSYNC) {
            Shortcut::Nowait { misses: 0, skip: 0 }
        } else {
            Shortcut::Never
        }
    }
}

impl Shortcut {
    /// After a transfer that would have had to wait, the last of some in a row.
    fn after_miss(before: u32) -> Shortcut {
        let misses = (before + 1).min(6);
        Shortcut::Nowait {
            misses,
            skip: (1 << misses) - 1,
        }
    }

    /// After a plain call.
    fn after_call(watch: u32, start: Instant, took: Duration, len: usize) -> Shortcut {
        let held_up = took > PROMPT + Duration::from_nanos(len as u64);
        Shortcut::Timed {
            after: (held_up && watch > 0).then(|| start + took * (REST + 1)),
            watch: match held_up {
                true => WATCH,
                false => watch.saturating_sub(1),
            },
        }
    }
}

/// Tries a request at once. Returns what the kernel returned (a count, or a negated errno), or
/// `None` if the engine is to be asked.
///
/// An engine that `batches` tries a read of a file that knows RWF_NOWAIT in the same way itself,
/// and many with one system call: then such a file's reads are left to it from the first on.
pub(super) fn attempt(request: &Request, batches: bool) -> Option<i32> {
    let file = request.file.opened();
    let shortcut = match request.kind {
        Kind::Read => &file.reads,
        Kind::Write => &file.writes,
        _ => return None,
    };
    let len = request.left();
    if len > MAX_LEN {
        return None;
    }
    match shortcut.get() {
        Shortcut::Never => None,
        Shortcut::Nowait { misses, skip: 0 } => {
            let result = transfer(request, libc::RWF_NOWAIT);
            let (next, result) = match -result {
                libc::EOPNOTSUPP => (Shortcut::PLAIN, None),
                libc::EAGAIN => (Shortcut::after_miss(misses), None),
                // Nothing is cached at the end of the file: the engine knows for certain.
                0 => (Shortcut::Nowait { misses, skip: 0 }, None),
                _ if batches && matches!(request.kind, Kind::Read) => {
                    (Shortcut::Never, Some(result))
                }
                _ => (Shortcut::Nowait { misses: 0, skip: 0 }, Some(result)),
            };
            shortcut.set(next);
            match next {
                Shortcut::Timed { .. } => attempt(request, batches),
                _ => result,
            }
        }
        Shortcut::Nowait { misses, skip } => {
            let skip = skip - 1;
            shortcut.set(Shortcut::Nowait { misses, skip });
            None
        }
        Shortcut::Timed { after, watch } => {
            let start = Instant::now();
            if after.is_some_and(|after| start < after) {
                return None;
            }
            let result = transfer(request, 0);
            let took = start.elapsed();
            shortcut.set(Shortcut::after_call(watch, start, took, len));
            Some(result)
        }
    }
}

fn transfer(request: &Request, flags: i32) -> i32 {
    let (fd, iov) = (request.file.as_raw_fd(), request.iovecs());
    let number = match request.kind {
        Kind::Read => libc::SYS_preadv2,
        _ => libc::SYS_pwritev2,
    };
    // No larger offset: -1 would be the file's own position.
    let Ok(offset) = libc::c_long::try_from(request.offset) else {
        return -libc::EINVAL;
    };
    // Two longs make the offset; on 64-bit machines the upper one has no bits of it. libc's own
    // functions are cancellation points, which costs each call two locked instructions.
    let upper: libc::c_long = 0;
    // SAFETY: the pieces are mapped, for the request owns their segments, and `iov` outlives
    // the call.
    let result =
        unsafe { libc::syscall(number, fd, iov.as_ptr(), iov.len(), offset, upper, flags) };
    super::pool::negated(result as isize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: Duration = Duration::from_millis(1);
    const FAST: Duration = Duration::from_micros(5);

    /// Whether the calls after these, one after the other, are left to the engine.
    fn rests_after(calls: &[Duration]) -> bool {
        let start = Instant::now();
        let mut watch = 0;
        calls.iter().any(|took| {
            let next = Shortcut::after_call(watch, start, *took, 4096);
            let Shortcut::Timed { after, watch: left } = next else {
                panic!("{next:?}");
            };
            watch = left;
            after.is_some_and(|after| after == start + *took * 17)
        })
    }

    #[test]
    fn one_call_held_up_is_an_accident_and_two_are_not() {
        assert!(!rests_after(&[FAST; 20]));
        assert!(!rests_after(&[FAST, SLOW, FAST]));
        assert!(rests_after(&[SLOW, SLOW]));
        let mut apart = vec![FAST; 8];
        apart.insert(0, SLOW);
        apart.push(SLOW);
        assert!(!rests_after(&apart));
        apart.remove(1);
        assert!(rests_after(&apart));
    }

    #[test]
    fn what_is_not_cached_is_asked_for_ever_more_rarely() {
        let skips = (0..8).map(|before| match Shortcut::after_miss(before) {
            Shortcut::Nowait { skip, .. } => skip,
            other => panic!("{other:?}"),
        });
        assert_eq!(skips.collect::<Vec<_>>(), [1, 3, 7, 15, 31, 63, 63, 63]);
    }
}
