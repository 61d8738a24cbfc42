//! The layers of a configuration, laid one over the other: what the file extends, the file, the
//! profiles that are chosen, what `--set` says.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::{Diagnostic, Kind, shortened};
use super::gather::Gathered;
use super::lines::Lines;
use super::merge::laid_over;
use super::nearest::nearest;
use super::options::Takes;
use super::syntax::{self, Damage, Parsed};
use super::texts::Texts;
use super::{Choice, KEYS, set};

/// What came of all texts.
pub(super) struct Layers<'t> {
    /// The tables of each file by itself, if there is more than the VM's own.
    pub(super) alone: Vec<DeTable<'t>>,
    /// All, laid one over the other.
    pub(super) whole: DeTable<'t>,
    /// What is wrong with the choice, if the tables can be believed.
    pub(super) found: Vec<Diagnostic>,
    /// What is wrong with the texts.
    pub(super) mistakes: Vec<Diagnostic>,
    /// Further syntax errors, past the number that is shown.
    pub(super) hidden: usize,
    pub(super) belief: Belief<'t>,
}

/// How far the tables can be believed.
pub(super) struct Belief<'t> {
    texts: &'t Texts,
    /// Of each text.
    damage: Vec<(Lines<'t>, Damage)>,
    /// Whether a key that is not found may be in a place that was not read.
    incomplete: bool,
}

impl Belief<'_> {
    /// Whether what was found in the tables is to be believed.
    pub(super) fn spares(&self, diagnostic: &Diagnostic) -> bool {
        if diagnostic.kind == Kind::Missing && self.incomplete {
            return false;
        }
        let at = diagnostic.at.clone().unwrap_or_default();
        let index = self.texts.index(at.start);
        let within = self.texts.at(at.start).map(|text| text.within(&at));
        let damage = self.damage.get(index).zip(within);
        damage.is_none_or(|((lines, damage), at)| damage.spares(lines, &at, diagnostic.kind))
    }
}

/// Reads the texts' tables and lays them one over the other.
pub(super) fn lay<'t>(gathered: &'t Gathered, choice: &Choice) -> Layers<'t> {
    let texts = &gathered.texts;
    let mut found = Vec::new();
    let mut mistakes = gathered.diagnostics.clone();
    let mut hidden = 0;
    let mut damage = Vec::new();
    let mut tables = Vec::new();
    for (text, mended) in texts.iter().zip(&gathered.mended) {
        let lines = Lines::new(&text.text);
        let parsed = match mended {
            Some(mended) => syntax::parse(&lines, mended),
            None if text.is_file() => Parsed {
                damage: Damage::total(),
                ..Parsed::default()
            },
            None => Parsed::default(),
        };
        let wrong = parsed.diagnostics.into_iter();
        mistakes.extend(wrong.map(|diagnostic| diagnostic.moved(text.start())));
        hidden += parsed.hidden;
        damage.push((lines, parsed.damage));
        tables.push(Some(shifted_table(parsed.table, text.start())));
    }
    let incomplete = gathered.incomplete || damage.iter().any(|(_, damage)| damage.hides_keys());

    let layered = gathered.order.len() > 1 || !choice.profiles.is_empty() || !choice.set.is_empty();
    let alone = match layered {
        true => tables.iter().flatten().cloned().collect(),
        false => Vec::new(),
    };
    let takes = Some(Takes::Table(KEYS));
    let mut whole = empty();
    for index in &gathered.order {
        let Some(mut table) = tables.get_mut(*index).and_then(Option::take) else {
            continue;
        };
        if *index != 0 {
            // What others extend has been followed.
            table.remove("extends");
        }
        whole = laid_over(whole, Spanned::new(0..0, DeValue::Table(table)), takes);
    }
    for name in &choice.profiles {
        match profile(&whole, name) {
            Ok(profile) => whole = laid_over(whole, Spanned::new(0..0, profile), takes),
            Err(unknown) => found.push(unknown),
        }
    }
    for argument in texts.iter().filter(|text| !text.is_file()) {
        found.extend(set::set(&mut whole, argument).err());
    }
    let whole = match whole.into_inner() {
        DeValue::Table(table) => table,
        _ => DeTable::new(),
    };
    Layers {
        alone,
        whole,
        found,
        mistakes,
        hidden,
        belief: Belief {
            texts,
            damage,
            incomplete,
        },
    }
}

fn empty<'t>() -> Spanned<DeValue<'t>> {
    Spanned::new(0..0, DeValue::Table(DeTable::new()))
}

/// What a profile that is chosen says.
fn profile<'t>(whole: &Spanned<DeValue<'t>>, name: &str) -> Result<DeValue<'t>, Diagnostic> {
    let profiles = whole.get_ref().as_table().and_then(|it| it.get("profile"));
    let profiles = profiles.and_then(|it| it.get_ref().as_table());
    if let Some(profile) = profiles.and_then(|profiles| profiles.get(name)) {
        return Ok(match profile.get_ref() {
            DeValue::Table(table) => DeValue::Table(table.clone()),
            // That it is no table is reported where it is read.
            _ => DeValue::Table(DeTable::new()),
        });
    }
    let names = profiles.into_iter().flat_map(DeTable::keys);
    let names: Vec<_> = names.map(|key| &**key.get_ref()).collect();
    let shown: Vec<_> = names.iter().map(|name| shortened(name)).collect();
    let title = format!("unknown profile `{}`", shortened(name));
    let help = match (nearest(name, &names), &shown[..]) {
        (_, []) => "there is none: a profile is a table `[profile.NAME]`".to_owned(),
        (None, shown) => format!("the profiles are {}", shown.join(", ")),
        (Some(near), shown) => {
            let near = &shown[near];
            format!(
                "did you mean `{near}`? the profiles are {}",
                shown.join(", ")
            )
        }
    };
    Err(Diagnostic::new(Kind::Missing, None, title).help(help))
}

/// A value with the places that it has among all texts, when its own begins at `start`.
pub(super) fn shifted<'t>(value: Spanned<DeValue<'t>>, start: usize) -> Spanned<DeValue<'t>> {
    let at = moved(value.span(), start);
    let value = match value.into_inner() {
        DeValue::Table(table) => DeValue::Table(shifted_table(table, start)),
        DeValue::Array(array) => {
            let values = array.into_iter().map(|value| shifted(value, start));
            DeValue::Array(values.collect())
        }
        other => other,
    };
    Spanned::new(at, value)
}

fn shifted_table(table: DeTable<'_>, start: usize) -> DeTable<'_> {
    if start == 0 {
        return table;
    }
    let mut moved_table = DeTable::new();
    for (key, value) in table {
        let at = moved(key.span(), start);
        moved_table.insert(Spanned::new(at, key.into_inner()), shifted(value, start));
    }
    moved_table
}

fn moved(at: Range<usize>, start: usize) -> Range<usize> {
    at.start + start..at.end + start
}
