//! One option is one documented field: [`options!`] makes of it the field of a struct, its reader
//! and its description, so that the file, the help and the reference cannot disagree.

use std::fmt;
use std::ops::Range;

use super::host_file::{self, HostFile};
use super::kinds::FilePath;
use super::resolved::{Held, Part, Parts};
use super::section::{self, Section};
use super::shape::Shape;
use super::value::{Leaf, Listed};

/// What one key of the file means: all that help, schema and reference have to say about it.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The key.
    pub name: &'static str,
    /// What it does: the documentation of its field.
    pub doc: &'static str,
    /// What it takes.
    pub takes: Takes,
    /// What holds if it is not written.
    pub absent: Absent,
    /// A value that somebody might write, as TOML; empty for tables.
    pub example: &'static str,
}

/// What a key takes.
#[derive(Clone, Copy, Debug)]
pub enum Takes {
    /// A value, in words, "a whole number, 1 to 254", and as far as a schema can tell.
    Value(&'static str, Shape),
    /// A table with these keys.
    Table(&'static [Key]),
    /// A list of tables with these keys.
    Tables(&'static [Key]),
    /// A path, or a table with these keys: [`super::HostFile`].
    File(&'static [Key]),
    /// A [`Takes::File`] or an array of them.
    Files(&'static [Key]),
    /// Tables by names of the user's own, each with the keys of the top of the file but `extends`
    /// and `profile`.
    Profiles,
}

/// What holds if a key is not written.
#[derive(Clone, Copy, Debug)]
pub enum Absent {
    /// It is an error. With an example of a value, as TOML.
    Error(&'static str),
    /// This value, as TOML.
    Value(&'static str),
    /// What these words say.
    Words(&'static str),
}

impl Key {
    /// The key as it is spelled in the file: `name`, `[boot]`, `[[block]]`, `[profile.NAME]`.
    pub fn spelled(&self) -> String {
        match self.takes {
            Takes::Value(..) | Takes::File(_) | Takes::Files(_) => self.name.to_owned(),
            Takes::Table(_) => format!("[{}]", self.name),
            Takes::Tables(_) => format!("[[{}]]", self.name),
            Takes::Profiles => format!("[{}.NAME]", self.name),
        }
    }

    /// What it does, as running text.
    pub fn meaning(&self) -> String {
        running(self.doc)
    }

    /// The keys of its table, if it takes one and nothing else.
    pub fn keys(&self) -> &'static [Key] {
        match self.takes {
            Takes::Value(..) | Takes::File(_) | Takes::Files(_) | Takes::Profiles => &[],
            Takes::Table(keys) | Takes::Tables(keys) => keys,
        }
    }
}

impl Takes {
    /// What it takes, in words.
    pub fn words(&self) -> &'static str {
        match self {
            Takes::Value(words, _) => words,
            Takes::Table(_) => "a table",
            Takes::Tables(_) => "any number of tables",
            Takes::File(_) => host_file::ONE,
            Takes::Files(_) => host_file::ONE_OR_MORE,
            Takes::Profiles => "a table for each name",
        }
    }
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Absent::Error(_) => f.write_str("must be written"),
            Absent::Value(words) | Absent::Words(words) => f.write_str(words),
        }
    }
}

/// A doc comment without its line breaks.
pub(super) fn running(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The value of one option and where it was written.
#[derive(Debug)]
pub(super) struct Given<T> {
    /// The value or its default; `None` if it is wrong (that is reported already) or filled in
    /// later.
    pub(super) value: Option<T>,
    /// Where its value is; `None` if it is not written.
    pub(super) at: Option<Range<usize>>,
    /// Where each entry of a [`list`] is; empty for any other.
    pub(super) entries: Vec<Range<usize>>,
}

impl<T> Default for Given<T> {
    fn default() -> Self {
        Given {
            value: None,
            at: None,
            entries: Vec::new(),
        }
    }
}

/// How an option is read and described.
pub(super) struct Spec<T> {
    takes: Takes,
    absent: Absent,
    example: &'static str,
    read: fn(&mut Section<'_>, &'static str, Absent) -> Given<T>,
    part: fn(&T) -> Part,
}

impl<T> Spec<T> {
    pub(super) const fn key(&self, name: &'static str, doc: &'static str) -> Key {
        Key {
            name,
            doc,
            takes: self.takes,
            absent: self.absent,
            example: self.example,
        }
    }

    /// With a value that shows more than the example of its kind does, as TOML.
    pub(super) const fn example(self, example: &'static str) -> Self {
        Spec { example, ..self }
    }

    pub(super) fn read(&self, section: &mut Section<'_>, name: &'static str) -> Given<T> {
        (self.read)(section, name, self.absent)
    }

    pub(super) fn part(&self, name: &'static str, plain: &T) -> Held {
        (name, self.absent, (self.part)(plain))
    }
}

/// A value with a default, written as TOML.
pub(super) const fn default<L: Leaf>(literal: &'static str) -> Spec<L::Plain> {
    Spec {
        takes: Takes::Value(L::EXPECTS, L::SHAPE),
        absent: Absent::Value(literal),
        example: L::EXAMPLE,
        read: section::value::<L>,
        part: |plain| Part::Value(Some(L::written(plain))),
    }
}

/// A value that follows from others if it is not written: `words` say how.
pub(super) const fn derived<L: Leaf>(words: &'static str) -> Spec<L::Plain> {
    Spec {
        takes: Takes::Value(L::EXPECTS, L::SHAPE),
        absent: Absent::Words(words),
        example: L::EXAMPLE,
        read: section::value::<L>,
        part: |plain| Part::Value(Some(L::written(plain))),
    }
}

/// A value that may be left out: `words` say what that means.
pub(super) const fn optional<L: Leaf>(words: &'static str) -> Spec<Option<L::Plain>> {
    Spec {
        takes: Takes::Value(L::EXPECTS, L::SHAPE),
        absent: Absent::Words(words),
        example: L::EXAMPLE,
        read: section::optional::<L>,
        part: |plain| Part::Value(plain.as_ref().map(L::written)),
    }
}

/// One value or an array of them, which may be left out: `words` say what that means.
pub(super) const fn list<L: Listed>(words: &'static str) -> Spec<Vec<L::Plain>> {
    Spec {
        takes: Takes::Value(L::ONE_OR_MORE, Shape::OneOrMore(&L::SHAPE)),
        absent: Absent::Words(words),
        example: L::EXAMPLE,
        read: section::list::<L>,
        part: |plain| {
            let all = plain.iter().map(L::written).collect();
            Part::Value((!plain.is_empty()).then_some(toml::Value::Array(all)))
        },
    }
}

/// A file of the host that may be left out: `words` say what that means.
pub(super) const fn optional_file(words: &'static str) -> Spec<Option<HostFile>> {
    Spec {
        takes: Takes::File(HostFile::KEYS),
        absent: Absent::Words(words),
        example: FilePath::EXAMPLE,
        read: host_file::left_out,
        part: |file| Part::Value(file.as_ref().map(HostFile::written)),
    }
}

/// One file of the host or an array of them, which may be left out: `words` say what that means.
pub(super) const fn files(words: &'static str) -> Spec<Vec<HostFile>> {
    Spec {
        takes: Takes::Files(HostFile::KEYS),
        absent: Absent::Words(words),
        example: FilePath::EXAMPLE,
        read: host_file::several,
        part: |files| {
            let all = files.iter().map(HostFile::written).collect();
            Part::Value((!files.is_empty()).then_some(toml::Value::Array(all)))
        },
    }
}

/// A table of options. Left out, it is read as an empty one.
pub(super) const fn table<T: Table>() -> Spec<T> {
    Spec {
        takes: Takes::Table(T::KEYS),
        absent: Absent::Words("the defaults of its keys"),
        example: "",
        read: section::table::<T>,
        part: Part::table,
    }
}

/// A list of tables of options.
pub(super) const fn tables<T: Table>(words: &'static str) -> Spec<Vec<T>> {
    Spec {
        takes: Takes::Tables(T::KEYS),
        absent: Absent::Words(words),
        example: "",
        read: section::tables::<T>,
        part: |tables| Part::tables(tables),
    }
}

/// Profiles: tables by names of the user's own. The value is those names.
pub(super) const fn profiles(words: &'static str) -> Spec<Vec<String>> {
    Spec {
        takes: Takes::Profiles,
        absent: Absent::Words(words),
        example: "{ ci = { cpus = 4 } }",
        read: section::profiles,
        part: |_| Part::Value(None),
    }
}

/// A table of options, read whole.
pub(super) trait Table: Parts + Sized {
    /// Its keys, in the order of its fields.
    const KEYS: &'static [Key];

    /// Tables in it whose keys are no options of it.
    fn more(&self) -> Vec<Held> {
        Vec::new()
    }

    /// Reads it; `None` if something is wrong, which is reported.
    fn from_section(section: Section<'_>) -> Option<Self>;

    /// Reads a list of them and checks them against each other.
    fn from_sections(sections: Vec<Section<'_>>) -> Option<Vec<Self>> {
        // All are read before the first failure counts: each error is reported.
        let read: Vec<_> = sections.into_iter().map(Self::from_section).collect();
        read.into_iter().collect()
    }
}

/// Declares a table of options. Each field names its type, then how it is read: a call of
/// [`default`], [`derived`], [`optional`], [`list`], [`optional_file`], [`files`], [`table`],
/// [`tables`] or [`profiles`]. Makes
///
/// - the struct, plain data;
/// - `KEYS`, which describes the options, with the fields' documentation;
/// - a second struct with the place of each value, for checks that concern several options, with
///   `read` (from a section of the file) and `finish` (into the first; fields under `computed`
///   are its arguments).
macro_rules! options {
    (
        $(#[$meta:meta])*
        pub struct $name:ident, read as $given:ident {
            $($(#[doc = $doc:literal])+ $field:ident: $plain:ty = $spec:expr,)+
        }
        computed {
            $($(#[$computed_meta:meta])+ $computed:ident: $computed_type:ty,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        pub struct $name {
            $($(#[doc = $doc])+ pub $field: $plain,)+
            $($(#[$computed_meta])+ pub $computed: $computed_type,)*
        }

        impl $name {
            /// The keys of this table.
            pub const KEYS: &'static [crate::config::Key] = &[$({
                const SPEC: crate::config::options::Spec<$plain> = $spec;
                SPEC.key(stringify!($field), concat!($($doc, "\n"),+).trim_ascii())
            },)+];
        }

        impl crate::config::resolved::Parts for $name {
            fn parts(&self) -> Vec<crate::config::resolved::Held> {
                vec![$($spec.part(stringify!($field), &self.$field)),+]
            }
        }

        #[doc = concat!("The options of a [`", stringify!($name), "`] with their places.")]
        struct $given {
            $($field: crate::config::options::Given<$plain>,)+
        }

        impl $given {
            fn read(section: &mut crate::config::section::Section<'_>) -> Self {
                $given {
                    $($field: $spec.read(section, stringify!($field)),)+
                }
            }

            /// The keys that are written, each with the place of its value.
            #[allow(dead_code, reason = "not every table compares its keys")]
            fn written(&self) -> Vec<(&'static str, std::ops::Range<usize>)> {
                let all = [$((stringify!($field), self.$field.at.clone())),+];
                all.into_iter().filter_map(|(key, at)| Some((key, at?))).collect()
            }

            fn finish(self, $($computed: $computed_type),*) -> Option<$name> {
                Some($name {
                    $($field: self.$field.value?,)+
                    $($computed,)*
                })
            }
        }
    };
    // A table without relations between its options.
    (
        $(#[$meta:meta])*
        pub struct $name:ident, read as $given:ident { $($fields:tt)+ }
    ) => {
        crate::config::options::options! {
            $(#[$meta])*
            pub struct $name, read as $given { $($fields)+ }
            computed {}
        }

        impl crate::config::options::Table for $name {
            const KEYS: &'static [crate::config::Key] = $name::KEYS;

            fn from_section(mut section: crate::config::section::Section<'_>) -> Option<Self> {
                let given = $given::read(&mut section);
                section.unknown($name::KEYS);
                given.finish()
            }
        }
    };
}
pub(super) use options;
