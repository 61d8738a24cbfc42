//! What a fuzzer does to a server: sessions of front ends that send what they like, with guests
//! that do what they like.
//!
//! The server is the real one from the socket to the host file, on threads of its own that live
//! as long as the process. After each session it must serve a front end that makes no mistake,
//! within a bounded time, from an image that only a guest's requests have changed. A panic of its
//! threads is the fuzzer's to find: its hook ends the process.
//!
//! What a session does depends on how its threads are scheduled too, as it does for users: most
//! scripts wait after each message until it has had its effect, and those do the same each time.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, built for a fuzzer too"
)]

mod connection;
mod front;
mod guest;
mod messages;
mod oracle;
mod script;
#[cfg(test)]
mod seeds;

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{LazyLock, Mutex};
use std::thread;
use std::time::Duration;

use formats::{Engine, Image};
use libc::SIGURG;
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use rustix::net::SocketAddrUnix;

use self::front::Front;
use self::guest::QUEUES;
use self::script::Script;
use super::Server;
use crate::devices::virtio::blk::{Blk, BlkHandle, BlkOptions};
use crate::signals::Signals;

/// Bytes of each disk, before it grows.
const DISK: u64 = 64 << 10;
/// How far it grows.
const GROWN: u64 = 2 * DISK;

/// What sessions led to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Sessions played.
    pub sessions: u64,
    /// Requests that the disk carried out, but for serial numbers.
    pub served: u64,
    /// Requests that it refused.
    pub refused: u64,
}

/// What a server serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Raw,
    /// Whose completed writes may be in the server's memory only.
    Qcow2,
    /// A raw image, read-only.
    ReadOnly,
}

/// A server, and what it serves.
struct Bench {
    address: SocketAddrUnix,
    /// What the address leads to; its name is gone already.
    _socket: OwnedFd,
    image: OwnedFd,
    disk: BlkHandle,
    kind: Kind,
}

/// Plays one session. Panics if the server is not as it was afterwards.
pub fn run(data: &[u8]) -> Tally {
    // All at once: how many files are open does not depend on which was used first.
    static BENCHES: LazyLock<[Mutex<Bench>; 3]> = LazyLock::new(|| {
        [Kind::Raw, Kind::Qcow2, Kind::ReadOnly].map(|kind| Mutex::new(Bench::new(kind)))
    });
    let mut script = Script(data);
    let bench = &BENCHES[[0, 1, 0, 2][usize::from(script.byte() & 3)]];
    let bench = bench.lock().unwrap();
    let [served, refused] = bench.counted();
    Front::new(&bench).play(&mut script);
    let [served_now, refused_now] = bench.counted();
    bench.expect_sound();
    Tally {
        sessions: 1,
        served: served_now - served,
        refused: refused_now - refused,
    }
}

/// The byte that fills a sector of a new disk.
fn pattern(sector: u64) -> u8 {
    sector as u8 ^ 0xa5
}

/// A new image in memory.
fn image(kind: Kind) -> OwnedFd {
    let image = memfd_create("disk", MemfdFlags::CLOEXEC).unwrap();
    let bytes = match kind {
        Kind::Raw | Kind::ReadOnly => (0..DISK).map(|at| pattern(at / 512)).collect(),
        Kind::Qcow2 => {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("disk.qcow2");
            let format = formats::find("qcow2").unwrap();
            let sized = Image {
                size: Some(DISK),
                ..Image::new(&path)
            };
            (format.create)(&sized).unwrap();
            std::fs::read(path).unwrap()
        }
    };
    assert_eq!(rustix::io::pwrite(&image, &bytes, 0), Ok(bytes.len()));
    image
}

impl Bench {
    fn new(kind: Kind) -> Bench {
        let image = image(kind);
        let format = match kind {
            Kind::Raw | Kind::ReadOnly => formats::raw_for(true),
            Kind::Qcow2 => "qcow2",
        };
        let ro = kind == Kind::ReadOnly;
        let disk = Blk::open(BlkOptions {
            image: Image {
                ro,
                lock: false,
                ..Image::new(format!("/proc/self/fd/{}", image.as_raw_fd()))
            },
            format: formats::find(format).unwrap(),
            ephemeral: false,
            id: Some("fuzzed".into()),
            queues: QUEUES,
            engine: Engine::Auto,
            poll: ro.then_some(Duration::ZERO),
            cpus: Vec::new(),
        });
        let disk = disk.unwrap();
        let handle = disk.handle();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.sock");
        let server = Server::new(disk, &path).unwrap();
        let (socket, address) = nameless(&path);
        thread::spawn(move || {
            // One that nobody sends: the server ends with the process.
            let mut signals = Signals::catch_only(&[SIGURG]).unwrap();
            let ended = server.run(&mut signals, |_| {});
            panic!("the server has ended: {ended:?}");
        });
        Bench {
            address,
            _socket: socket,
            image,
            disk: handle,
            kind,
        }
    }

    /// Makes the disk larger, as an administrator does while it is served.
    fn grow(&self, more: u64) {
        let wanted = self.disk.size() + more;
        // What has become larger is to become as small again as it was.
        if self.kind != Kind::Qcow2 && wanted <= GROWN {
            // One that is read-only cannot.
            let _ = self.disk.resize(wanted);
        }
    }

    /// Requests carried out, and refused.
    fn counted(&self) -> [u64; 2] {
        let all = self.disk.counters();
        let served = [
            &all.reads,
            &all.writes,
            &all.flushes,
            &all.discards,
            &all.write_zeroes,
        ];
        let served = served.into_iter().map(|it| it.value()).sum();
        [served, all.refused.value()]
    }
}

/// An address of a socket that stays when its name goes: however the process ends, it leaves
/// nothing in the file system.
fn nameless(path: &Path) -> (OwnedFd, SocketAddrUnix) {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let socket = rustix::fs::open(path, flags, Mode::empty()).unwrap();
    let address = format!("/proc/self/fd/{}", socket.as_raw_fd());
    let address = SocketAddrUnix::new(address.as_str()).unwrap();
    (socket, address)
}

#[cfg(test)]
mod tests {
    use formats::conformance::Random;

    use super::*;

    /// The harness without a fuzzer: inputs from a generator.
    #[test]
    fn sessions_of_random_front_ends_leave_a_server_that_is_sound() {
        let mut random = Random::new(7);
        let mut all = Tally::default();
        for _ in 0..300 {
            let len = random.below(200);
            let data: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
            let Tally {
                sessions,
                served,
                refused,
            } = run(&data);
            all.sessions += sessions;
            all.served += served;
            all.refused += refused;
        }
        assert_eq!(all.sessions, 300);
        assert!(all.served > 30 && all.refused > 10, "{all:?}");
    }
}
