//! From text to tables: TOML, read on past errors as far as that makes sense.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use toml::de::{DeTable, DeValue, Error};

use super::diagnostic::{Diagnostic, Kind, SHOWN, shortened};
use super::lines::Lines;

/// What came of a text.
#[derive(Default)]
pub(super) struct Parsed<'t> {
    pub(super) table: DeTable<'t>,
    pub(super) diagnostics: Vec<Diagnostic>,
    /// Further syntax errors, past the number that is shown.
    pub(super) hidden: usize,
    pub(super) damage: Damage,
}

/// How far the tables of a text with syntax errors can be believed. Without it, one forgotten
/// bracket would draw a tail of complaints about keys that are all right.
#[derive(Debug, Default)]
pub(super) struct Damage {
    /// Starts of the lines that have a syntax error: one message a line.
    lines: BTreeSet<usize>,
    /// A line could not be told to be any key's.
    key_lost: bool,
    /// From here on, keys may be in a wrong table.
    keys_lost: Option<usize>,
    /// From here on, nothing means what it seems.
    all_lost: Option<usize>,
}

impl Damage {
    /// That of a text of which nothing is known.
    pub(super) fn total() -> Self {
        Damage {
            key_lost: true,
            ..Damage::default()
        }
    }

    /// Whether a key that is not found may be there all the same.
    pub(super) fn hides_keys(&self) -> bool {
        self.key_lost
    }

    /// Whether what was found in the tables at a place of the text is to be believed.
    pub(super) fn spares(&self, lines: &Lines<'_>, at: &Range<usize>, kind: Kind) -> bool {
        let before = |lost: Option<usize>| lost.is_none_or(|lost| at.start < lost);
        let mut damaged = self
            .lines
            .range(lines.line(at.start).start..=at.end.max(at.start));
        damaged.next().is_none()
            && before(self.all_lost)
            && match kind {
                Kind::Syntax | Kind::Alone | Kind::Value => true,
                Kind::Unknown => before(self.keys_lost),
                Kind::Missing => !self.key_lost,
            }
    }
}

/// A text without the lines at which the parser would stop.
pub(super) struct Mended {
    /// Blanks stand for those lines: every place stays what it was.
    pub(super) text: String,
    /// The errors of those lines.
    errors: Vec<Error>,
}

/// Takes out of a text the lines at which the parser would stop: a key without a value. `look`
/// sees the tables that are left.
pub(super) fn mend<T>(text: &str, look: impl FnOnce(&DeTable<'_>) -> T) -> (Mended, T) {
    /// Each takes another run over the text.
    const MENDED: usize = 20;
    let mut mended = text.to_owned();
    let mut errors = Vec::new();
    loop {
        let (table, found) = DeTable::parse_recoverable(&mended);
        let stop = found.into_iter().find_map(|error| {
            let at = error.span()?;
            let stops = error.message().starts_with("key with no value");
            stops.then(|| (error, Lines::new(&mended).line(at.start)))
        });
        match stop {
            // If its line is blank the key is on another one: more blanks would not help.
            Some((error, line))
                if errors.len() < MENDED && !mended[line.clone()].trim().is_empty() =>
            {
                drop(table);
                mended.replace_range(line.clone(), &" ".repeat(line.len()));
                errors.push(error);
            }
            _ => {
                let seen = look(table.get_ref());
                drop(table);
                let text = mended;
                return (Mended { text, errors }, seen);
            }
        }
    }
}

/// Parses a text as [`mend`] left it; `lines` are the original's.
pub(super) fn parse<'t>(lines: &Lines<'_>, mended: &'t Mended) -> Parsed<'t> {
    let stopped = mended.errors.len();
    let mut errors: Vec<_> = mended.errors.iter().cloned().enumerate().collect();
    let (table, found) = DeTable::parse_recoverable(&mended.text);
    let table = table.into_inner();
    let mut known = Known::default();
    if stopped > 0 || !found.is_empty() {
        known.collect(&table);
    }
    errors.extend(found.into_iter().map(|error| (stopped, error)));
    errors.sort_by_key(|(_, error)| error.span().map(|at| at.start));

    let mut parsed = Parsed {
        table,
        diagnostics: Vec::new(),
        hidden: 0,
        damage: Damage::default(),
    };
    let damage = &mut parsed.damage;
    for (index, error) in errors {
        let at = error.span();
        let line = lines.line(at.as_ref().map_or(0, |at| at.start));
        if !damage.lines.insert(line.start) {
            continue;
        }
        if parsed.diagnostics.len() == SHOWN {
            parsed.hidden += 1;
            continue;
        }
        if error.message() == "duplicate key" {
            parsed.diagnostics.push(duplicate(lines, at));
            continue;
        }
        let open = if index < stopped {
            damage.key_lost = true;
            false
        } else if known.has_key(lines, &line) {
            false
        } else {
            damage.key_lost = true;
            let header = lines.text[line.clone()].trim_start().starts_with('[');
            if header {
                damage.keys_lost.get_or_insert(line.start);
            }
            !header && !known.resumes(lines, line.clone())
        };
        let mistake = mistake(lines.text, at, error.message(), open);
        parsed.diagnostics.push(mistake);
        if open {
            // A bracket or quote left open takes in what follows: complaints about it mislead.
            damage.all_lost = Some(line.start);
            break;
        }
    }
    parsed
}

/// Where the parser found keys and heads of tables.
#[derive(Default)]
struct Known {
    keys: HashSet<usize>,
    heads: HashSet<usize>,
}

impl Known {
    /// The parser bounds the depth.
    fn collect(&mut self, table: &DeTable<'_>) {
        for (key, value) in table {
            self.keys.insert(key.span().start);
            self.collect_value(value);
        }
    }

    fn collect_value(&mut self, value: &toml::Spanned<DeValue<'_>>) {
        match value.get_ref() {
            DeValue::Table(table) => {
                self.heads.insert(value.span().start);
                self.collect(table);
            }
            DeValue::Array(array) => array.iter().for_each(|value| self.collect_value(value)),
            _ => (),
        }
    }

    /// Whether a line begins with a key.
    fn has_key(&self, lines: &Lines<'_>, line: &Range<usize>) -> bool {
        self.keys.contains(&first(lines, line))
    }

    /// Whether the parser understood the next line that names something, after `line`.
    fn resumes(&self, lines: &Lines<'_>, mut line: Range<usize>) -> bool {
        while line.end < lines.text.len() {
            line = lines.line(line.end + 1);
            if named(lines.text, line.clone()).is_some() {
                return self.has_key(lines, &line) || self.heads.contains(&first(lines, &line));
            }
        }
        true
    }
}

/// Where a line's text begins.
fn first(lines: &Lines<'_>, line: &Range<usize>) -> usize {
    let text = &lines.text[line.clone()];
    line.start + (text.len() - text.trim_start().len())
}

/// A syntax error, in the parser's words but for the two that everybody makes.
fn mistake(text: &str, at: Option<Range<usize>>, message: &str, open: bool) -> Diagnostic {
    let value = at.clone().and_then(|at| text.get(at)).unwrap_or_default();
    let (message, help) = match message.strip_prefix("string values must be quoted") {
        None => (message, None),
        Some(_) if value.trim().is_empty() => ("a value is missing", None),
        Some(_) => {
            let value = shortened(value);
            let help = match open {
                false => format!("if it is a text, put it in quotes: \"{value}\""),
                true => "is a bracket above left open?".to_owned(),
            };
            ("this is no value", Some(help))
        }
    };
    Diagnostic::new(Kind::Syntax, at, message).help(help)
}

/// A key or table given twice: shown with the first one, which the parser does not tell.
fn duplicate(lines: &Lines<'_>, at: Option<Range<usize>>) -> Diagnostic {
    let key = at.clone().and_then(|at| lines.text.get(at));
    let title = format!("`{}` is given twice", shortened(key.unwrap_or_default()));
    let first = at.as_ref().and_then(|at| first_given(lines, at.start));
    Diagnostic::new(Kind::Syntax, at, title).related(first, "first given here")
}

/// The nearest line above that gives the key or heads the table on the line of `offset`.
fn first_given(lines: &Lines<'_>, offset: usize) -> Option<Range<usize>> {
    let text = lines.text;
    let mut line = lines.line(offset);
    let (header, name) = named(text, line.clone())?;
    while line.start > 0 {
        line = lines.line(line.start - 1);
        match named(text, line.clone()) {
            Some((head, at)) if head == header && text[at.clone()] == text[name.clone()] => {
                return Some(at);
            }
            // A key is given twice within its table.
            Some((true, _)) if !header => return None,
            _ => (),
        }
    }
    None
}

/// What a line names: whether it heads a table, and where its name is.
fn named(text: &str, line: Range<usize>) -> Option<(bool, Range<usize>)> {
    let content = &text[line.clone()];
    let start = content.find(|c: char| !c.is_whitespace())?;
    if content[start..].starts_with('#') {
        return None;
    }
    let header = content[start..].starts_with('[');
    let start = match header {
        true => start + content[start..].find(|c: char| c != '[' && c != ' ')?,
        false => start,
    };
    let len = content[start..].find(if header { ']' } else { '=' })?;
    let name = content[start..start + len].trim_end();
    let start = line.start + start;
    Some((header, start..start + name.len()))
}
