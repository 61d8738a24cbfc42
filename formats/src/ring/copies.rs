//! Long copies from the page cache, made on several processors at once.
//!
//! io_uring copies what is cached on the thread that submits: several long reads would be copied
//! one after the other, while other processors have nothing to do. So while one is under way, the
//! next ones are asked of the kernel's own threads. A single one stays where it is: to wake
//! another thread would only delay it.

use std::cell::Cell;
use std::num::NonZero;
use std::rc::Rc;
use std::thread;

use super::op::{Kind, Request};
use super::shortcut::MAX_LEN;

/// Most long copies of a ring that the kernel's threads make at once. They have a few threads, and
/// what waits for the disk needs them too: a flush is not to queue behind reads.
const MOST_ELSEWHERE: usize = 4;

/// The long copies of a ring.
pub(super) struct Copies {
    counts: Rc<Counts>,
    /// How many may be made elsewhere at once.
    limit: usize,
}

#[derive(Default)]
struct Counts {
    under_way: Cell<usize>,
    /// Of those, what the kernel's threads make.
    elsewhere: Cell<usize>,
}

/// A long copy that is under way as long as this is there.
pub(super) struct LongCopy {
    counts: Rc<Counts>,
    elsewhere: bool,
}

impl Copies {
    /// For a ring of this thread, which may run on so many processors.
    pub(super) fn new() -> Self {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        Copies {
            counts: Rc::default(),
            limit: match processors {
                1 => 0,
                _ => MOST_ELSEWHERE,
            },
        }
    }

    /// Counts a request that is about to be issued, if it is such a copy, and has another thread
    /// make it if it is not the only one.
    pub(super) fn begin(&self, request: &mut Request) {
        // Writes of a file exclude each other anyway.
        let long = matches!(request.kind, Kind::Read)
            && request.left() > MAX_LEN
            && request.file.opened().cached;
        if !long || request.copy.is_some() {
            return;
        }
        let Counts {
            under_way,
            elsewhere,
        } = &*self.counts;
        let other = under_way.get() > 0 && elsewhere.get() < self.limit;
        under_way.set(under_way.get() + 1);
        elsewhere.set(elsewhere.get() + usize::from(other));
        request.copy = Some(LongCopy {
            counts: Rc::clone(&self.counts),
            elsewhere: other,
        });
        request.may_block |= other;
    }
}

impl Drop for LongCopy {
    fn drop(&mut self) {
        let Counts {
            under_way,
            elsewhere,
        } = &*self.counts;
        under_way.set(under_way.get() - 1);
        elsewhere.set(elsewhere.get() - usize::from(self.elsewhere));
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::fs::OFlags;

    use super::super::File;
    use super::super::op::End;
    use super::*;
    use crate::{Buffer, Segments};

    const LONG: usize = MAX_LEN + 4096;

    fn read(file: &File, len: usize) -> Request {
        let to = Segments::from_buffer(Buffer::zeroed(len, 4096).unwrap());
        Request::transfer(Kind::Read, file, 0, to, End::Once)
    }

    fn copies(limit: usize) -> Copies {
        Copies {
            counts: Rc::default(),
            limit,
        }
    }

    /// Whether another thread is to make the copy.
    fn begun(copies: &Copies, mut request: Request) -> (bool, Request) {
        copies.begin(&mut request);
        (request.may_block, request)
    }

    #[test]
    fn a_long_read_goes_to_another_thread_while_one_is_under_way() {
        let file = File::from(tempfile::tempfile().unwrap());
        let copies = copies(2);
        let (first_elsewhere, first) = begun(&copies, read(&file, LONG));
        let (second_elsewhere, second) = begun(&copies, read(&file, LONG));
        assert!(!first_elsewhere && second_elsewhere);
        drop((first, second));
        assert!(!begun(&copies, read(&file, LONG)).0);
    }

    #[test]
    fn the_kernel_s_threads_have_so_many_at_once_and_no_more() {
        let file = File::from(tempfile::tempfile().unwrap());
        let copies = copies(2);
        let begin = || begun(&copies, read(&file, LONG));
        let requests = [begin(), begin(), begin(), begin()];
        let elsewhere = requests.each_ref().map(|(elsewhere, _)| *elsewhere);
        assert_eq!(elsewhere, [false, true, true, false]);
        let [first, second, third, fourth] = requests;
        drop((first, third, fourth));
        assert!(begun(&copies, read(&file, LONG)).0);
        drop(second);
        assert!(!begun(&copies, read(&file, LONG)).0);
    }

    #[test]
    fn a_request_that_is_issued_again_counts_once() {
        let file = File::from(tempfile::tempfile().unwrap());
        let copies = copies(2);
        let mut request = read(&file, LONG);
        copies.begin(&mut request);
        copies.begin(&mut request);
        assert!(!request.may_block);
        drop(request);
        assert_eq!(copies.counts.under_way.get(), 0);
    }

    #[test]
    fn what_is_short_or_past_the_page_cache_or_alone_on_a_processor_stays() {
        let file = File::from(tempfile::tempfile().unwrap());
        let pipe: OwnedFd = std::io::pipe().unwrap().0.into();
        let folder = tempfile::tempdir().unwrap();
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::DIRECT;
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let direct = rustix::fs::open(folder.path().join("direct"), flags, mode).unwrap();
        for (limit, file, len) in [
            (2, file.clone(), MAX_LEN),
            (2, pipe.into(), LONG),
            (2, direct.into(), LONG),
            (0, file, LONG),
        ] {
            let copies = copies(limit);
            let (_, first) = begun(&copies, read(&file, len));
            assert!(!begun(&copies, read(&file, len)).0);
            drop(first);
        }
    }
}
