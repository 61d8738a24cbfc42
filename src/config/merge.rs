//! How one layer of a configuration is laid over another: tables merge, values replace, and of a
//! list of tables those with the same `id` merge.

use std::collections::HashMap;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::options::{Key, Takes};

/// Lays the table `over` over another with the same `keys`.
///
/// What the keys say is a value is replaced, even by a table. A table that no key describes (the
/// options of a disk's format) merges.
pub(super) fn merge<'t>(under: &mut DeTable<'t>, over: DeTable<'t>, keys: &[Key]) {
    for (key, value) in over {
        let takes = keys.iter().find(|known| known.name == *key.get_ref());
        let value = match under.remove(&**key.get_ref()) {
            Some(old) => laid_over(old, value, takes.map(|key| key.takes)),
            None => value,
        };
        under.insert(key, value);
    }
}

/// What comes of two values of one key. Where both are tables, the later has the place.
pub(super) fn laid_over<'t>(
    old: Spanned<DeValue<'t>>,
    new: Spanned<DeValue<'t>>,
    takes: Option<Takes>,
) -> Spanned<DeValue<'t>> {
    let at = new.span();
    let merged = match (takes, old.into_inner(), new.into_inner()) {
        (Some(Takes::Value(..) | Takes::File(_) | Takes::Files(_)), _, new) => new,
        (Some(Takes::Tables(keys)), DeValue::Array(mut old), DeValue::Array(new)) => {
            append(&mut old, new, keys);
            DeValue::Array(old)
        }
        (takes, DeValue::Table(mut old), DeValue::Table(new)) => {
            match takes {
                Some(Takes::Profiles) => merge_profiles(&mut old, new),
                Some(Takes::Table(keys)) => merge(&mut old, new, keys),
                _ => merge(&mut old, new, &[]),
            }
            DeValue::Table(old)
        }
        (_, _, new) => new,
    };
    Spanned::new(at, merged)
}

/// Profiles of the same name merge as the files do.
fn merge_profiles<'t>(under: &mut DeTable<'t>, over: DeTable<'t>) {
    for (name, profile) in over {
        let takes = Takes::Table(super::KEYS);
        let profile = match under.remove(&**name.get_ref()) {
            Some(old) => laid_over(old, profile, Some(takes)),
            None => profile,
        };
        under.insert(name, profile);
    }
}

/// Merges each of `entries` into the one that has its `id`, or appends it. Two of one layer never
/// merge: then both are there, and their `id` is reported.
fn append<'t>(list: &mut DeArray<'t>, entries: DeArray<'t>, keys: &'static [Key]) {
    let ids = list.iter().enumerate().rev();
    let ids = ids.filter_map(|(index, entry)| Some((id_of(entry)?.to_owned(), index)));
    // Of two with the same, the first.
    let mut places: HashMap<String, usize> = ids.collect();
    for entry in entries {
        let place = id_of(&entry).and_then(|id| places.remove(id));
        match place.and_then(|index| list.get_mut(index)) {
            Some(old) => {
                let under = std::mem::replace(old, Spanned::new(0..0, DeValue::Boolean(false)));
                *old = laid_over(under, entry, Some(Takes::Table(keys)));
            }
            None => list.push(entry),
        }
    }
}

/// The `id` of an entry of a list of tables.
pub(super) fn id_of<'v>(entry: &'v Spanned<DeValue<'_>>) -> Option<&'v str> {
    entry.get_ref().as_table()?.get("id")?.get_ref().as_str()
}
