//! Control of a running VM: the socket that `launcher up` listens on, and its clients.

pub mod messages;

use std::os::unix::net::UnixStream;

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

    /// Makes a connection the guest's console, with what it printed before if `scrollback`. It is
    /// read and written by threads of the console's own; neither side holds up the guest.
    ///
    /// # Errors
    ///
    /// The VM has no console, or too many are attached.
    fn attach(&self, connection: UnixStream, scrollback: bool) -> Result<(), Failure>;
}
