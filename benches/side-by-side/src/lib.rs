//! `launcher disk serve` and `qemu-storage-daemon`, driven over vhost-user in turn by the same
//! front end. `benches/README.md` says how to run it and how to read it.

pub mod case;
pub mod client;
pub mod content;
pub mod host;
pub mod image;
pub mod measure;
pub mod plot;
pub mod processors;
pub mod server;
pub mod statistics;
pub mod table;
pub mod watchdog;

/// Whatever goes wrong, in words.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// With any error.
pub type Result<T> = std::result::Result<T, Error>;
