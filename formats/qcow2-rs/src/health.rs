//! What an error of the host has left of an image that is open.

use std::cell::Cell;
use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

/// What may no longer be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lost {
    /// What the file holds of the tables is no longer what memory says of it: the crate takes a
    /// table for clean before it has been written. Nothing more is written; the file is as a
    /// power cut at that moment would have left it.
    Writes,
    /// A table in memory may hold anything: the crate takes one for read before it has been.
    All,
}

/// What may still be done with an image and its backing files.
pub(crate) struct Health {
    path: PathBuf,
    lost: Cell<Option<Lost>>,
}

impl Health {
    pub(crate) fn new(path: PathBuf) -> Self {
        Health {
            path,
            lost: Cell::new(None),
        }
    }

    /// An error of EIO once it may not be read.
    pub(crate) fn may_read(&self) -> io::Result<()> {
        match self.lost.get() {
            Some(Lost::All) => Err(Errno::IO.into()),
            _ => Ok(()),
        }
    }

    /// An error of EIO once it may not be written.
    pub(crate) fn may_write(&self) -> io::Result<()> {
        match self.lost.get() {
            Some(_) => Err(Errno::IO.into()),
            None => Ok(()),
        }
    }

    /// Something begins that the image does not survive unless it succeeds.
    pub(crate) fn stake(&self, lost: Lost) -> Stake<'_> {
        Stake { health: self, lost }
    }

    fn lose(&self, lost: Lost, why: &dyn std::fmt::Display) {
        if self.lost.get() < Some(lost) {
            self.lost.set(Some(lost));
            let path = self.path.display();
            let what = match lost {
                Lost::Writes => "it is not written any more",
                Lost::All => "it is not used any more",
            };
            tracing::error!("`{path}`: metadata: {why}; {what} until it is opened again");
        }
    }
}

/// Costs the image something if it is dropped before its operation succeeded.
#[must_use]
pub(crate) struct Stake<'a> {
    health: &'a Health,
    lost: Lost,
}

impl Stake<'_> {
    /// The operation's result is here.
    pub(crate) fn settle<T>(self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result {
            self.health.lose(self.lost, error);
        }
        std::mem::forget(self);
        result
    }
}

impl Drop for Stake<'_> {
    fn drop(&mut self) {
        self.health.lose(self.lost, &"an operation was given up");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(lost: &[Lost]) -> (bool, bool) {
        let health = Health::new("a.qcow2".into());
        for lost in lost {
            let failed: io::Result<()> = Err(Errno::NOSPC.into());
            assert!(health.stake(*lost).settle(failed).is_err());
        }
        (health.may_read().is_ok(), health.may_write().is_ok())
    }

    #[test]
    fn a_failed_write_of_metadata_ends_writing_and_a_failed_read_ends_all() {
        assert_eq!(after(&[]), (true, true));
        assert_eq!(after(&[Lost::Writes]), (true, false));
        assert_eq!(after(&[Lost::All]), (false, false));
        assert_eq!(after(&[Lost::All, Lost::Writes]), (false, false));
    }

    #[test]
    fn an_operation_that_is_given_up_has_failed() {
        let health = Health::new("a.qcow2".into());
        drop(health.stake(Lost::Writes));
        assert!(health.may_read().is_ok());
        assert_eq!(
            health.may_write().unwrap_err().raw_os_error(),
            Some(Errno::IO.raw_os_error())
        );
        assert!(health.stake(Lost::All).settle(Ok(())).is_ok());
        assert!(health.may_read().is_ok());
    }
}
