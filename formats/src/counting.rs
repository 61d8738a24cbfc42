//! An allocator that counts, for tests and fuzz targets.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, and what each thread asked it for.
#[allow(unreachable_pub, reason = "the fuzz target is built without tests")]
pub struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static HELD: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as promised to this function.
        counted(unsafe { System.alloc(layout) }, layout)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as promised to this function.
        counted(unsafe { System.alloc_zeroed(layout) }, layout)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.set(HELD.get().wrapping_sub(layout.size() as i64));
        // SAFETY: as promised to this function.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// What was refused is not held. An allocator must not panic, so nothing here can overflow.
fn counted(memory: *mut u8, layout: Layout) -> *mut u8 {
    if !memory.is_null() {
        ALLOCATIONS.set(ALLOCATIONS.get().wrapping_add(1));
        HELD.set(HELD.get().wrapping_add(layout.size() as i64));
        PEAK.set(PEAK.get().max(HELD.get()));
    }
    memory
}

/// How often this thread has allocated memory.
#[cfg(test)]
pub(crate) fn allocations() -> u64 {
    ALLOCATIONS.get()
}

/// What this thread holds at some time.
pub(crate) struct Held(i64);

impl Held {
    pub(crate) fn now() -> Held {
        PEAK.set(HELD.get());
        Held(HELD.get())
    }

    /// By how many bytes the thread has held more since, at most. Only of the last one that was
    /// made.
    pub(crate) fn peak(&self) -> u64 {
        (PEAK.get() - self.0).max(0) as u64
    }
}
