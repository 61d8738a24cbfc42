//! A disk served to other programs: a vhost-user-blk backend around the same device that a VM has.
//!
//! A front end (QEMU, Cloud Hypervisor, libblkio, …) connects to a socket, shares its memory and
//! sets virtqueues up by messages; from then on requests go the way they go in a VM. One front end
//! at a time is served. One that makes a mistake loses its connection, and no more.
//!
//! What the messages mean: the [vhost-user protocol][spec].
//!
//! [spec]: https://www.qemu.org/docs/master/interop/vhost-user.html

mod backend;
mod calls;
mod faults;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod inflight;
mod memory;
mod messages;
mod ring;
mod server;
mod session;
mod unflushed;

use std::io;

pub(crate) use server::Server;

use crate::devices::pci::lock;

/// The error of a front end that makes a mistake.
fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}
