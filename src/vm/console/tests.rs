//! The console with its attachments, without a guest.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn console() -> Arc<Console> {
    Console::new(Vec::new(), None, || ()).unwrap()
}

fn attach(console: &Arc<Console>, scrollback: bool) -> UnixStream {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(PATIENCE)).unwrap();
    console.attach(far, scrollback).unwrap();
    near
}

fn read(connection: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    connection.read_exact(&mut bytes).unwrap();
    bytes
}

fn eventually(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn every_attachment_sees_what_is_printed_and_what_was_if_it_asks_for_it() {
    let console = console();
    console.print(b"before ");
    let mut with = attach(&console, true);
    let mut without = attach(&console, false);
    console.print(b"after");
    assert_eq!(read(&mut with, 12), b"before after");
    assert_eq!(read(&mut without, 5), b"after");
    console.close();
    assert_eq!(with.read(&mut [0]).unwrap(), 0, "the end is its end");
}

#[test]
fn the_scrollback_is_bounded_and_begins_with_what_fits() {
    let console = console();
    let all: Vec<u8> = (0..SCROLLBACK + 70_000)
        .map(|at| (at % 251) as u8)
        .collect();
    for part in all.chunks(7001) {
        console.print(part);
    }
    let mut attached = attach(&console, true);
    assert!(read(&mut attached, SCROLLBACK) == all[70_000..]);
    console.print(&vec![1; 2 * SCROLLBACK]);
    assert_eq!(console.lock().scrollback.len(), SCROLLBACK);
}

#[test]
fn one_that_reads_nothing_delays_neither_the_guest_nor_others_nor_the_end() {
    let console = console();
    let stuck = attach(&console, false);
    let mut other = attach(&console, false);
    let began = Instant::now();
    let reader = std::thread::spawn(move || read(&mut other, 4 << 20).len());
    for _ in 0..4096 {
        console.print(&[b'x'; 1024]);
        std::thread::sleep(Duration::from_micros(20));
    }
    assert_eq!(reader.join().unwrap(), 4 << 20);
    console.close();
    assert!(began.elapsed() < PATIENCE);
    drop(stuck);
}

#[test]
fn what_is_typed_anywhere_reaches_the_guest() {
    let console = console();
    let (mut one, mut two) = (attach(&console, false), attach(&console, false));
    one.write_all(b"one").unwrap();
    two.write_all(b"two").unwrap();
    let typed = Mutex::new(Vec::new());
    eventually("both have typed", || {
        console.input.feed(|bytes| {
            typed.lock().unwrap().extend_from_slice(bytes);
            bytes.len()
        });
        typed.lock().unwrap().len() == 6
    });
    let mut typed = typed.into_inner().unwrap();
    typed.sort_unstable();
    assert_eq!(typed, b"enootw");
}

#[test]
fn one_that_types_no_more_still_watches_and_one_that_is_gone_makes_room() {
    let console = console();
    let mut watching = attach(&console, false);
    watching.shutdown(std::net::Shutdown::Write).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    console.print(b"seen");
    assert_eq!(read(&mut watching, 4), b"seen");
    drop(watching);
    eventually("it is detached", || console.attached() == 0);
    let all: Vec<_> = (0..16).map(|_| attach(&console, false)).collect();
    let (_near, far) = UnixStream::pair().unwrap();
    let refused = console.attach(far, false).unwrap_err();
    assert!(matches!(refused, AttachError::TooMany(16)), "{refused:?}");
    // A guest that takes no input holds up no end of those who type.
    for mut connection in all {
        connection.set_nonblocking(true).unwrap();
        while connection.write(&[b'x'; 4096]).is_ok() {}
    }
    eventually("all are detached", || console.attached() == 0);
    attach(&console, false);
}

#[test]
fn the_boot_mark_is_told_once_a_boot() {
    let boots = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&boots);
    let on_boot = move || {
        counted.fetch_add(1, Ordering::SeqCst);
    };
    let console = Console::new(Vec::new(), Some("up!".into()), on_boot).unwrap();
    console.print(b"login: u");
    assert_eq!(boots.load(Ordering::SeqCst), 0);
    console.print(b"p! up!");
    console.print(b"up!");
    assert_eq!(boots.load(Ordering::SeqCst), 1);
    console.rebooted();
    console.print(b"up!");
    assert_eq!(boots.load(Ordering::SeqCst), 2);
}

#[test]
fn nobody_attaches_after_the_end() {
    let console = console();
    console.close();
    let (_near, far) = UnixStream::pair().unwrap();
    assert!(matches!(
        console.attach(far, true),
        Err(AttachError::Closed)
    ));
}
