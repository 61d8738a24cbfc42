//! A disk in memory that records what is asked of it, holds requests, and fails when told to.

use std::collections::HashMap;
use std::future::poll_fn;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use std::task::{Poll, Waker};
use std::time::Instant;

use formats::{Disk, Limits, OpenError, Opening, Pending, Ring, Segments};

use super::*;

/// What was asked of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Read(u64, usize),
    Write(u64, usize),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, bool),
    Resize(u64),
    Close,
}

/// Which calls fail, and with which errno.
type Fault = (fn(Call) -> bool, i32);

/// The disk as the test sees it.
pub(super) struct Script {
    pub(super) bytes: Mutex<Vec<u8>>,
    calls: Mutex<Vec<Call>>,
    /// Requests wait until it is empty.
    held: Mutex<Option<Vec<Waker>>>,
    faults: Mutex<Vec<Fault>>,
    limits: Limits,
}

static SCRIPTS: LazyLock<Mutex<HashMap<PathBuf, Arc<Script>>>> = LazyLock::new(Mutex::default);

static FAKE: Format = Format {
    name: "fake",
    extensions: &[],
    description: "for tests",
    abilities: &[],
    options: &[],
    open,
    create: |_| Err(no_file()),
};

fn no_file() -> OpenError {
    OpenError {
        message: "the fake disk has no file".into(),
        help: None,
        key: "path",
    }
}

fn open<'a>(_: &'a Ring, image: &'a Image) -> Opening<'a> {
    Box::pin(async {
        let script = SCRIPTS.lock().unwrap().get(&image.path).cloned();
        match script {
            Some(script) => Ok(Box::new(Fake(script)) as Box<dyn Disk>),
            None => Err(no_file()),
        }
    })
}

impl Script {
    pub(super) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// Forgets the calls so far.
    pub(super) fn forget(&self) {
        self.calls.lock().unwrap().clear();
    }

    /// Waits until there were `count` calls.
    pub(super) fn wait_calls(&self, count: usize) {
        let start = Instant::now();
        while self.calls.lock().unwrap().len() < count {
            assert!(start.elapsed() < PATIENCE, "{:?}", self.calls());
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Calls come no further until [`Script::release`].
    pub(super) fn hold(&self) {
        self.held.lock().unwrap().get_or_insert_default();
    }

    pub(super) fn release(&self) {
        for waker in self.held.lock().unwrap().take().unwrap_or_default() {
            waker.wake();
        }
    }

    /// Lets calls that `which` picks fail with `errno`.
    pub(super) fn fail(&self, which: fn(Call) -> bool, errno: i32) {
        self.faults.lock().unwrap().push((which, errno));
    }

    pub(super) fn heal(&self) {
        self.faults.lock().unwrap().clear();
    }
}

/// A guest with a fake disk.
pub(super) fn boot(setup: impl FnOnce(&mut Setup, &mut Limits)) -> (Guest, Arc<Script>) {
    let mut options = Setup::new(&FAKE);
    let mut limits = Limits {
        alignment: 512,
        memory_alignment: 1,
        optimal_io: 4096,
        discard_granularity: 4096,
        write_zeroes: true,
        resize: true,
    };
    setup(&mut options, &mut limits);
    let script = Arc::new(Script {
        bytes: Mutex::new(pattern(0, options.size)),
        calls: Mutex::default(),
        held: Mutex::default(),
        faults: Mutex::default(),
        limits,
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    SCRIPTS
        .lock()
        .unwrap()
        .insert(path.clone(), Arc::clone(&script));
    let blk = Blk::open(options.options(path)).unwrap();
    (options.plug(blk, dir), script)
}

struct Fake(Arc<Script>);

impl Fake {
    fn call(&self, call: Call, work: impl FnOnce(&mut Vec<u8>) + 'static) -> Pending<'_> {
        Box::pin(async move {
            self.0.calls.lock().unwrap().push(call);
            poll_fn(|cx| match &mut *self.0.held.lock().unwrap() {
                Some(wakers) => {
                    wakers.push(cx.waker().clone());
                    Poll::Pending
                }
                None => Poll::Ready(()),
            })
            .await;
            let faults = self.0.faults.lock().unwrap();
            if let Some((_, errno)) = faults.iter().find(|(which, _)| which(call)) {
                return Err(io::Error::from_raw_os_error(*errno));
            }
            work(&mut self.0.bytes.lock().unwrap());
            Ok(())
        })
    }
}

impl Disk for Fake {
    fn size(&self) -> u64 {
        self.0.bytes.lock().unwrap().len() as u64
    }

    fn limits(&self) -> Limits {
        self.0.limits
    }

    fn read(&self, offset: u64, to: Segments) -> Pending<'_> {
        self.call(Call::Read(offset, to.len()), move |bytes| {
            let at = offset as usize;
            to.copy_from(&bytes[at..at + to.len()]);
        })
    }

    fn write(&self, offset: u64, from: Segments) -> Pending<'_> {
        self.call(Call::Write(offset, from.len()), move |bytes| {
            let at = offset as usize;
            from.copy_to(&mut bytes[at..at + from.len()]);
        })
    }

    fn flush(&self) -> Pending<'_> {
        self.call(Call::Flush, |_| {})
    }

    fn discard(&self, offset: u64, len: u64) -> Pending<'_> {
        self.call(Call::Discard(offset, len), |_| {})
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Pending<'_> {
        self.call(Call::WriteZeroes(offset, len, unmap), move |bytes| {
            bytes[offset as usize..(offset + len) as usize].fill(0);
        })
    }

    fn resize(&self, size: u64) -> Pending<'_> {
        self.call(Call::Resize(size), move |bytes| {
            bytes.resize(size as usize, 0)
        })
    }

    fn close(self: Box<Self>) -> Pending<'static> {
        Box::pin(async move { self.call(Call::Close, |_| {}).await })
    }
}
