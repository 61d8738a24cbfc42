//! What a schema can say of a value; `schema.rs` writes it as JSON.

/// The values that a key takes, as far as a schema can tell them from others.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// `true` or `false`.
    Truth,
    /// A whole number in this range.
    Whole {
        /// The least.
        min: u64,
        /// The greatest.
        max: u64,
    },
    /// A size: bytes, or a text with a unit (whose range a schema cannot tell).
    Size {
        /// The least, in bytes.
        min: u64,
        /// The greatest, in bytes.
        max: u64,
        /// What it is a multiple of, in bytes.
        step: u64,
    },
    /// A size that is a power of two.
    PowerOfTwo {
        /// The least, in bytes.
        min: u64,
        /// The greatest, in bytes.
        max: u64,
    },
    /// A text that this regular expression (ECMA 262) matches.
    Text(&'static str),
    /// One of these words, each with what it means.
    Words(&'static [(&'static str, &'static str)]),
    /// One of these words.
    Names(&'static [&'static str]),
    /// The name of a disk format of this build.
    Format,
    /// The index of a disk, or its `id`.
    Disk,
    /// One value, or an array of them.
    OneOrMore(&'static Shape),
}
