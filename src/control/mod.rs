//! Control of a running VM: the socket that `launcher up` listens on, and its clients.

mod address;
pub mod client;
mod connection;
mod find;
mod folder;
mod listener;
pub mod messages;
mod orders;
pub mod place;
mod serve;
pub mod server;

use std::os::unix::net::UnixStream;

pub use client::Client;
pub(crate) use client::connect;
pub use find::{find, find_under};
pub(crate) use listener::Listener;
pub use place::{Claim, Laid, Owner, Place};
pub use server::{Publisher, Server};

use messages::{Failure, Order, Progress, Status};

/// A VM as its control socket sees it: what carries the orders out.
pub trait Subject: Send + Sync {
    /// How it is. Never waits for the guest or a disk.
    fn status(&self) -> Status;

    /// Carries an order out; the reply's content. May take long, and is called on a thread of its
    /// own. Not called for [`Order::Status`], [`Order::Console`] and [`Order::Subscribe`].
    ///
    /// # Errors
    ///
    /// What is wrong with the order, or with the host; nothing has changed then.
    fn obey(
        &self,
        order: Order,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<serde_json::Value, Failure>;

    /// Whether [`Subject::attach`] would succeed now: asked just before, as the reply goes out
    /// ahead of what the guest has printed. Both are called on one thread.
    ///
    /// # Errors
    ///
    /// Those of [`Subject::attach`].
    fn may_attach(&self) -> Result<(), Failure> {
        Ok(())
    }

    /// Makes a connection the guest's console, with what it printed before if `scrollback`. It is
    /// read and written by threads of the console's own; neither side holds up the guest.
    ///
    /// # Errors
    ///
    /// The VM has no console, or too many are attached.
    fn attach(&self, connection: UnixStream, scrollback: bool) -> Result<(), Failure>;
}
