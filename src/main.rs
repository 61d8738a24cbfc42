//! The binary: parse, run, print the error, exit code.

fn main() {}
