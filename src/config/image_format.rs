//! Which format a disk's image has, and the options of that format's own table.

use std::path::{Path, PathBuf};

use formats::{Format, OptionKind, OptionValue, raw_for};

use super::diagnostic::{Diagnostic, Kind, shortened};
use super::kinds::{Bytes, FilePath, Number, Word};
use super::nearest::nearest;
use super::options::Given;
use super::section::{self, Context, Section};
use super::shape::Shape;
use super::value::Leaf;

/// Whether it is one of the two backends of a raw image: `sparse` picks between them.
pub(super) fn is_raw(name: &str) -> bool {
    [true, false]
        .into_iter()
        .any(|sparse| name == raw_for(sparse))
}

/// The options that a format follows from.
pub(super) struct Written<'a> {
    /// The key that says where the image is: `path` or `url`.
    pub(super) key: &'static str,
    pub(super) path: &'a Given<PathBuf>,
    pub(super) format: &'a Given<String>,
    pub(super) sparse: &'a Given<bool>,
}

/// A format, and where that is written: at `format`, or else at `path` or `url`.
pub(super) struct Resolved {
    pub(super) name: &'static str,
    pub(super) at: Option<std::ops::Range<usize>>,
}

/// Finds the format, or reports why there is none.
pub(super) fn resolve(cx: &Context<'_>, written: &Written<'_>) -> Option<Resolved> {
    let (name, at) = match (
        &written.format.at,
        &written.format.value,
        &written.path.value,
    ) {
        (Some(at), Some(name), _) => (by_name(cx, name, at.clone())?, Some(at.clone())),
        (None, _, Some(path)) => (by_extension(cx, path, written)?, written.path.at.clone()),
        _ => return None,
    };
    let name = match written.sparse.value {
        Some(false) if name == raw_for(true) && written.format.at.is_some() => {
            let title =
                format!("`sparse` is false, but `format` is \"{name}\", expected one of them");
            let help = format!(
                "for a fully allocated image write `format = \"{}\"`",
                raw_for(false)
            );
            cx.report(
                Diagnostic::value(written.sparse.at.clone(), title)
                    .related(at, "this is the thin one")
                    .help(help),
            );
            return None;
        }
        Some(sparse) if is_raw(name) => {
            let mut formats = cx.formats.iter().map(|format| format.name);
            formats
                .find(|found| *found == raw_for(sparse))
                .unwrap_or(name)
        }
        _ => name,
    };
    Some(Resolved { name, at })
}

fn by_name(cx: &Context<'_>, name: &str, at: std::ops::Range<usize>) -> Option<&'static str> {
    if let Some(format) = cx.formats.iter().find(|format| format.name == name) {
        return Some(format.name);
    }
    let names: Vec<_> = cx.formats.iter().map(|format| format.name).collect();
    let title = format!(
        "`format` is \"{}\", expected {}",
        shortened(name),
        one_of(&names)
    );
    let near = nearest(name, &names).map(|near| format!("did you mean \"{}\"?", names[near]));
    cx.report(Diagnostic::new(Kind::Alone, Some(at), title).help(near));
    None
}

fn by_extension(cx: &Context<'_>, path: &Path, written: &Written<'_>) -> Option<&'static str> {
    let extension = path.extension().unwrap_or_default();
    let known = cx.formats.iter().find(|format| {
        let mut extensions = format.extensions.iter();
        extensions.any(|listed| extension.eq_ignore_ascii_case(listed))
    });
    if let Some(format) = known {
        return Some(format.name);
    }
    let names: Vec<_> = cx.formats.iter().map(|format| format.name).collect();
    let raw = raw_for(false);
    let key = written.key;
    let (title, help) = match shortened(&extension.to_string_lossy()) {
        none if none.is_empty() => (
            format!("`{key}` has no extension that tells the format"),
            format!(
                "add a line such as `format = \"{raw}\"`: {}",
                one_of(&names)
            ),
        ),
        extension => (
            format!("`{key}` ends in \".{extension}\", the extension of no format"),
            format!("add a line `format = \"...\"` with {}", one_of(&names)),
        ),
    };
    cx.report(Diagnostic::value(written.path.at.clone(), title).help(help));
    None
}

/// Reads the tables of formats within a disk's: its own format's options, in the order of the
/// file. Any other is an error.
pub(super) fn tables(
    section: &mut Section<'_>,
    format: Option<&Resolved>,
) -> Option<Vec<(&'static str, OptionValue)>> {
    let mut options = Some(Vec::new());
    for name in section.left() {
        let Some(owner) = section.cx.formats.iter().find(|format| format.name == name) else {
            continue;
        };
        let Some(table) = section.take_section(&name, &format!("[block.{name}]")) else {
            options = None;
            continue;
        };
        if let Some(format) = format
            && format.name != owner.name
            && !(is_raw(format.name) && is_raw(owner.name))
        {
            let title = format!(
                "`[block.{name}]` has options of {name}, but the disk is {}",
                format.name
            );
            section.cx.report(
                Diagnostic::value(table.at(), title)
                    .related(format.at.clone(), "its format follows from this")
                    .help(format!("remove the table, or write `format = \"{name}\"`")),
            );
            options = None;
        }
        let read = table_of(owner, table);
        options = options
            .zip(read)
            .map(|(options, read)| [options, read].concat());
    }
    options
}

/// Reports the tables of formats within a disk's that another process serves: `served` is where
/// that is said.
pub(super) fn refuse_tables(section: &mut Section<'_>, served: &Option<std::ops::Range<usize>>) {
    for name in section.left() {
        let Some(owner) = section.cx.formats.iter().find(|format| format.name == name) else {
            continue;
        };
        let name = owner.name;
        let header = format!("[block.{name}]");
        if let Some(table) = section.take_section(name, &header) {
            let title = format!("`{header}` is given beside `vhost_user`, expected one of them");
            let help = "it is for the process that serves the disk: give it there";
            section.cx.report(
                Diagnostic::value(table.at(), title)
                    .related(served.clone(), "and this")
                    .help(help.to_owned()),
            );
        }
    }
}

/// What values an option of a format takes, in words that follow "expected".
pub fn expects(kind: OptionKind) -> String {
    match kind {
        OptionKind::Bool => bool::EXPECTS.to_owned(),
        OptionKind::Size => Bytes::EXPECTS.to_owned(),
        OptionKind::Integer => Number::EXPECTS.to_owned(),
        OptionKind::Path => FilePath::EXPECTS.to_owned(),
        OptionKind::Choice(words) => one_of(words),
    }
}

/// The same, as far as a schema can say it.
pub(super) fn shape(kind: OptionKind) -> Shape {
    match kind {
        OptionKind::Bool => bool::SHAPE,
        OptionKind::Size => Bytes::SHAPE,
        OptionKind::Integer => Number::SHAPE,
        OptionKind::Path => FilePath::SHAPE,
        OptionKind::Choice(words) => Shape::Names(words),
    }
}

/// Reads one format's table.
fn table_of(
    format: &'static Format,
    mut section: Section<'_>,
) -> Option<Vec<(&'static str, OptionValue)>> {
    let cx = section.cx;
    let mut options = Some(Vec::new());
    for key in section.left() {
        let Some(option) = format.options.iter().find(|option| option.name == key) else {
            continue;
        };
        let Some(value) = section.take(&key) else {
            continue;
        };
        let at = value.span();
        let expects = expects(option.kind);
        let value = match option.kind {
            OptionKind::Bool => cx.deserialize(&key, value, &expects).map(OptionValue::Bool),
            OptionKind::Size => cx
                .deserialize::<Bytes>(&key, value, &expects)
                .map(|bytes| OptionValue::Number(bytes.0)),
            OptionKind::Integer => cx
                .deserialize::<Number>(&key, value, &expects)
                .map(|number| OptionValue::Number(number.0)),
            OptionKind::Path => section::leaf::<FilePath>(cx, &key, value)
                .value
                .map(OptionValue::Path),
            OptionKind::Choice(words) => cx
                .deserialize::<Word>(&key, value, &expects)
                .and_then(|word| chosen(cx, &key, word.0, words, at)),
        };
        options = options.zip(value).map(|(mut options, value)| {
            options.push((option.name, value));
            options
        });
    }
    let names: Vec<_> = format.options.iter().map(|option| option.name).collect();
    let spelled: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    section.unknown_of(&names, &spelled);
    options
}

fn chosen(
    cx: &Context<'_>,
    key: &str,
    word: String,
    words: &[&str],
    at: std::ops::Range<usize>,
) -> Option<OptionValue> {
    if words.contains(&&*word) {
        return Some(OptionValue::Word(word));
    }
    let title = format!(
        "`{key}` is \"{}\", expected {}",
        shortened(&word),
        one_of(words)
    );
    let near = nearest(&word, words).map(|near| format!("did you mean \"{}\"?", words[near]));
    cx.report(Diagnostic::new(Kind::Alone, Some(at), title).help(near));
    None
}

fn one_of(words: &[&str]) -> String {
    let quoted: Vec<_> = words.iter().map(|word| format!("\"{word}\"")).collect();
    match &quoted[..] {
        [] => "a format, of which this build has none".to_owned(),
        [word] => word.clone(),
        [words @ .., last] => format!("{} or {last}", words.join(", ")),
    }
}
