//! A configuration as it holds: every value, defaults filled in, and where each comes from.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use formats::{FormatOption, OptionKind, OptionValue};
use toml::Value;

use super::block::Block;
use super::options::{Absent, Table};
use super::places::Places;
use super::size::show;
use super::vm::Vm;
use crate::digest::Digest;

/// A key with what holds for it.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The key within its table.
    pub key: String,
    /// What holds for it.
    pub holds: Holds,
}

/// What holds for a key.
#[derive(Clone, Debug)]
pub enum Holds {
    /// A value; `None` if nothing is given and nothing is filled in. Paths are absolute.
    Value(Option<Value>, Origin),
    /// A table.
    Table(Vec<Setting>),
    /// A list of tables.
    Tables(Vec<Vec<Setting>>),
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A line of a file, which is called as the user named it.
    Line(String, usize),
    /// The command line.
    Set,
    /// It is not written: its default holds.
    Default,
    /// It is not written, and follows from others as these words say.
    Derived(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Line(file, line) => write!(f, "{file}:{line}"),
            Origin::Set => f.write_str("--set"),
            Origin::Default => f.write_str("default"),
            Origin::Derived(words) => f.write_str(words),
        }
    }
}

/// What a table of options holds.
pub(super) trait Parts {
    /// Its options, in order.
    fn parts(&self) -> Vec<Held>;
}

/// An option's key, what holds if it is not written, and what holds.
pub(super) type Held = (&'static str, Absent, Part);

/// What holds for one option.
pub(super) enum Part {
    Value(Option<Value>),
    Table(Vec<Held>),
    Tables(Vec<Vec<Held>>),
}

impl Part {
    pub(super) fn table(table: &impl Table) -> Part {
        Part::Table(all(table))
    }

    pub(super) fn tables<T: Table>(tables: &[T]) -> Part {
        Part::Tables(tables.iter().map(all).collect())
    }
}

fn all(table: &impl Table) -> Vec<Held> {
    let mut parts = table.parts();
    parts.extend(table.more());
    parts
}

impl Vm {
    /// Every value that holds, in the order of [`super::KEYS`]. What has been merged already,
    /// `extends` and `profile`, is not among them.
    pub fn resolved(&self) -> Vec<Setting> {
        let mut parts = self.parts();
        parts.retain(|(key, ..)| !["extends", "profile"].contains(key));
        let mut entries = entries(parts, "", &self.places);
        if let Some(Setting { holds, .. }) = entries.iter_mut().find(|entry| entry.key == "name")
            && let Holds::Value(_, origin @ Origin::Derived(_)) = holds
        {
            *origin = Origin::Derived("from the file's name");
        }
        let disks = entries.iter_mut().find(|entry| entry.key == "block");
        if let Some(Setting {
            holds: Holds::Tables(disks),
            ..
        }) = disks
        {
            for (disk, block) in disks.iter_mut().zip(&self.block) {
                disk.retain(|setting| block.has_option(&setting.key));
            }
            for Setting { key, holds } in disks.iter_mut().flatten() {
                if let ("path", Holds::Value(_, origin @ Origin::Derived(_))) = (&**key, holds) {
                    *origin = Origin::Derived("where `url` is kept");
                }
            }
        }
        entries
    }
}

fn entries(parts: Vec<Held>, above: &str, places: &Places) -> Vec<Setting> {
    let entry = |(key, absent, part): Held| {
        let path = format!("{above}{key}");
        let holds = match part {
            Part::Value(value) => {
                let origin = places.origin(&path).unwrap_or(match absent {
                    Absent::Words(words) if value.is_some() => Origin::Derived(words),
                    _ => Origin::Default,
                });
                Holds::Value(value, origin)
            }
            Part::Table(parts) => Holds::Table(entries(parts, &format!("{path}."), places)),
            Part::Tables(tables) => {
                let tables = tables.into_iter().enumerate();
                let tables = tables
                    .map(|(index, parts)| entries(parts, &format!("{path}.{index}."), places));
                Holds::Tables(tables.collect())
            }
        };
        Setting {
            key: key.to_owned(),
            holds,
        }
    };
    parts.into_iter().map(entry).collect()
}

/// The options of the disk's format that are written, in the format's own table.
pub(super) fn of_format(block: &Block) -> Vec<Held> {
    let formats = formats::formats().unwrap_or_default();
    let format = formats.iter().find(|format| format.name == block.format);
    let Some(format) = format.filter(|_| !block.options.is_empty()) else {
        return Vec::new();
    };
    let options = block.options.iter().map(|(name, value)| {
        let described = format.options.iter().find(|option| option.name == *name);
        let value = match value {
            OptionValue::Bool(value) => Value::Boolean(*value),
            OptionValue::Number(bytes) if described.is_some_and(is_size) => size(bytes),
            OptionValue::Number(number) => number.written(),
            OptionValue::Word(word) => word.written(),
            OptionValue::Path(path) => path.written(),
        };
        (*name, Absent::Words("none"), Part::Value(Some(value)))
    });
    let table = Part::Table(options.collect());
    vec![(format.name, Absent::Words("none"), table)]
}

fn is_size(option: &FormatOption) -> bool {
    matches!(option.kind, OptionKind::Size)
}

/// Plain data that can be written as a value of a file.
pub(super) trait Written {
    /// It, as one would write it.
    fn written(&self) -> Value;
}

/// A size as one writes it: in bytes only if no unit fits.
pub(super) fn size(bytes: &u64) -> Value {
    match bytes.is_multiple_of(1024) && *bytes > 0 {
        true => Value::String(show(*bytes)),
        false => bytes.written(),
    }
}

macro_rules! numbers {
    ($($number:ty),*) => {
        $(impl Written for $number {
            fn written(&self) -> Value {
                match i64::try_from(*self) {
                    Ok(number) => Value::Integer(number),
                    // A size past what TOML's numbers are.
                    Err(_) => Value::String(self.to_string()),
                }
            }
        })*
    };
}
numbers!(u16, u32, u64);

impl Written for Digest {
    fn written(&self) -> Value {
        Value::String(self.to_string())
    }
}

impl Written for bool {
    fn written(&self) -> Value {
        Value::Boolean(*self)
    }
}

impl Written for String {
    fn written(&self) -> Value {
        Value::String(self.clone())
    }
}

impl Written for PathBuf {
    /// The file that it is written to need not be in the folder of the one that it was read from.
    fn written(&self) -> Value {
        let path = std::path::absolute(self).unwrap_or_else(|_| self.clone());
        Value::String(path.to_string_lossy().into_owned())
    }
}

impl Written for Duration {
    fn written(&self) -> Value {
        let millis = self.as_millis();
        Value::String(match millis.is_multiple_of(1000) {
            true => format!("{}s", millis / 1000),
            false => format!("{millis}ms"),
        })
    }
}
