//! Has the host write a file to its disk while it is being filled, so that little is left to wait
//! for at the end.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::{self, JoinHandle};

/// So many bytes are written at once: the host's disk is kept busy, its queue is not filled.
const STEP: u64 = 32 << 20;

enum Order {
    /// Begin to write what there is.
    Begin,
    /// Write all, and wait for it.
    End,
}

/// A thread that waits for the host's disk in place of those who fill the file.
pub(super) struct Durable {
    orders: SyncSender<Order>,
    thread: JoinHandle<io::Result<()>>,
    /// Bytes since the last order.
    since: u64,
}

impl Durable {
    /// For an open file, of which nothing has been written. Dropped, it does nothing any more.
    pub(super) fn new(file: File) -> io::Result<Durable> {
        let (orders, received) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("convert-sync".into());
        Ok(Durable {
            orders,
            thread: thread.spawn(move || serve(&file, &received))?,
            since: 0,
        })
    }

    /// So many more bytes have been handed to the host.
    pub(super) fn written(&mut self, bytes: u64) {
        self.since += bytes;
        if self.since >= STEP {
            self.since = 0;
            // If it is still at the last step, this is for the next one.
            let _ = self.orders.try_send(Order::Begin);
        }
    }

    /// Begins to write all that is left, and goes on without the caller until it is waited for.
    pub(super) fn end(self) -> JoinHandle<io::Result<()>> {
        // If the thread is gone, its result says so.
        let _ = self.orders.send(Order::End);
        self.thread
    }
}

fn serve(file: &File, orders: &Receiver<Order>) -> io::Result<()> {
    while let Ok(order) = orders.recv() {
        match order {
            Order::Begin => {
                // Where the file system cannot do this, there is more to wait for in the end.
                // SAFETY: the call takes no memory.
                unsafe {
                    libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE)
                };
            }
            Order::End => return file.sync_all(),
        }
    }
    Ok(())
}
