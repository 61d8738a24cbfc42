//! The error that reaches the user.

use std::fmt;

/// What went wrong, where, and what to do: printed once, by `main`.
#[derive(Debug)]
pub struct Error {
    /// Exit code: 1 failed, 2 usage or configuration (see [`crate::cli`]).
    pub exit: u8,
    message: String,
    help: Option<String>,
}

/// A result with the error that reaches the user.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Something failed on the host or in the guest: exit code 1.
    pub fn failed(message: impl Into<String>) -> Self {
        Error {
            exit: 1,
            message: message.into(),
            help: None,
        }
    }

    /// The command line or a configuration is wrong: exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Error {
            exit: 2,
            message: message.into(),
            help: None,
        }
    }

    /// Says what to do about it.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        match &self.help {
            Some(help) => write!(f, "\nhelp: {help}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}
