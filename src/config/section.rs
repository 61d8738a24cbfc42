//! Reads the spanned tables that `toml` parsed: one section of the file at a time, each key taken
//! by its option, what is left over reported.

mod read;

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::path::Path;

use formats::Format;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::diagnostic::{Diagnostic, Kind, shortened};
use super::nearest::nearest;
use super::options::Key;
use super::texts::Texts;
use super::value::HINT;

pub(super) use self::read::{
    array, expecting, leaf, list, optional, profiles, table, tables, value,
};

/// What reading one file needs and finds.
pub(super) struct Context<'t> {
    /// The VM's file as the user named it.
    pub(super) file: &'t Path,
    /// The texts that it is read from.
    pub(super) texts: &'t Texts,
    /// What a leading `~/` stands for.
    pub(super) home: Option<&'t Path>,
    /// The folder of files that were fetched.
    pub(super) cache: Option<&'t Path>,
    /// The disk image formats, sorted by name.
    pub(super) formats: &'t [&'static Format],
    /// What is wrong.
    pub(super) diagnostics: RefCell<Vec<Diagnostic>>,
    /// Whether what is being read is a part of a VM: what is not there may be in another.
    pub(super) part: Cell<bool>,
}

impl Context<'_> {
    /// Reports a mistake. Of a part of a VM, only what is wrong by itself is one.
    pub(super) fn report(&self, diagnostic: Diagnostic) {
        let whole = matches!(diagnostic.kind, Kind::Value | Kind::Missing);
        if !(self.part.get() && whole) {
            self.diagnostics.borrow_mut().push(diagnostic);
        }
    }

    /// Reads a part of a VM.
    pub(super) fn in_part(&self, read: impl FnOnce()) {
        let within = self.part.replace(true);
        read();
        self.part.set(within);
    }

    /// What a path is relative to that is written at a place: the folder of its file.
    pub(super) fn folder(&self, at: &Range<usize>) -> &Path {
        let text = self.texts.at(at.start);
        text.map_or(Path::new(""), |text| &text.folder)
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
        self.report(Diagnostic::new(Kind::Alone, at, title).help(hint));
    }

    /// A value as a message shows it: as written if it is short.
    fn shown(&self, value: &Spanned<DeValue<'_>>) -> String {
        match value.get_ref() {
            DeValue::Array(_) => "an array".to_owned(),
            DeValue::Table(_) => "a table".to_owned(),
            _ => {
                let written = self.texts.written(&value.span());
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
    /// Its header as one writes it, `[boot]`; empty for the top of the file.
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
    pub(super) fn open(
        &self,
        key: &str,
        expected: &str,
        value: Spanned<DeValue<'t>>,
    ) -> Option<Section<'t>> {
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

    /// Its header as one writes it; empty for the top of the file.
    pub(super) fn header(&self) -> &str {
        &self.name
    }

    /// The header of a table under `key` of this one.
    pub(super) fn below(&self, key: &str) -> String {
        match self.name.trim_matches(['[', ']']) {
            "" => format!("[{key}]"),
            name => format!("[{name}.{key}]"),
        }
    }

    /// Where its header is.
    pub(super) fn at(&self) -> Option<Range<usize>> {
        self.at.clone()
    }

    /// Takes out keys that belong at the top of the file alone, and reports them.
    pub(super) fn refuse(&mut self, keys: &[&str]) {
        for key in keys {
            let Some((written, _)) = self.table.remove_entry(*key) else {
                continue;
            };
            let title = format!("unknown key `{key}` in `{}`", self.name);
            let help = format!("`{key}` belongs at the top of the file alone");
            let unknown = Diagnostic::new(Kind::Unknown, Some(written.span()), title);
            self.cx.report(unknown.help(help));
        }
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

    /// Reports a key that must be written; `example` is a value, as TOML.
    pub(super) fn missing(&self, key: &str, example: &str) {
        let (name, add) = (&self.name, format!("`{key} = {example}`"));
        let title = format!("`{key}` is missing, `{name}` needs it");
        // What others write is whole without it: the VM's own file is where it belongs.
        let own = |at: &Range<usize>| self.cx.texts.index(at.start) == 0;
        let (own, other) = match self.at() {
            Some(at) if own(&at) => (Some(at), None),
            other => (None, other),
        };
        let help = match (&own, &other) {
            (Some(_), _) => format!("add a line {add}"),
            (None, Some(_)) if name.starts_with("[[") => {
                let file = self.cx.file.display();
                format!("add a line {add} to it, or to one in {file} with the same `id`")
            }
            (None, _) => format!("add a table `{name}` with a line {add}"),
        };
        let missing = Diagnostic::new(Kind::Missing, own, title);
        self.cx
            .report(missing.related(other, "this one").help(help));
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
