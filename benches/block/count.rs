//! What a request costs besides time: allocations, and system calls of the disk's thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::FromRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use crate::Result;

/// The system's allocator, which counts while it is told to.
pub(crate) struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static LIVE: AtomicI64 = AtomicI64::new(0);

impl Counting {
    /// Runs `work`; returns how often it allocated, and by how many bytes the heap has grown.
    pub(crate) fn during(work: impl FnOnce() -> Result<()>) -> Result<(u64, i64)> {
        let (allocations, live) = (
            ALLOCATIONS.load(Ordering::SeqCst),
            LIVE.load(Ordering::SeqCst),
        );
        ON.store(true, Ordering::SeqCst);
        let result = work();
        ON.store(false, Ordering::SeqCst);
        result?;
        Ok((
            ALLOCATIONS.load(Ordering::SeqCst) - allocations,
            LIVE.load(Ordering::SeqCst) - live,
        ))
    }

    fn count(allocations: u64, bytes: i64) {
        if ON.load(Ordering::Relaxed) {
            ALLOCATIONS.fetch_add(allocations, Ordering::Relaxed);
            LIVE.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(1, layout.size() as i64);
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count(1, layout.size() as i64);
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::count(1, size as i64 - layout.size() as i64);
        // SAFETY: as in `alloc`.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        Self::count(0, -(layout.size() as i64));
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(old, layout) }
    }
}

/// A thread of this process.
pub(crate) struct Thread(PathBuf);

impl Thread {
    /// The thread whose name begins with `name`.
    pub(crate) fn named(name: &str) -> Result<Thread> {
        for task in fs::read_dir("/proc/self/task")? {
            let path = task?.path();
            if fs::read_to_string(path.join("comm"))?.starts_with(name) {
                return Ok(Thread(path));
            }
        }
        Err(format!("no thread is called `{name}`").into())
    }

    /// Processor time that it has taken so far, in nanoseconds.
    pub(crate) fn time(&self) -> Result<u64> {
        let schedstat = fs::read_to_string(self.0.join("schedstat"))?;
        let time = schedstat.split(' ').next().map(str::parse);
        Ok(time.ok_or("an empty schedstat")??)
    }

    /// Counts its system calls from now on.
    pub(crate) fn system_calls(&self) -> Result<SystemCalls> {
        let id = self.0.file_name().and_then(|id| id.to_str()?.parse().ok());
        Ok(match traced(id.ok_or("a thread without a number")?) {
            Some(file) => SystemCalls::Traced(file),
            None => SystemCalls::Accounted(self.0.join("io")),
        })
    }
}

/// A count of system calls.
pub(crate) enum SystemCalls {
    /// By the kernel's trace point `raw_syscalls:sys_enter`: all of them.
    Traced(File),
    /// By `/proc`: those that read and write, without io_uring_enter(2).
    Accounted(PathBuf),
}

impl SystemCalls {
    /// How it counts.
    pub(crate) fn means(&self) -> &'static str {
        match self {
            SystemCalls::Traced(_) => "all, by the trace point raw_syscalls:sys_enter",
            SystemCalls::Accounted(_) => {
                "reads and writes only, by /proc: for all be root and mount /sys/kernel/tracing"
            }
        }
    }

    /// The count so far.
    pub(crate) fn value(&self) -> Result<u64> {
        match self {
            SystemCalls::Traced(file) => {
                let mut value = [0; 8];
                (&*file).read_exact(&mut value)?;
                Ok(u64::from_ne_bytes(value))
            }
            SystemCalls::Accounted(path) => {
                let mut sum = 0;
                for line in fs::read_to_string(path)?.lines() {
                    if let Some(("syscr" | "syscw", value)) = line.split_once(": ") {
                        sum += value.parse::<u64>()?;
                    }
                }
                Ok(sum)
            }
        }
    }
}

/// A counter of the trace point for a thread, where that is allowed.
fn traced(thread: i32) -> Option<File> {
    let places = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
    let id = places.iter().find_map(|place| {
        fs::read_to_string(format!("{place}/events/raw_syscalls/sys_enter/id")).ok()
    })?;
    // `struct perf_event_attr` of perf_event_open(2), its first version: type, size, config; the
    // rest is zero.
    const PERF_TYPE_TRACEPOINT: u32 = 2;
    let mut attributes = [0u64; 8];
    let size = size_of_val(&attributes) as u32;
    let [t0, t1, t2, t3] = PERF_TYPE_TRACEPOINT.to_ne_bytes();
    let [s0, s1, s2, s3] = size.to_ne_bytes();
    attributes[0] = u64::from_ne_bytes([t0, t1, t2, t3, s0, s1, s2, s3]);
    attributes[1] = id.trim().parse().ok()?;
    let close_on_exec = 8u64;
    // SAFETY: the attributes are as long as they say.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            attributes.as_ptr(),
            thread,
            -1,
            -1,
            close_on_exec,
        )
    };
    // SAFETY: the call has just opened it, and nobody else has it.
    (fd >= 0).then(|| unsafe { File::from_raw_fd(fd as i32) })
}
