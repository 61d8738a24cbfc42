//! The executor.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::task::{Poll, Waker};
use std::thread;

use rustix::event::EventfdFlags;

use super::{each, eventfd, file, signal};
use crate::testing::{engines, run, segments};
use crate::{Engine, Ring};

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
