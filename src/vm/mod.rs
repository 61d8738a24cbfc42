//! Building and running a machine.
