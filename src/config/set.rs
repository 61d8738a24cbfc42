//! `--set KEY=VALUE`: one value, laid over all that the files say.

use std::borrow::Cow;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::{Diagnostic, Kind, shortened};
use super::layers::shifted;
use super::merge::{id_of, laid_over};
use super::options::{Key, Takes};
use super::texts::Text;

/// A part of a key as it is written, `ROOT` of `block.ROOT.size`, with its place among all texts.
type Part = (String, Range<usize>);

/// Sets what one argument says. The error is what is wrong with it.
pub(super) fn set<'t>(
    root: &mut Spanned<DeValue<'t>>,
    argument: &'t Text,
) -> Result<(), Diagnostic> {
    let (key, value) = parse(argument)?;
    if let Some((first, at)) = key.first() {
        let help = match &**first {
            "profile" => "choose a profile with `-p NAME`",
            "extends" => "what a file extends is for the file to say",
            _ => return put(root, &key, value, Some(Takes::Table(super::KEYS))),
        };
        let title = format!("`--set` cannot change `{first}`, expected a key of the VM itself");
        return Err(Diagnostic::value(Some(at.clone()), title).help(help.to_owned()));
    }
    Ok(())
}

/// Takes an argument apart, at the first `=` that is not within quotes.
fn parse<'t>(argument: &'t Text) -> Result<(Vec<Part>, Spanned<DeValue<'t>>), Diagnostic> {
    /// Each `=` within the quotes of a key takes another look at it.
    const TRIES: usize = 20;
    let text = &*argument.text;
    let wrong = |at: Range<usize>, title: String| {
        let help = "an example is `--set boot.cmdline=quiet`".to_owned();
        Diagnostic::value(Some(argument.among(at)), title).help(help)
    };
    let equals = text.match_indices('=').map(|(at, _)| at);
    let found = equals
        .clone()
        .take(TRIES)
        .find_map(|at| Some((at, parts(&text[..at])?)));
    let Some((at, parts)) = found else {
        return Err(match equals.clone().next() {
            None | Some(0) => {
                let title = format!("`--set` is \"{}\", expected KEY=VALUE", shortened(text));
                wrong(0..text.len(), title)
            }
            Some(at) => {
                let key = shortened(&text[..at]);
                let title = format!("`{key}` is no key, expected words with dots between them");
                wrong(0..at, title)
            }
        });
    };
    let parts = parts.into_iter();
    let parts = parts.map(|(part, at)| (part, argument.among(at)));
    let written = text[at + 1..].trim_start();
    let start = argument.among(text.len() - written.len()..text.len()).start;
    let written = written.trim_end();
    let value = match DeValue::parse(written) {
        Ok(value) => shifted(value, start),
        // So that a shell's quotes are enough.
        Err(_) => Spanned::new(
            start..start + written.len(),
            DeValue::String(Cow::Borrowed(written)),
        ),
    };
    Ok((parts.collect(), value))
}

/// The parts of a key with their places, if it is one.
fn parts(key: &str) -> Option<Vec<Part>> {
    if key.contains('\n') || key.trim_start().starts_with('[') {
        return None;
    }
    let line = format!("{key}=0");
    let table = DeTable::parse(&line).ok()?.into_inner();
    let mut parts = Vec::new();
    let mut inner = &table;
    loop {
        let (part, value) = inner.iter().next()?;
        parts.push((part.get_ref().clone().into_owned(), part.span()));
        match value.get_ref() {
            DeValue::Table(table) => inner = table,
            _ => return Some(parts),
        }
    }
}

/// Puts a value where its key leads, within `slot`, whose own key takes `takes`.
fn put<'t>(
    slot: &mut Spanned<DeValue<'t>>,
    key: &[Part],
    value: Spanned<DeValue<'t>>,
    takes: Option<Takes>,
) -> Result<(), Diagnostic> {
    let Some(((part, at), rest)) = key.split_first() else {
        *slot = laid_over(taken(slot), value, takes);
        return Ok(());
    };
    if let Some(Takes::Tables(keys)) = takes {
        let entry = entry(slot, part, at)?;
        return put(entry, rest, value, Some(Takes::Table(keys)));
    }
    let keys: &[Key] = match takes {
        Some(Takes::Table(keys) | Takes::File(keys)) => keys,
        _ => &[],
    };
    let is_file = matches!(takes, Some(Takes::File(_)));
    let takes = keys.iter().find(|key| key.name == part);
    let takes = takes.map(|key| key.takes);
    let header = slot.span();
    let mut table = match taken(slot).into_inner() {
        DeValue::Table(table) => table,
        // A text stands for a table with that path.
        path @ DeValue::String(_) if is_file => {
            let key = Spanned::new(header.clone(), Cow::Borrowed("path"));
            [(key, Spanned::new(header.clone(), path))]
                .into_iter()
                .collect()
        }
        _ => DeTable::new(),
    };
    let name = || Spanned::new(at.clone(), Cow::Owned(part.clone()));
    let (name, inner, done): (_, Option<_>, _) = match table.remove_entry(&**part) {
        None if rest.is_empty() => (name(), Some(value), Ok(())),
        None => {
            let mut inner = Spanned::new(at.clone(), DeValue::Table(DeTable::new()));
            let done = match takes {
                // Nothing is in a list that is not there.
                Some(Takes::Tables(_)) => entry(&mut inner, &rest[0].0, &rest[0].1).map(drop),
                takes => put(&mut inner, rest, value, takes),
            };
            (name(), Some(inner).filter(|_| done.is_ok()), done)
        }
        Some((old, mut inner)) => {
            let done = put(&mut inner, rest, value, takes);
            let name = if rest.is_empty() { name() } else { old };
            (name, Some(inner), done)
        }
    };
    if let Some(inner) = inner {
        table.insert(name, inner);
    }
    *slot = Spanned::new(header, DeValue::Table(table));
    done
}

/// Takes a value out of its slot.
fn taken<'t>(slot: &mut Spanned<DeValue<'t>>) -> Spanned<DeValue<'t>> {
    let at = slot.span();
    std::mem::replace(slot, Spanned::new(at, DeValue::Boolean(false)))
}

/// The entry of a list of tables that an index or an `id` means.
fn entry<'v, 't>(
    list: &'v mut Spanned<DeValue<'t>>,
    part: &str,
    at: &Range<usize>,
) -> Result<&'v mut Spanned<DeValue<'t>>, Diagnostic> {
    let entries: &mut [_] = match list.get_mut() {
        DeValue::Array(entries) => entries,
        _ => &mut [],
    };
    let digits = part.bytes().all(|byte| byte.is_ascii_digit());
    let by_index = part.parse().ok().filter(|_| digits);
    let by_index = by_index.filter(|index: &usize| *index < entries.len());
    let by_id = || entries.iter().position(|entry| id_of(entry) == Some(part));
    let index = by_index.or_else(by_id);
    let help = match entries.len() {
        0 => "there is none at all".to_owned(),
        count => {
            let ids: Vec<_> = entries.iter().filter_map(|entry| id_of(entry)).collect();
            let ids = match &ids[..] {
                [] => "none has an `id`".to_owned(),
                ids => format!("the ids are {}", shortened(&ids.join(", "))),
            };
            match count {
                1 => format!("the only index is 0; {ids}"),
                _ => format!("the indices are 0 to {}; {ids}", count - 1),
            }
        }
    };
    match index.and_then(|index| entries.get_mut(index)) {
        Some(entry) => Ok(entry),
        None => {
            let part = shortened(part);
            let title = format!("`--set` names \"{part}\", expected an index or an `id`");
            Err(Diagnostic::new(Kind::Missing, Some(at.clone()), title).help(help))
        }
    }
}
