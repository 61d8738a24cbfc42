//! I/O of one thread.

/// The I/O engine and executor of one thread.
#[derive(Clone)]
pub struct Ring {}
