//! Reads what an option takes: one function for each way in which options are declared.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Context, Section};
use crate::config::diagnostic::shortened;
use crate::config::options::{Absent, Given, Table};
use crate::config::value::{Leaf, Listed};
use crate::config::vm::Vm;

/// Reads a value, for [`crate::config::options::Spec`].
pub(in crate::config) fn value<L: Leaf>(
    section: &mut Section<'_>,
    key: &'static str,
    absent: Absent,
) -> Given<L::Plain> {
    match (section.take(key), absent) {
        (Some(value), _) => leaf::<L>(section.cx, key, value),
        (None, Absent::Value(literal)) => match DeValue::parse(literal) {
            Ok(value) => Given {
                at: None,
                ..leaf::<L>(section.cx, key, value)
            },
            Err(_) => {
                section.cx.wrong(key, literal, L::EXPECTS, None, None);
                Given::default()
            }
        },
        (None, Absent::Error(example)) => {
            section.missing(key, example);
            Given::default()
        }
        (None, Absent::Words(_)) => Given::default(),
    }
}

/// Reads a value that may be left out, for [`crate::config::options::Spec`].
pub(in crate::config) fn optional<L: Leaf>(
    section: &mut Section<'_>,
    key: &'static str,
    _absent: Absent,
) -> Given<Option<L::Plain>> {
    match section.take(key) {
        None => Given {
            value: Some(None),
            ..Given::default()
        },
        Some(value) => {
            let given = leaf::<L>(section.cx, key, value);
            Given {
                value: given.value.map(Some),
                at: given.at,
                ..Given::default()
            }
        }
    }
}

/// Reads one value or an array of them, for [`crate::config::options::Spec`].
pub(in crate::config) fn list<L: Listed>(
    section: &mut Section<'_>,
    key: &'static str,
    _absent: Absent,
) -> Given<Vec<L::Plain>> {
    array(section, key, |section, index, value| match index {
        None => expecting::<L>(section.cx, key, value, L::ONE_OR_MORE),
        Some(index) => leaf::<L>(section.cx, &format!("{key}[{index}]"), value),
    })
}

/// Reads one value or an array of them: `read` is told its index in the array.
pub(in crate::config) fn array<'t, T>(
    section: &mut Section<'t>,
    key: &str,
    read: impl Fn(&Section<'t>, Option<usize>, Spanned<DeValue<'t>>) -> Given<T>,
) -> Given<Vec<T>> {
    let Some(value) = section.take(key) else {
        return Given {
            value: Some(Vec::new()),
            ..Given::default()
        };
    };
    let at = value.span();
    let given: Vec<_> = match value.into_inner() {
        DeValue::Array(array) => {
            let entry = |(index, value)| read(section, Some(index), value);
            array.into_iter().enumerate().map(entry).collect()
        }
        one => vec![read(section, None, Spanned::new(at.clone(), one))],
    };
    Given {
        at: Some(at),
        entries: given.iter().filter_map(|one| one.at.clone()).collect(),
        // Each entry that is wrong is reported before the first counts.
        value: given.into_iter().map(|one| one.value).collect(),
    }
}

/// Reads one value that is written.
pub(in crate::config) fn leaf<L: Leaf>(
    cx: &Context<'_>,
    key: &str,
    value: Spanned<DeValue<'_>>,
) -> Given<L::Plain> {
    expecting::<L>(cx, key, value, L::EXPECTS)
}

/// As [`leaf`], for an option that takes more than one kind of values.
pub(in crate::config) fn expecting<L: Leaf>(
    cx: &Context<'_>,
    key: &str,
    value: Spanned<DeValue<'_>>,
    expects: &str,
) -> Given<L::Plain> {
    let at = value.span();
    let shown = cx.shown(&value);
    let leaf = cx.deserialize::<L>(key, value, expects);
    let value = leaf.and_then(|leaf| match leaf.plain(cx, &at) {
        Ok(plain) => Some(plain),
        Err(hint) => {
            cx.wrong(key, &shown, expects, Some(at.clone()), Some(hint));
            None
        }
    });
    Given {
        value,
        at: Some(at),
        ..Given::default()
    }
}

/// Reads a table, for [`crate::config::options::Spec`].
pub(in crate::config) fn table<T: Table>(
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
        ..Given::default()
    }
}

/// Reads a list of tables, for [`crate::config::options::Spec`].
pub(in crate::config) fn tables<T: Table>(
    section: &mut Section<'_>,
    key: &'static str,
    _absent: Absent,
) -> Given<Vec<T>> {
    let name = format!("[[{key}]]");
    let Some(value) = section.take(key) else {
        return Given {
            value: Some(Vec::new()),
            ..Given::default()
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
    Given {
        value,
        at,
        ..Given::default()
    }
}

/// Checks the profiles, for [`crate::config::options::Spec`]: tables that each hold what the top
/// of the file may. The value is their names.
pub(in crate::config) fn profiles(
    section: &mut Section<'_>,
    key: &'static str,
    _absent: Absent,
) -> Given<Vec<String>> {
    let none = Given {
        value: Some(Vec::new()),
        ..Given::default()
    };
    let Some(value) = section.take(key) else {
        return none;
    };
    let at = value.span();
    let Some(mut profiles) = section.open(key, "[profile.NAME]", value) else {
        return Given::default();
    };
    let names = profiles.left();
    for name in &names {
        let header = format!("[{key}.{}]", shortened(name));
        if let Some(mut profile) = profiles.take_section(name, &header) {
            profile.refuse(&["extends", key]);
            section.cx.in_part(|| Vm::check(profile));
        }
    }
    Given {
        value: Some(names),
        at: Some(at),
        ..none
    }
}
