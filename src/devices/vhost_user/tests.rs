//! Back ends that mean harm, or know nothing better.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, channel};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use super::*;
use crate::devices::virtio::testing::{Driver, Line as Interrupts, guest_memory, in_time};

/// Requests of a front end (vhost-user: "Front-end message types").
const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;

/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12;
/// VERSION_1, vhost-user's own.
const FEATURES: u64 = 1 << 32 | 1 << 30;

/// What a back end says to a request with this payload; `None` ends the connection.
type Answer = dyn Fn(u32, &[u8]) -> Option<Vec<u8>> + Send + Sync;

/// A message's header and payload.
fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, 1 | 4, payload.len() as u32];
    let mut bytes = header.map(u32::to_ne_bytes).as_flattened().to_vec();
    bytes.extend(payload);
    bytes
}

/// The back end of a disk of 1 MiB, as it should be.
fn right(request: u32, payload: &[u8]) -> Option<Vec<u8>> {
    let number = |number: u64| message(request, &number.to_ne_bytes());
    Some(match request {
        GET_FEATURES => number(FEATURES),
        GET_PROTOCOL_FEATURES => number(PROTOCOL),
        GET_QUEUE_NUM => number(2),
        GET_CONFIG => {
            let mut config = payload.to_vec();
            config[12..20].copy_from_slice(&2048u64.to_le_bytes());
            message(request, &config)
        }
        GET_VRING_BASE => message(request, payload),
        GET_INFLIGHT_FD => {
            let mut record = payload.to_vec();
            record[..8].copy_from_slice(&4096u64.to_ne_bytes());
            message(request, &record)
        }
        // Acknowledged, once it may be.
        _ => number(0),
    })
}

/// A thread that answers so, connection by connection.
fn back_end(answer: impl Fn(u32, &[u8]) -> Option<Vec<u8>> + Send + Sync + 'static) -> Connect {
    let answer: Arc<Answer> = Arc::new(answer);
    Box::new(move || {
        let (ours, theirs) = UnixStream::pair()?;
        let answer = Arc::clone(&answer);
        thread::spawn(move || while speak(&theirs, &*answer).is_some() {});
        Ok(ours)
    })
}

/// Takes a message and answers it; `None` at the end.
fn speak(mut stream: &UnixStream, answer: &Answer) -> Option<()> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let (request, flags, size) = (word(0), word(4), word(8));
    let mut payload = vec![0; size as usize];
    stream.read_exact(&mut payload).ok()?;
    let asks = [
        GET_FEATURES,
        GET_PROTOCOL_FEATURES,
        GET_QUEUE_NUM,
        GET_CONFIG,
        GET_VRING_BASE,
        GET_INFLIGHT_FD,
    ];
    let bytes = answer(request, &payload)?;
    if flags & 8 == 0 && !asks.contains(&request) {
        return Some(());
    }
    if request != GET_INFLIGHT_FD {
        return stream.write_all(&bytes).ok();
    }
    let file = memfd_create("in flight", MemfdFlags::CLOEXEC).unwrap();
    let fds = [std::os::fd::AsFd::as_fd(&file)];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let parts = [std::io::IoSlice::new(&bytes)];
    rustix::net::sendmsg(stream, &parts, &mut control, SendFlags::NOSIGNAL).ok()?;
    Some(())
}

fn open(connect: Connect, queues: u16) -> Result<VhostUser, OpenError> {
    in_time("a disk to be opened", move || {
        VhostUser::open(VhostUserOptions {
            socket: "a.sock".into(),
            connect,
            queues,
            ro: false,
        })
    })
}

/// What a disk is refused with whose back end answers one request with a number.
#[track_caller]
fn refused(request: u32, number: u64) -> String {
    let connect = back_end(move |asked, payload| match asked == request {
        true => Some(message(request, &number.to_ne_bytes())),
        false => right(asked, payload),
    });
    let error = open(connect, 1).unwrap_err();
    assert_eq!(error.key, "vhost_user");
    error.message
}

/// Sets a device up and takes it down.
fn drive(mut device: VhostUser) {
    in_time("the device", move || {
        let memory = guest_memory();
        let line = Arc::new(Interrupts::default());
        let features = device.features();
        let mut driver = Driver::new(&memory, &line, 0, 64, QUEUE_SIZE, features);
        device.connect(line.clone());
        device.handle().give_up();
        for _ in 0..2 {
            device.negotiated(features);
            device.write_config(32, &[0]);
            let activation = Activation {
                memory: Arc::clone(&memory),
                features,
                queues: vec![driver.active()],
                interrupt: line.clone(),
            };
            device.activate(activation).unwrap();
            driver.kick();
            device.remapped();
            let mut data = [0xff; 80];
            device.read_config(0, &mut data);
            device.read_config(u64::MAX, &mut data);
            assert_eq!(data, [0; 80]);
            device.reset();
        }
    });
}

#[test]
fn a_back_end_that_does_what_it_should_is_driven() {
    drive(open(back_end(right), 1).unwrap());
}

#[test]
fn a_back_end_is_told_of_the_cache_whenever_a_driver_is_ready() {
    const SET_FEATURES: u32 = 2;
    const SET_CONFIG: u32 = 25;
    const CACHE: u64 = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
    let (heard, words) = channel();
    let connect = back_end(move |request, payload| match request {
        GET_FEATURES => Some(message(request, &(FEATURES | CACHE).to_ne_bytes())),
        GET_CONFIG => {
            // Write-back at first.
            let mut config = right(request, payload)?;
            config[12 + 12 + 32] = 1;
            Some(config)
        }
        SET_FEATURES => {
            let _ = heard.send("ready");
            right(request, payload)
        }
        SET_CONFIG => {
            let expected = [32u32, 1, 0].map(u32::to_ne_bytes);
            assert_eq!(payload[..8], expected.as_flattened()[..8]);
            let _ = heard.send(["through", "back"][usize::from(payload[12])]);
            right(request, payload)
        }
        _ => right(request, payload),
    });
    let mut device = open(connect, 1).unwrap();
    let words = in_time("the device", move || {
        let memory = guest_memory();
        let line = Arc::new(Interrupts::default());
        let features = 1 << 32 | CACHE;
        device.connect(line.clone());
        for writes in [true, true, false] {
            device.negotiated(features);
            if writes {
                device.write_config(32, &[0]);
            }
            let driver = Driver::new(&memory, &line, 0, 64, QUEUE_SIZE, features);
            let activation = Activation {
                memory: Arc::clone(&memory),
                features,
                queues: vec![driver.active()],
                interrupt: line.clone(),
            };
            device.activate(activation).unwrap();
            device.reset();
        }
        drop(device);
        words.iter().collect::<Vec<_>>()
    });
    // A back end may forget what it is told before.
    let through = ["through", "ready", "through"];
    assert_eq!(words, [&through[..], &through, &["ready", "back"]].concat());
}

#[test]
fn what_no_disk_offers_is_refused() {
    assert_eq!(
        refused(GET_FEATURES, 0),
        "what is at `a.sock` cannot be used: it knows no features of vhost-user"
    );
    assert!(refused(GET_PROTOCOL_FEATURES, 0).ends_with("so it is no disk"));
    assert!(refused(GET_QUEUE_NUM, 0).ends_with("it has no virtqueue"));
    assert!(refused(GET_FEATURES, 1 << 30).ends_with("it offers no device of virtio 1"));
    assert!(refused(GET_QUEUE_NUM, u64::MAX).contains("cannot be used"));
}

#[test]
fn a_configuration_space_of_another_size_is_refused() {
    for len in [11usize, 73, 4000] {
        let error = open(
            back_end(move |request, payload| {
                let config = vec![1; len];
                match request {
                    GET_CONFIG => Some(message(request, &config)),
                    _ => right(request, payload),
                }
            }),
            1,
        );
        assert!(error.is_err(), "{len}");
    }
    let size = |payload: &[u8], size: u32| {
        let mut config = payload.to_vec();
        config[4..8].copy_from_slice(&size.to_ne_bytes());
        Some(message(GET_CONFIG, &config))
    };
    for field in [0, 1, 59, 61, 256, u32::MAX] {
        let connect = back_end(move |request, payload| match request {
            GET_CONFIG => size(payload, field),
            _ => right(request, payload),
        });
        assert!(open(connect, 1).is_err(), "{field}");
    }
}

#[test]
fn a_back_end_may_go_after_any_message() {
    for last in 0..40 {
        let count = AtomicUsize::new(0);
        let connect =
            back_end(
                move |request, payload| match count.fetch_add(1, Ordering::SeqCst) == last {
                    true => None,
                    false => right(request, payload),
                },
            );
        if let Ok(device) = open(connect, 1) {
            drive(device);
        }
    }
}

#[test]
fn answers_of_noise_harm_nobody() {
    for seed in 0..200u64 {
        let count = AtomicU64::new(0);
        let connect = back_end(move |request, payload| {
            let nth = count.fetch_add(1, Ordering::SeqCst);
            let right = right(request, payload)?;
            let mut state = (seed << 32 | nth).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut random = move || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            };
            // Most are right, so that it comes as far as each of the others.
            if random() % 8 != 0 {
                return Some(right);
            }
            let mut bytes = right;
            match random() % 4 {
                0 => bytes.truncate(random() as usize % bytes.len()),
                1 => bytes.extend((0..random() % 300).map(|_| random() as u8)),
                _ => {
                    for _ in 0..=random() % 4 {
                        let at = random() as usize % bytes.len();
                        bytes[at] = random() as u8;
                    }
                }
            }
            Some(bytes)
        });
        // One that says too little is waited for, until somebody loses patience.
        let patient = Arc::new(Mutex::new(None::<UnixStream>));
        let (cut, ended) = channel();
        let watch = hurry(Arc::clone(&patient), ended);
        let connect: Connect = Box::new(move || {
            let stream = connect()?;
            *lock(&patient) = Some(stream.try_clone()?);
            Ok(stream)
        });
        if let Ok(device) = open(connect, 1) {
            drive(device);
        }
        drop(cut);
        watch.join().unwrap();
    }
}

/// Cuts connections every now and then until it is told to end.
fn hurry(stream: Arc<Mutex<Option<UnixStream>>>, ended: Receiver<()>) -> JoinHandle<()> {
    thread::spawn(move || {
        while ended.recv_timeout(Duration::from_millis(50)) == Err(RecvTimeoutError::Timeout) {
            if let Some(stream) = lock(&stream).take() {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    })
}

#[test]
fn a_back_end_that_refuses_guest_memory_is_tried_again_and_holds_up_nobody() {
    let connect = back_end(|request, payload| match request {
        SET_MEM_TABLE => Some(message(request, &1u64.to_ne_bytes())),
        _ => right(request, payload),
    });
    let device = open(connect, 1).unwrap();
    drive(device);
}

/// It is given eventfds, and may do with them what it likes.
#[test]
fn eventfds_that_a_back_end_plays_with_hold_up_nobody() {
    let event = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let theirs = event.try_clone().unwrap();
    // SAFETY: `into_raw_fd` gives the descriptor away, and nobody else has it.
    let theirs = unsafe { File::from_raw_fd(theirs.into_raw_fd()) };
    let flags = rustix::fs::fcntl_getfl(&theirs).unwrap();
    rustix::fs::fcntl_setfl(&theirs, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    (&theirs).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
    in_time("eventfds", move || {
        crate::devices::event::signal(&event);
        assert!(crate::devices::event::take(&event));
        assert!(!crate::devices::event::take(&event));
    });
}
