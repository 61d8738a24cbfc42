//! The error that reaches the user.

use std::fmt;

use crate::config::Places;
use crate::exit;

/// What went wrong, where, and what to do: printed once, by `main`.
#[derive(Debug)]
pub struct Error {
    /// Exit code: one of [`crate::exit`].
    pub exit: u8,
    text: Text,
    help: Option<String>,
    /// The key of the VM's file that it is about; see [`Places`].
    key: Option<String>,
}

#[derive(Debug)]
enum Text {
    /// One sentence.
    Message(String),
    /// Diagnostics, laid out and maybe coloured.
    Rendered(String),
}

/// A result with the error that reaches the user.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Something failed on the host or in the guest: exit code 1.
    pub fn failed(message: impl Into<String>) -> Self {
        Error::new(exit::FAILED, Text::Message(message.into()))
    }

    /// The command line or a configuration is wrong: exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Error::new(exit::USAGE, Text::Message(message.into()))
    }

    /// Diagnostics of a configuration that are laid out already, each with its own "error: ".
    pub(crate) fn rendered(text: String) -> Self {
        Error::new(exit::USAGE, Text::Rendered(text))
    }

    fn new(exit: u8, text: Text) -> Self {
        Error {
            exit,
            text,
            help: None,
            key: None,
        }
    }

    /// "cannot open `what`": a file that the configuration names. Its fault, or the host's.
    pub(crate) fn unopenable(what: &str, error: &std::io::Error) -> Self {
        let message = format!("cannot open {what}: {}", text(error));
        match formats::OpenError::key_of(error) {
            formats::OpenError::HOST => Error::failed(message),
            _ => Error::usage(message),
        }
    }

    /// Says what to do about it.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// What went wrong, without what to do about it.
    pub(crate) fn message(&self) -> &str {
        match &self.text {
            Text::Message(text) | Text::Rendered(text) => text,
        }
    }

    /// Says which key of the VM's file it is about, as "boot.kernel" or "block.0.path".
    pub(crate) fn about(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// The key of the VM's file that it is about, if its place is not shown yet.
    pub(crate) fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Shows the place of the key that it is about.
    pub(crate) fn at(self, places: &Places) -> Self {
        match (self.key, self.text) {
            (Some(key), Text::Message(message)) => Error {
                exit: self.exit,
                text: Text::Rendered(places.show(&key, message, self.help)),
                help: None,
                key: None,
            },
            (key, text) => Error {
                exit: self.exit,
                help: self.help,
                key,
                text,
            },
        }
    }
}

/// What the user reads of a host's error: without the number that the standard library appends, which
/// says less than the words before it.
pub(crate) fn text(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.text {
            Text::Message(message) => write!(f, "error: {message}")?,
            Text::Rendered(text) => f.write_str(text.trim_end())?,
        }
        match &self.help {
            Some(help) => write!(f, "\nhelp: {help}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

impl From<formats::OpenError> for Error {
    fn from(error: formats::OpenError) -> Self {
        let exit = match error.key {
            formats::OpenError::HOST => exit::FAILED,
            _ => exit::USAGE,
        };
        Error {
            help: error.help,
            ..Error::new(exit, Text::Message(error.message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_and_help_are_two_lines() {
        let error = Error::failed("no room").help("free some");
        assert_eq!(error.to_string(), "error: no room\nhelp: free some");
        assert_eq!(error.exit, 1);
    }

    #[test]
    fn rendered_diagnostics_are_printed_as_they_are() {
        let error = Error::rendered("error: a\n --> b\n".into());
        assert_eq!(error.to_string(), "error: a\n --> b");
        assert_eq!(error.exit, 2);
    }
}
