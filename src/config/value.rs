//! What a value of the file is: a type with its own `Deserialize` that says in words what it
//! expects. `kinds.rs` has the types.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use super::resolved::Written;
use super::section::Context;
use super::shape::Shape;
use super::size;

/// A value of the file, before it becomes plain data.
pub(super) trait Leaf: DeserializeOwned {
    /// What the rest of the program sees.
    type Plain: Written + 'static;
    /// What values it takes, in words that follow "expected".
    const EXPECTS: &'static str;
    /// The same, as far as a schema can say it.
    const SHAPE: Shape;
    /// A value that somebody might write, as TOML.
    const EXAMPLE: &'static str;

    /// Makes it plain data; `at` is where it is written. The error is what would help.
    fn plain(self, cx: &Context<'_>, at: &Range<usize>) -> Result<Self::Plain, String>;

    /// Plain data as one would write it.
    fn written(plain: &Self::Plain) -> toml::Value {
        plain.written()
    }
}

/// A value of which an option may take several.
pub(super) trait Listed: Leaf {
    /// What such an option takes, in words that follow "expected".
    const ONE_OR_MORE: &'static str;
}

impl Leaf for bool {
    type Plain = bool;
    const EXPECTS: &'static str = "true or false";
    const SHAPE: Shape = Shape::Truth;
    const EXAMPLE: &'static str = "true";

    fn plain(self, _: &Context<'_>, _: &Range<usize>) -> Result<bool, String> {
        Ok(self)
    }
}

/// Marks, in an error that passes through serde, what would help.
pub(super) const HINT: &str = "hint: ";

/// A value is not what is expected, and what would help if that can be told.
#[derive(Default)]
pub(super) struct Wrong {
    hint: Option<String>,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.hint {
            Some(hint) => write!(f, "{HINT}{hint}"),
            None => f.write_str("wrong"),
        }
    }
}

impl<T: Into<String>> From<T> for Wrong {
    fn from(hint: T) -> Self {
        Wrong {
            hint: Some(hint.into()),
        }
    }
}

/// Any value of the file.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Scalar {
    Whole(i64),
    Text(String),
    Other(IgnoredAny),
}

impl Scalar {
    pub(super) fn whole(self) -> Result<i64, Wrong> {
        match self {
            Scalar::Whole(number) => Ok(number),
            Scalar::Text(text) if text.trim().parse::<i64>().is_ok() => {
                Err("numbers stand without quotes".into())
            }
            _ => Err(Wrong::default()),
        }
    }

    pub(super) fn text(self) -> Result<String, Wrong> {
        match self {
            Scalar::Text(text) => Ok(text),
            Scalar::Whole(_) | Scalar::Other(_) => Err(Wrong::default()),
        }
    }

    pub(super) fn bytes(self) -> Result<u64, Wrong> {
        match self {
            Scalar::Whole(number) => u64::try_from(number).map_err(|_| Wrong::default()),
            Scalar::Text(text) => Ok(size::parse(&text)?),
            Scalar::Other(_) => Err(Wrong::default()),
        }
    }
}

/// Declares a type of values: name, plain type, what it expects in words and as a schema says it,
/// an example, how it is checked, and how its plain data is written if that is not as its type.
macro_rules! leaf {
    (
        $(#[$meta:meta])*
        $name:ident($plain:ty): $expects:expr, $shape:expr, $example:literal, $check:expr
            $(, $written:expr)?
    ) => {
        $(#[$meta])*
        #[derive(Debug, serde::Deserialize)]
        #[serde(try_from = "crate::config::value::Scalar")]
        pub(super) struct $name(pub(super) $plain);

        impl TryFrom<Scalar> for $name {
            type Error = Wrong;

            fn try_from(scalar: Scalar) -> Result<Self, Wrong> {
                let check: fn(Scalar) -> Result<$plain, Wrong> = $check;
                check(scalar).map($name)
            }
        }

        impl Leaf for $name {
            type Plain = $plain;
            const EXPECTS: &'static str = $expects;
            const SHAPE: crate::config::shape::Shape = $shape;
            const EXAMPLE: &'static str = $example;

            fn plain(
                self,
                _: &crate::config::section::Context<'_>,
                _: &std::ops::Range<usize>,
            ) -> Result<$plain, String> {
                Ok(self.0)
            }

            $(fn written(plain: &$plain) -> toml::Value {
                let written: fn(&$plain) -> toml::Value = $written;
                written(plain)
            })?
        }
    };
}

/// Declares a type of whole numbers.
macro_rules! whole {
    ($(#[$meta:meta])* $name:ident($plain:ty): $min:literal to $max:literal, $example:literal) => {
        leaf! {
            $(#[$meta])*
            $name($plain): concat!("a whole number, ", $min, " to ", $max),
            crate::config::shape::Shape::Whole { min: $min, max: $max }, $example,
            |scalar| {
                let number = scalar.whole()?;
                match <$plain>::try_from(number) {
                    Ok(number) if ($min..=$max).contains(&number) => Ok(number),
                    _ => Err(Wrong::default()),
                }
            }
        }
    };
}

/// Declares an enumeration of words.
macro_rules! words {
    (
        $(#[$meta:meta])*
        pub enum $name:ident {
            $(#[doc = $first_doc:literal])+ $first:ident = $first_word:literal,
            $($(#[doc = $doc:literal])+ $variant:ident = $word:literal,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
        #[serde(try_from = "crate::config::value::Scalar")]
        pub enum $name {
            $(#[doc = $first_doc])+ $first,
            $($(#[doc = $doc])+ $variant,)*
        }

        impl TryFrom<crate::config::value::Scalar> for $name {
            type Error = crate::config::value::Wrong;

            fn try_from(scalar: crate::config::value::Scalar) -> Result<Self, Self::Error> {
                let word = crate::config::value::word(scalar, &[$first_word, $($word),*])?;
                let all = [$name::$first, $($name::$variant),*];
                Ok(all[word])
            }
        }

        impl crate::config::value::Leaf for $name {
            type Plain = $name;
            const EXPECTS: &'static str =
                concat!("\"", $first_word, "\"", $(" or \"", $word, "\""),*);
            const SHAPE: crate::config::shape::Shape = crate::config::shape::Shape::Words(&[
                ($first_word, concat!($($first_doc),+).trim_ascii()),
                $(($word, concat!($($doc),+).trim_ascii()),)*
            ]);
            const EXAMPLE: &'static str = concat!("\"", $first_word, "\"");

            fn plain(
                self,
                _: &crate::config::section::Context<'_>,
                _: &std::ops::Range<usize>,
            ) -> Result<Self, String> {
                Ok(self)
            }
        }

        impl crate::config::resolved::Written for $name {
            fn written(&self) -> toml::Value {
                match self {
                    $name::$first => $first_word.into(),
                    $($name::$variant => $word.into(),)*
                }
            }
        }
    };
}
pub(super) use {leaf, whole, words};

/// Index of a word in `words`.
pub(super) fn word(scalar: Scalar, words: &[&str]) -> Result<usize, Wrong> {
    let text = scalar.text()?;
    match words.iter().position(|word| *word == text) {
        Some(index) => Ok(index),
        None => Err(match super::nearest::nearest(&text, words) {
            Some(index) => format!("did you mean \"{}\"?", words[index]).into(),
            None => Wrong::default(),
        }),
    }
}
