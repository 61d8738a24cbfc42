use std::cell::RefCell;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::fs::OFlags;

use super::*;
use crate::Buffer;
use crate::testing::{engines, run};

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

fn segments(bytes: &[u8]) -> Segments {
    let segments = Segments::from_buffer(Buffer::zeroed(bytes.len(), 1).unwrap());
    segments.copy_from(bytes);
    segments
}

fn bytes(segments: Segments) -> Vec<u8> {
    segments.into_buffer().unwrap().to_vec()
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
            assert_eq!(bytes(to), b"\0\0\0hello");
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
            assert_eq!(bytes(to), b"bc\x09\x09\x09");
            let error = ring.read_exact_at(&file, 1, segments(&[9; 5])).await;
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            for (offset, want) in [(0, b"abc\0\0"), (2, b"c\0\0\0\0"), (7, b"\0\0\0\0\0")] {
                let to = segments(&[9; 5]);
                let whole = ring.read_zero_filled_at(&file, offset, to.clone());
                whole.await.unwrap();
                assert_eq!(bytes(to), want);
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
            assert_eq!(bytes(to), content);
            let to = segments(&[0; 100]);
            let count = ring.read_at(&file, 5, to.clone()).await.unwrap();
            assert_eq!(bytes(to)[..count], content[..count]);
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
            let read = bytes(to);
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
                assert_eq!(bytes(to), i.to_ne_bytes());
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
        assert_eq!(bytes(to), b"old");
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
        assert_eq!(bytes(to), b"mine");
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

#[test]
fn a_waker_works_from_another_thread() {
    each(|ring| {
        for _ in 0..50 {
            let (send, receive) = mpsc::channel::<Waker>();
            let woken = Arc::new(AtomicBool::new(false));
            let flag = Arc::clone(&woken);
            let thread = thread::spawn(move || {
                let waker = receive.recv().unwrap();
                flag.store(true, Ordering::Release);
                waker.wake();
            });
            run(
                ring,
                poll_fn(|cx| {
                    if woken.load(Ordering::Acquire) {
                        return Poll::Ready(());
                    }
                    let _ = send.send(cx.waker().clone());
                    Poll::Pending
                }),
            );
            thread.join().unwrap();
        }
    });
}

#[test]
fn a_task_that_never_waits_leaves_others_their_turn() {
    each(|ring| {
        let file = file();
        let stop = Rc::new(Cell::new(false));
        let (flag, ring2, file2) = (Rc::clone(&stop), ring.clone(), file.clone());
        ring.spawn(async move {
            while !flag.get() {
                let from = segments(b"x");
                ring2.write_all_at(&file2, 0, from).await.unwrap();
            }
        });
        run(ring, async {
            // Each of these needs the engine, and so the busy task to give way.
            for _ in 0..3 {
                ring.fdatasync(&file).await.unwrap();
                ring.yield_now().await;
            }
            stop.set(true);
        });
    });
}

#[test]
fn yield_now_lets_other_tasks_run() {
    each(|ring| {
        let order = Rc::new(RefCell::new(Vec::new()));
        for name in ["a", "b"] {
            let (order, ring2) = (Rc::clone(&order), ring.clone());
            ring.spawn(async move {
                for _ in 0..2 {
                    order.borrow_mut().push(name);
                    ring2.yield_now().await;
                }
            });
        }
        run(ring, async {
            while order.borrow().len() < 4 {
                ring.yield_now().await;
            }
        });
        assert_eq!(*order.borrow(), ["a", "b", "a", "b"]);
    });
}

#[test]
fn idle_is_called_once_for_a_batch_of_ready_tasks() {
    each(|ring| {
        let done = Rc::new(Cell::new(0));
        for _ in 0..64 {
            let done = Rc::clone(&done);
            ring.spawn(async move { done.set(done.get() + 1) });
        }
        let event = eventfd(EventfdFlags::empty());
        let mut batches = Vec::new();
        ring.block_on(ring.read_eventfd(&event), || {
            batches.push(done.get());
            signal(&event, 1);
        })
        .unwrap();
        assert_eq!(batches[0], 64);
        assert!(batches.len() <= 3, "{batches:?}");
    });
}

#[test]
fn tasks_end_with_the_outermost_block_on() {
    each(|ring| {
        let alive = Rc::new(());
        let held = Rc::clone(&alive);
        let event = eventfd(EventfdFlags::empty());
        let ring2 = ring.clone();
        ring.spawn(async move {
            let _held = held;
            let _ = ring2.read_eventfd(&event).await;
        });
        run(ring, async {
            run(ring, ring.yield_now());
            assert_eq!(Rc::strong_count(&alive), 2);
        });
        assert_eq!(Rc::strong_count(&alive), 1);
    });
}

#[test]
fn a_task_that_panics_takes_nothing_with_it() {
    each(|ring| {
        let event = eventfd(EventfdFlags::empty());
        let ring2 = ring.clone();
        ring.spawn(async move {
            let _ = ring2.wait_readable(&event).await;
        });
        ring.spawn(async { panic!("on purpose") });
        let result = catch_unwind(AssertUnwindSafe(|| {
            run(ring, std::future::pending::<()>());
        }));
        assert!(result.is_err());
        run(ring, ring.yield_now());
    });
}

#[test]
fn a_task_is_run_again_only_when_it_is_woken() {
    each(|ring| {
        let polls = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&polls);
        ring.spawn(poll_fn(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
            Poll::Pending
        }));
        run(ring, async {
            for _ in 0..10 {
                ring.yield_now().await;
            }
        });
        assert_eq!(polls.load(Ordering::Relaxed), 1);
    });
}

/// Forbids io_uring to the calling thread, as containers do.
fn forbid_io_uring() {
    let filter = |code: u32, jt, jf, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut program = [
        filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        filter(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        filter(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
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
fn auto_falls_back_to_threads_where_io_uring_is_refused() {
    thread::spawn(|| {
        let best = *engines().last().unwrap();
        assert_eq!(Ring::new(Engine::Auto).unwrap().engine(), best);
        forbid_io_uring();
        let refused = Ring::new(Engine::IoUring).err().unwrap();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        let ring = Ring::new(Engine::Auto).unwrap();
        assert_eq!(ring.engine(), Engine::Threads);
        let file = file();
        run(&ring, ring.write_all_at(&file, 0, segments(b"x"))).unwrap();
    })
    .join()
    .unwrap();
}
