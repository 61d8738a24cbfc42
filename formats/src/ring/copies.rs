//! Long copies from the page cache, made on several processors at once.
//!
//! io_uring copies what is cached on the thread that submits: several long reads would be copied
//! one after the other, while other processors have nothing to do. So while one is under way, the
//! next ones are asked of the kernel's own threads. A single one stays where it is: to wake
//! another thread would only delay it.

use std::cell::Cell;
use std::rc::Rc;
use std::thread;

use super::op::{Kind, Request};
use super::shortcut::MAX_LEN;

/// The long copies of a ring that are under way.
pub(super) struct Copies {
    under_way: Rc<Cell<usize>>,
    /// The thread may run on more than one processor.
    several: bool,
}

/// A long copy that is under way as long as this is there.
pub(super) struct LongCopy(Rc<Cell<usize>>);

impl Copies {
    /// For a ring of this thread.
    pub(super) fn new() -> Self {
        Copies {
            under_way: Rc::default(),
            several: thread::available_parallelism().is_ok_and(|count| count.get() > 1),
        }
    }

    /// Counts a request that is about to be issued, if it is such a copy, and has another thread
    /// make it if it is not the only one.
    pub(super) fn begin(&self, request: &mut Request) {
        // Writes of a file exclude each other anyway.
        let long = matches!(request.kind, Kind::Read)
            && request.left() > MAX_LEN
            && request.file.opened().cached;
        if !long || !self.several || request.copy.is_some() {
            return;
        }
        let others = self.under_way.get();
        self.under_way.set(others + 1);
        request.copy = Some(LongCopy(Rc::clone(&self.under_way)));
        request.may_block |= others > 0;
    }
}

impl Drop for LongCopy {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
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

    fn copies(several: bool) -> Copies {
        Copies {
            under_way: Rc::default(),
            several,
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
        let copies = copies(true);
        let (first_elsewhere, first) = begun(&copies, read(&file, LONG));
        let (second_elsewhere, second) = begun(&copies, read(&file, LONG));
        assert!(!first_elsewhere && second_elsewhere);
        drop((first, second));
        assert!(!begun(&copies, read(&file, LONG)).0);
    }

    #[test]
    fn a_request_that_is_issued_again_counts_once() {
        let file = File::from(tempfile::tempfile().unwrap());
        let copies = copies(true);
        let mut request = read(&file, LONG);
        copies.begin(&mut request);
        copies.begin(&mut request);
        assert!(!request.may_block);
        drop(request);
        assert_eq!(copies.under_way.get(), 0);
    }

    #[test]
    fn what_is_short_or_past_the_page_cache_or_alone_on_a_processor_stays() {
        let file = File::from(tempfile::tempfile().unwrap());
        let pipe: OwnedFd = std::io::pipe().unwrap().0.into();
        let folder = tempfile::tempdir().unwrap();
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::DIRECT;
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let direct = rustix::fs::open(folder.path().join("direct"), flags, mode).unwrap();
        for (several, file, len) in [
            (true, file.clone(), MAX_LEN),
            (true, pipe.into(), LONG),
            (true, direct.into(), LONG),
            (false, file, LONG),
        ] {
            let copies = copies(several);
            let (_, first) = begun(&copies, read(&file, len));
            assert!(!begun(&copies, read(&file, len)).0);
            drop(first);
        }
    }
}
