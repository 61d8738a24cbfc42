//! Reads the spanned tables that `toml` parsed: one section of the file at a time, each key taken
//! by its option, what is left over reported.

use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;

use formats::Format;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::diagnostic::{Diagnostic, Kind, shortened};
use super::nearest::nearest;
use super::options::{Absent, Given, Key, Table};
use super::value::{HINT, Leaf};

/// What reading one file needs and finds.
pub(super) struct Context<'t> {
    /// The file as the user named it.
    pub(super) file: &'t Path,
    /// Its text.
    pub(super) text: &'t str,
    /// What a leading `~/` stands for.
    pub(super) home: Option<&'t Path>,
    /// The disk image formats, sorted by name.
    pub(super) formats: &'t [&'static Format],
    /// What is wrong.
    pub(super) diagnostics: RefCell<Vec<Diagnostic>>,
}

impl Context<'_> {
    pub(super) fn report(&self, diagnostic: Diagnostic) {
        self.diagnostics.borrow_mut().push(diagnostic);
    }

    /// Reads a value with serde, or reports "`key` is …, expected …".
    pub(super) fn deserialize<T: serde::de::DeserializeOwned>(
        &self,
        key: &str,
        value: Spanned<DeValue<'_>>,
        expects: &str,
    ) -> Option<T> {
        let at = value.span();
        let shown = self.shown(&value);
        match T::deserialize(ValueDeserializer::from(value)) {
            Ok(value) => Some(value),
            Err(error) => {
                // Only our own types know what would help; serde's words do not fit.
                let hint = error.message().strip_prefix(HINT).map(str::to_owned);
                self.wrong(key, &shown, expects, Some(at), hint);
                None
            }
        }
    }

    fn wrong(
        &self,
        key: &str,
        shown: &str,
        expects: &str,
        at: Option<Range<usize>>,
        hint: Option<String>,
    ) {
        let title = format!("`{key}` is {shown}, expected {expects}");
        self.report(Diagnostic::value(at, title).help(hint));
    }

    /// A value as a message shows it: as written if it is short.
    fn shown(&self, value: &Spanned<DeValue<'_>>) -> String {
        match value.get_ref() {
            DeValue::Array(_) => "an array".to_owned(),
            DeValue::Table(_) => "a table".to_owned(),
            _ => {
                let written = self.text.get(value.span()).unwrap_or_default();
                if written.contains('\n') {
                    "a text of several lines".to_owned()
                } else {
                    shortened(written)
                }
            }
        }
    }
}

/// A table of the file, being read.
pub(super) struct Section<'t> {
    pub(super) cx: &'t Context<'t>,
    /// Its header as one writes it, "[boot]"; empty for the top of the file.
    name: String,
    /// Where its header is; `None` for the top of the file and for a table not written.
    at: Option<Range<usize>>,
    table: DeTable<'t>,
}

impl<'t> Section<'t> {
    /// The top of the file.
    pub(super) fn root(cx: &'t Context<'t>, table: DeTable<'t>) -> Self {
        Section {
            cx,
            name: String::new(),
            at: None,
            table,
        }
    }

    /// A table found under `key` of this one, or an error that names `expected`.
    fn open(&self, key: &str, expected: &str, value: Spanned<DeValue<'t>>) -> Option<Section<'t>> {
        let at = value.span();
        let shown = self.cx.shown(&value);
        match value.into_inner() {
            DeValue::Table(table) => Some(Section {
                cx: self.cx,
                name: expected.to_owned(),
                at: Some(at),
                table,
            }),
            _ => {
                let expected = format!("a table `{expected}`");
                self.cx.wrong(key, &shown, &expected, Some(at), None);
                None
            }
        }
    }

    /// The keys that no option took, in the order of the file.
    pub(super) fn left(&self) -> Vec<String> {
        let mut keys: Vec<_> = self.table.keys().collect();
        keys.sort_by_key(|key| key.span().start);
        keys.into_iter()
            .map(|key| key.get_ref().clone().into_owned())
            .collect()
    }

    /// Takes the value of a key.
    pub(super) fn take(&mut self, key: &str) -> Option<Spanned<DeValue<'t>>> {
        self.table.remove(key)
    }

    /// Takes a table within this one; a value that is no table is an error.
    pub(super) fn take_section(&mut self, key: &str, header: &str) -> Option<Section<'t>> {
        let value = self.take(key)?;
        self.open(key, header, value)
    }

    /// Where its header is.
    pub(super) fn at(&self) -> Option<Range<usize>> {
        self.at.clone()
    }

    /// Reports every key that is left as unknown.
    pub(super) fn unknown(self, keys: &[Key]) {
        let spelled: Vec<_> = keys.iter().map(Key::spelled).collect();
        let names: Vec<_> = keys.iter().map(|key| key.name).collect();
        self.unknown_of(&names, &spelled);
    }

    /// Reports every key that is left as unknown in a table that takes `names`, spelled so.
    pub(super) fn unknown_of(self, names: &[&str], spelled: &[String]) {
        let place = match &*self.name {
            "" => "at the top of the file".to_owned(),
            name => format!("in `{name}`"),
        };
        for key in self.table.keys() {
            let (name, at) = (key.get_ref(), key.span());
            let title = format!("unknown key `{}` {place}", shortened(name));
            let help = if let Some(index) = nearest(name, names) {
                format!("did you mean `{}`?", spelled[index])
            } else if let Some(home) = home_of(name, super::KEYS, "") {
                format!("`{name}` belongs {home}")
            } else if names.is_empty() {
                "it takes no keys".to_owned()
            } else {
                format!("known here: {}", spelled.join(", "))
            };
            let unknown = Diagnostic::new(Kind::Unknown, Some(at), title);
            self.cx.report(unknown.help(help));
        }
    }

    fn missing(&self, key: &str, example: &str) {
        let (name, add) = (&self.name, format!("`{key} = {example}`"));
        let title = format!("`{key}` is missing, `{name}` needs it");
        let help = match self.at {
            Some(_) => format!("add a line {add}"),
            None => format!("add a table `{name}` with a line {add}"),
        };
        let missing = Diagnostic::new(Kind::Missing, self.at(), title);
        self.cx.report(missing.help(help));
    }
}

/// Where in the file a key belongs that was written in the wrong table. The usual case: a key of
/// the top of the file, written after the first table.
fn home_of(name: &str, keys: &[Key], table: &str) -> Option<String> {
    if keys.iter().any(|key| key.name == name) {
        return Some(match table {
            "" => "at the top of the file, above the first table".to_owned(),
            table => format!("in `{table}`"),
        });
    }
    keys.iter()
        .find_map(|key| home_of(name, key.keys(), &key.spelled()))
}

/// Reads a value, for [`super::options::Spec`].
pub(super) fn value<L: Leaf>(
    section: &mut Section<'_>,
    key: &'static str,
    absent: Absent,
) -> Given<L::Plain> {
    let none = Given {
        value: None,
        at: None,
    };
    match (section.take(key), absent) {
        (Some(value), _) => leaf::<L>(section.cx, key, value),
        (None, Absent::Value(literal)) => match DeValue::parse(literal) {
            Ok(value) => Given {
                at: None,
                ..leaf::<L>(section.cx, key, value)
            },
            Err(_) => {
                section.cx.wrong(key, literal, L::EXPECTS, None, None);
                none
            }
        },
        (None, Absent::Error(example)) => {
            section.missing(key, example);
            none
        }
        (None, Absent::Words(_)) => none,
    }
}

/// Reads a value that may be left out, for [`super::options::Spec`].
pub(super) fn optional<L: Leaf>(
    section: &mut Section<'_>,
    key: &'static str,
    _absent: Absent,
) -> Given<Option<L::Plain>> {
    match section.take(key) {
        None => Given {
            value: Some(None),
            at: None,
        },
        Some(value) => {
            let given = leaf::<L>(section.cx, key, value);
            Given {
                value: given.value.map(Some),
                at: given.at,
            }
        }
    }
}

fn leaf<L: Leaf>(cx: &Context<'_>, key: &str, value: Spanned<DeValue<'_>>) -> Given<L::Plain> {
    let at = Some(value.span());
    let shown = cx.shown(&value);
    let leaf = cx.deserialize::<L>(key, value, L::EXPECTS);
    let value = leaf.and_then(|leaf| match leaf.plain(cx) {
        Ok(plain) => Some(plain),
        Err(hint) => {
            cx.wrong(key, &shown, L::EXPECTS, at.clone(), Some(hint));
            None
        }
    });
    Given { value, at }
}

/// Reads a table, for [`super::options::Spec`].
pub(super) fn table<T: Table>(
    section: &mut Section<'_>,
    key: &'static str,
    _absent: Absent,
) -> Given<T> {
    let name = format!("[{key}]");
    let section = match section.take(key) {
        Some(value) => section.open(key, &name, value),
        None => Some(Section {
            cx: section.cx,
            name,
            at: None,
            table: DeTable::new(),
        }),
    };
    Given {
        at: section.as_ref().and_then(Section::at),
        value: section.and_then(T::from_section),
    }
}

/// Reads a list of tables, for [`super::options::Spec`].
pub(super) fn tables<T: Table>(
    section: &mut Section<'_>,
    key: &'static str,
    _absent: Absent,
) -> Given<Vec<T>> {
    let name = format!("[[{key}]]");
    let Some(value) = section.take(key) else {
        return Given {
            value: Some(Vec::new()),
            at: None,
        };
    };
    let at = Some(value.span());
    let shown = section.cx.shown(&value);
    let value = match value.into_inner() {
        DeValue::Array(array) => {
            let elements = array.into_iter();
            let sections: Vec<_> = elements
                .map(|element| section.open(key, &name, element))
                .collect();
            // What is no table is reported; the others are read all the same.
            let whole = sections.iter().all(Option::is_some);
            T::from_sections(sections.into_iter().flatten().collect()).filter(|_| whole)
        }
        _ => {
            let expects = format!("a list of tables, each headed `{name}`");
            section.cx.wrong(key, &shown, &expects, at.clone(), None);
            None
        }
    };
    Given { value, at }
}
