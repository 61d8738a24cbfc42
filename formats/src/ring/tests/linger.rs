//! Waiting without sleeping.

use std::time::Instant;

use super::*;

/// Longer than any of these waits: they end because something has come.
const LONG: Duration = Duration::from_secs(600);

/// Runs `root` on a ring that never sleeps. `waits` is set when it waits.
fn awake<F: Future>(ring: &Ring, waits: &AtomicBool, root: F) -> F::Output {
    ring.block_on(root, || {
        let look = || {
            waits.store(true, Ordering::SeqCst);
            false
        };
        assert!(ring.linger(LONG, look).is_some());
    })
}

/// Does something on another thread once the ring waits.
fn meanwhile(act: impl FnOnce() + Send + 'static) -> (Arc<AtomicBool>, thread::JoinHandle<()>) {
    let waits = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&waits);
    let thread = thread::spawn(move || {
        while !seen.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        act();
    });
    (waits, thread)
}

#[test]
fn nothing_comes_to_a_ring_with_nothing_to_do() {
    each(|ring| {
        assert_eq!(ring.linger(Duration::ZERO, || false), None);
        let start = Instant::now();
        let limit = Duration::from_millis(2);
        assert_eq!(ring.linger(limit, || false), None);
        assert!(start.elapsed() >= limit);
    });
}

#[test]
fn what_the_caller_looks_for_ends_it() {
    each(|ring| {
        assert_eq!(ring.linger(LONG, || true), Some(Duration::ZERO));
        assert_eq!(ring.linger(Duration::ZERO, || true), Some(Duration::ZERO));
        let mut looks = 0;
        let after = ring.linger(LONG, || {
            looks += 1;
            looks == 5
        });
        assert!(after.is_some());
    });
}

#[test]
fn a_task_that_another_thread_wakes_ends_it() {
    each(|ring| {
        let (send, waker) = std::sync::mpsc::channel::<Waker>();
        let (waits, thread) = meanwhile(move || waker.recv().unwrap().wake());
        let mut polls = 0;
        let root = poll_fn(|cx| {
            polls += 1;
            let _ = send.send(cx.waker().clone());
            match polls {
                1 => Poll::Pending,
                _ => Poll::Ready(()),
            }
        });
        awake(ring, &waits, root);
        thread.join().unwrap();
    });
}

#[test]
fn a_transfer_is_submitted_and_its_completion_ends_it() {
    each(|ring| {
        let file = engine_file(&[7; 512]);
        let to = segments(&[0; 512]);
        // It may be in before the ring waits for it.
        let waits = AtomicBool::new(false);
        awake(ring, &waits, ring.read_exact_at(&file, 0, to.clone())).unwrap();
        assert_eq!(bytes(&to), [7; 512]);
    });
}

#[test]
fn an_eventfd_that_is_signalled_ends_it() {
    each(|ring| {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let event = eventfd(flags);
            let other = rustix::io::dup(&event).unwrap();
            let (waits, thread) = meanwhile(move || signal(other, 3));
            let value = awake(ring, &waits, ring.read_eventfd(&event));
            assert_eq!(value.unwrap(), 3);
            thread.join().unwrap();
        }
    });
}
