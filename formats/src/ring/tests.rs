//! Operations and their results. Tasks have tests of their own.

mod linger;
mod tasks;
mod together;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::thread;
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::fs::OFlags;

use super::*;
use crate::Buffer;
use crate::testing::{allocations, bytes, engines, run, segments};

/// Runs a test on each engine.
fn each(test: impl Fn(&Ring)) {
    for engine in engines() {
        let ring = Ring::new(engine).unwrap();
        assert_eq!(ring.engine(), engine);
        test(&ring);
    }
}

fn file() -> File {
    tempfile::tempfile().unwrap().into()
}

/// A file whose transfers always go to the engine.
fn engine_file(content: &[u8]) -> File {
    let named = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(named.path(), content).unwrap();
    let flags = OFlags::RDWR | OFlags::DSYNC;
    let fd = rustix::fs::open(named.path(), flags, rustix::fs::Mode::empty()).unwrap();
    fd.into()
}

fn eventfd(flags: EventfdFlags) -> File {
    rustix::event::eventfd(0, flags).unwrap().into()
}

fn signal(event: impl std::os::fd::AsFd, value: u64) {
    assert_eq!(rustix::io::write(event, &value.to_ne_bytes()), Ok(8));
}

/// Polls a future once, with a waker that does nothing.
fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    std::pin::Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn what_is_written_is_read() {
    each(|ring| {
        run(ring, async {
            let file = file();
            let from = segments(b"hello");
            ring.write_all_at(&file, 3, from).await.unwrap();
            ring.fdatasync(&file).await.unwrap();
            let to = segments(&[1; 8]);
            ring.read_exact_at(&file, 0, to.clone()).await.unwrap();
            assert_eq!(bytes(&to), b"\0\0\0hello");
        });
    });
}

#[test]
fn the_end_of_the_file_is_short_an_error_or_zeroes() {
    each(|ring| {
        run(ring, async {
            let file = engine_file(b"abc");
            let to = segments(&[9; 5]);
            assert_eq!(ring.read_at(&file, 1, to.clone()).await.unwrap(), 2);
            assert_eq!(bytes(&to), b"bc\x09\x09\x09");
            let error = ring.read_exact_at(&file, 1, segments(&[9; 5])).await;
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            for (offset, want) in [(0, b"abc\0\0"), (2, b"c\0\0\0\0"), (7, b"\0\0\0\0\0")] {
                let to = segments(&[9; 5]);
                let whole = ring.read_zero_filled_at(&file, offset, to.clone());
                whole.await.unwrap();
                assert_eq!(bytes(&to), want);
            }
        });
    });
}

#[test]
fn more_than_iov_max_pieces_are_split() {
    each(|ring| {
        run(ring, async {
            let content: Vec<u8> = (0..5000u32).map(|i| (i % 251) as u8).collect();
            let mut buffer = Buffer::zeroed(content.len(), 1).unwrap();
            buffer.copy_from_slice(&content);
            let base = buffer.as_ptr();
            let pieces = (0..content.len()).map(|i| (base.wrapping_add(i), 1));
            // SAFETY: the pieces lie in the buffer, which is kept.
            let from = unsafe { Segments::new(pieces, Rc::new(buffer)) };
            for file in [file(), engine_file(b"")] {
                let count = ring.write_at(&file, 0, from.clone()).await.unwrap();
                assert_eq!(count, 1024);
                ring.write_all_at(&file, 0, from.clone()).await.unwrap();
                from.clone().fill(0);
                ring.read_exact_at(&file, 0, from.clone()).await.unwrap();
                let mut read = vec![0; content.len()];
                from.copy_to(&mut read);
                assert_eq!(read, content);
            }
        });
    });
}

#[test]
fn a_short_transfer_is_continued() {
    each(|ring| {
        let content: Vec<u8> = (0..200_000u32).map(|i| (i % 249) as u8).collect();
        let mut sizes = [1, 7, 4096, 100_000].into_iter().cycle();
        ring.inject(move |_| sizes.next().map(Fault::Short));
        run(ring, async {
            let file = file();
            let from = segments(&content);
            ring.write_all_at(&file, 5, from).await.unwrap();
            let to = segments(&vec![0; content.len()]);
            ring.read_exact_at(&file, 5, to.clone()).await.unwrap();
            assert_eq!(bytes(&to), content);
            let to = segments(&[0; 100]);
            let count = ring.read_at(&file, 5, to.clone()).await.unwrap();
            assert_eq!(bytes(&to)[..count], content[..count]);
        });
    });
}

#[test]
fn a_write_without_progress_is_an_error() {
    each(|ring| {
        ring.inject(|_| Some(Fault::Short(0)));
        let error = run(ring, ring.write_all_at(&file(), 0, segments(b"x")));
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::WriteZero);
    });
}

#[test]
fn a_fault_of_the_host_is_the_operation_s_result() {
    each(|ring| {
        for errno in [libc::EIO, libc::ENOSPC] {
            ring.inject(move |attempt| {
                (attempt.offset == 4096 || attempt.what == What::Sync)
                    .then_some(Fault::Errno(errno))
            });
            run(ring, async {
                let file = file();
                let write = |at| ring.write_all_at(&file, at, segments(b"x"));
                write(0).await.unwrap();
                let failed = write(4096).await.unwrap_err();
                assert_eq!(failed.raw_os_error(), Some(errno));
                let failed = ring.fdatasync(&file).await.unwrap_err();
                assert_eq!(failed.raw_os_error(), Some(errno));
                write(8192).await.unwrap();
            });
        }
    });
}

#[test]
fn eintr_and_eagain_are_tried_again_but_not_for_ever() {
    each(|ring| {
        run(ring, async {
            let file = file();
            let mut errnos = [libc::EINTR, libc::EAGAIN, libc::EAGAIN].into_iter();
            ring.inject(move |_| errnos.next().map(Fault::Errno));
            let from = segments(b"x");
            ring.write_all_at(&file, 0, from).await.unwrap();
            ring.inject(|_| Some(Fault::Errno(libc::EAGAIN)));
            let failed = ring.write_all_at(&file, 0, segments(b"x")).await;
            assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EAGAIN));
        });
    });
}

#[test]
fn fallocate_allocates_punches_and_fails() {
    each(|ring| {
        run(ring, async {
            let file = file();
            let size = || rustix::fs::fstat(&file).unwrap().st_size;
            ring.fallocate(&file, 0, 0, 8192).await.unwrap();
            assert_eq!(size(), 8192);
            let from = segments(&[1; 8192]);
            ring.write_all_at(&file, 0, from).await.unwrap();
            let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            ring.fallocate(&file, punch, 0, 4096).await.unwrap();
            let to = segments(&[2; 8192]);
            ring.read_exact_at(&file, 0, to.clone()).await.unwrap();
            let read = bytes(&to);
            assert!(read[..4096] == [0; 4096] && read[4096..] == [1; 4096]);
            let failed = ring.fallocate(&file, 0, 0, 0).await.unwrap_err();
            assert_eq!(failed.raw_os_error(), Some(libc::EINVAL));
        });
    });
}

#[test]
fn ten_thousand_operations_are_in_flight_at_once() {
    each(|ring| {
        let content: Vec<u8> = (0..10_000u32).flat_map(u32::to_ne_bytes).collect();
        let file = engine_file(&content);
        let done = Rc::new(Cell::new(0));
        let all = Rc::new(RefCell::new(None::<Waker>));
        for i in 0..10_000u32 {
            let (ring2, file, done, all) = (
                ring.clone(),
                file.clone(),
                Rc::clone(&done),
                Rc::clone(&all),
            );
            ring.spawn(async move {
                let to = segments(&[0; 4]);
                let read = ring2.read_exact_at(&file, u64::from(i) * 4, to.clone());
                read.await.unwrap();
                assert_eq!(bytes(&to), i.to_ne_bytes());
                done.set(done.get() + 1);
                if let Some(waker) = all.borrow_mut().take() {
                    waker.wake();
                }
            });
        }
        run(
            ring,
            poll_fn(|cx| {
                *all.borrow_mut() = Some(cx.waker().clone());
                if done.get() < 10_000 {
                    Poll::Pending
                } else {
                    Poll::Ready(())
                }
            }),
        );
    });
}

#[test]
fn an_operation_allocates_nothing() {
    each(|ring| {
        let event = eventfd(EventfdFlags::empty());
        let memory = segments(&[1; 4096]);
        let (cached, engine) = (file(), engine_file(&[1; 8192]));
        let round = async || {
            for file in [&cached, &engine] {
                ring.write_all_at(file, 4096, memory.clone()).await.unwrap();
                ring.read_exact_at(file, 4096, memory.clone())
                    .await
                    .unwrap();
            }
            ring.fdatasync(&cached).await.unwrap();
            signal(&event, 1);
            ring.read_eventfd(&event).await.unwrap();
        };
        run(ring, async {
            // A thread may yet be started in one batch, but not in each.
            let mut fewest = u64::MAX;
            for _ in 0..10 {
                let before = allocations();
                for _ in 0..20 {
                    round().await;
                }
                fewest = fewest.min(allocations() - before);
            }
            assert_eq!(fewest, 0);
        });
    });
}

#[test]
fn an_operation_dropped_early_keeps_its_memory_until_the_kernel_is_done() {
    each(|ring| {
        let file = engine_file(&[7; 1 << 20]);
        let mut buffer = Buffer::zeroed(1 << 20, 4096).unwrap();
        let pieces = [(buffer.as_mut_ptr(), buffer.len())];
        let keep = Rc::new(buffer);
        // SAFETY: the piece is the buffer, which is kept.
        let to = unsafe { Segments::new(pieces, keep.clone()) };
        let mut read = ring.read_exact_at(&file, 0, to);
        assert!(poll_once(&mut read).is_pending());
        drop(read);
        assert_eq!(Rc::strong_count(&keep), 2);
        run(ring, async {});
        assert_eq!(Rc::strong_count(&keep), 1);
    });
}

#[test]
fn an_operation_never_polled_does_nothing() {
    each(|ring| {
        let file = engine_file(b"old");
        drop(ring.write_all_at(&file, 0, segments(b"new")));
        let to = segments(&[0; 3]);
        run(ring, ring.read_exact_at(&file, 0, to.clone())).unwrap();
        assert_eq!(bytes(&to), b"old");
    });
}

#[test]
fn an_operation_holds_its_file_open() {
    each(|ring| {
        let file = engine_file(b"mine");
        let to = segments(&[0; 4]);
        let mut read = ring.read_exact_at(&file, 0, to.clone());
        assert!(poll_once(&mut read).is_pending());
        drop(file);
        let other = engine_file(b"else");
        run(ring, read).unwrap();
        assert_eq!(bytes(&to), b"mine");
        drop(other);
    });
}

#[test]
fn dropping_the_last_ring_waits_for_what_is_in_flight() {
    for engine in engines() {
        let ring = Ring::new(engine).unwrap();
        let done = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&done);
        let mut call = ring.call(&file(), move |_| {
            thread::sleep(Duration::from_millis(30));
            flag.store(true, Ordering::Release);
            Ok(())
        });
        let event = eventfd(EventfdFlags::empty());
        let mut wait = ring.wait_readable(&event);
        assert!(poll_once(&mut call).is_pending());
        assert!(poll_once(&mut wait).is_pending());
        drop((call, wait, ring));
        assert!(done.load(Ordering::Acquire));
    }
}

#[test]
fn a_call_returns_its_error() {
    each(|ring| {
        let file = file();
        run(ring, ring.call(&file, |_| Ok(()))).unwrap();
        for (error, errno) in [
            (io::Error::from_raw_os_error(libc::EAGAIN), libc::EAGAIN),
            (io::ErrorKind::Other.into(), libc::EIO),
        ] {
            let result = run(ring, ring.call(&file, |_| Err(error)));
            assert_eq!(result.unwrap_err().raw_os_error(), Some(errno));
        }
    });
}

#[test]
fn an_eventfd_is_taken_and_reset() {
    each(|ring| {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let event = eventfd(flags);
            signal(&event, 3);
            signal(&event, 4);
            assert_eq!(run(ring, ring.read_eventfd(&event)).unwrap(), 7);
            let other: OwnedFd = std::os::fd::AsFd::as_fd(&event)
                .try_clone_to_owned()
                .unwrap();
            let thread = thread::spawn(move || {
                thread::sleep(Duration::from_millis(10));
                signal(&other, 5);
            });
            let value = run(ring, ring.read_eventfd(&event)).unwrap();
            thread.join().unwrap();
            assert_eq!(value, 5);
        }
    });
}

#[test]
fn a_wait_dropped_early_is_forgotten() {
    each(|ring| {
        let event = eventfd(EventfdFlags::NONBLOCK);
        for _ in 0..300 {
            let mut wait = ring.wait_readable(&event);
            assert!(poll_once(&mut wait).is_pending());
        }
        run(ring, async {});
        signal(&event, 1);
        let revents = run(ring, ring.wait_readable(&event)).unwrap();
        assert_eq!(revents, libc::POLLIN as usize);
    });
}
