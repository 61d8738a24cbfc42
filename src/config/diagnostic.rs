//! What is wrong in a file, and where: shown like a compiler's messages, with line, column and
//! caret.

use std::ops::Range;

use annotate_snippets::{
    AnnotationKind, Element, Group, Level, Origin, Renderer, Snippet, normalize_untrusted_str,
};

use super::lines::Lines;
use super::texts::{Text, Texts};

/// So many diagnostics of one run are shown; more are counted. A file of a megabyte can hold a
/// million mistakes.
pub(super) const SHOWN: usize = 100;

/// One mistake.
#[derive(Clone, Debug)]
pub(super) struct Diagnostic {
    /// One sentence: key, value, limit.
    title: String,
    /// Place among all texts; `None` if it is the VM's file as a whole.
    pub(super) at: Option<Range<usize>>,
    /// Other places that belong to it, each with a word on why.
    related: Vec<(Range<usize>, &'static str)>,
    /// What to do about it.
    help: Option<String>,
    pub(super) kind: Kind,
}

/// What a diagnostic says something about; see [`super::syntax::Damage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The text is not TOML.
    Syntax,
    /// A value that is wrong whatever else is written.
    Alone,
    /// A value that is there, and what else is or is not.
    Value,
    /// A key that should not be there.
    Unknown,
    /// A key that is not there.
    Missing,
}

impl Diagnostic {
    pub(super) fn new(kind: Kind, at: Option<Range<usize>>, title: impl Into<String>) -> Self {
        Diagnostic {
            title: title.into(),
            at,
            related: Vec::new(),
            help: None,
            kind,
        }
    }

    /// A bad value, at its place.
    pub(super) fn value(at: Option<Range<usize>>, title: impl Into<String>) -> Self {
        Diagnostic::new(Kind::Value, at, title)
    }

    /// Shows another place with it.
    pub(super) fn related(mut self, at: Option<Range<usize>>, why: &'static str) -> Self {
        self.related.extend(at.map(|at| (at, why)));
        self
    }

    /// The same of a text that begins at `start` among all.
    pub(super) fn moved(mut self, start: usize) -> Self {
        let places = self.related.iter_mut().map(|(at, _)| at);
        for at in places.chain(&mut self.at) {
            *at = at.start + start..at.end + start;
        }
        self
    }

    /// Says what to do.
    pub(super) fn help(mut self, help: impl Into<Option<String>>) -> Self {
        self.help = help.into();
        self
    }
}

/// Text of the user's as a message shows it: on one line, and not too much of it.
pub(super) fn shortened(text: &str) -> String {
    const SHORT: usize = 40;
    let control = |c: char| c.is_control() || c == char::REPLACEMENT_CHARACTER;
    let mut shown = String::new();
    for (count, c) in text.chars().enumerate() {
        match c {
            _ if count == SHORT => {
                shown.push_str("...");
                break;
            }
            c if control(c) => shown.extend(c.escape_debug()),
            c => shown.push(c),
        }
    }
    shown
}

/// Lays out all diagnostics of one run, in the order of their places, each once.
///
/// `hidden` more diagnostics are only counted.
pub(super) fn render(
    texts: &Texts,
    mut diagnostics: Vec<Diagnostic>,
    hidden: usize,
    renderer: &Renderer,
) -> String {
    diagnostics.sort_by(|a, b| {
        let start = |d: &Diagnostic| d.at.as_ref().map(|at| at.start);
        start(a).cmp(&start(b)).then_with(|| a.title.cmp(&b.title))
    });
    // What is read alone and as a part of the whole is wrong twice.
    diagnostics.dedup_by(|a, b| a.at == b.at && a.title == b.title);
    let hidden = hidden + diagnostics.len().saturating_sub(SHOWN);
    let lines: Vec<_> = texts.iter().map(|text| Lines::new(&text.text)).collect();
    let mut rendered = String::new();
    for diagnostic in diagnostics.iter().take(SHOWN) {
        rendered.push_str(&renderer.render(&[group(texts, &lines, diagnostic)]));
        rendered.push_str("\n\n");
    }
    if hidden > 0 {
        let title = match lines.len() {
            0 | 1 => format!("{hidden} more in {}", texts.name()),
            _ => format!("{hidden} more in {} and what it is read with", texts.name()),
        };
        let group = Group::with_title(Level::ERROR.primary_title(title));
        rendered.push_str(&renderer.render(&[group]));
    }
    rendered.truncate(rendered.trim_end().len());
    rendered
}

/// A diagnostic with the lines of its text around its places, then those of others.
fn group<'a>(texts: &'a Texts, lines: &[Lines<'a>], diagnostic: &'a Diagnostic) -> Group<'a> {
    let title = Level::ERROR.primary_title(&*diagnostic.title);
    let own = diagnostic.at.as_ref().map(|at| texts.index(at.start));
    let mut others: Vec<usize> = Vec::new();
    for (at, _) in &diagnostic.related {
        let index = texts.index(at.start);
        if Some(index) != own && !others.contains(&index) {
            others.push(index);
        }
    }
    let mut elements = Vec::new();
    if own.is_none() {
        elements.push(Origin::path(texts.name()).into());
    }
    for index in own.into_iter().chain(others) {
        if let (Some(text), Some(lines)) = (texts.iter().nth(index), lines.get(index)) {
            let primary = diagnostic.at.as_ref().filter(|_| Some(index) == own);
            let related = diagnostic.related.iter();
            let related = related
                .filter(|(at, _)| texts.index(at.start) == index)
                .map(|(at, why)| (at, *why));
            elements.extend(snippet(text, lines, primary, related));
        }
    }
    let help = diagnostic.help.as_ref();
    elements.extend(help.map(|help| Level::HELP.message(normalize_untrusted_str(help)).into()));
    title.elements(elements)
}

/// The lines of one text around the places, each with its caret.
fn snippet<'a>(
    text: &'a Text,
    lines: &Lines<'a>,
    primary: Option<&Range<usize>>,
    related: impl Iterator<Item = (&'a Range<usize>, &'static str)>,
) -> Vec<Element<'a>> {
    /// Laying out a line takes the square of its length in time.
    const LONGEST_LINE: usize = 2000;
    let first_line = |at: &Range<usize>| lines.first_line(&text.within(at));
    let primary = primary.map(first_line);
    let related: Vec<_> = related.map(|(at, why)| (first_line(at), why)).collect();
    let places = || related.iter().map(|(at, _)| at).chain(&primary);
    let start = places().map(|at| at.start).min().unwrap_or(0);
    let end = places().map(|at| at.end).max().unwrap_or(0);
    let window = lines.line(start).start..lines.line(end).end;
    let source = &lines.text[window.clone()];
    let path = &*text.name;
    if source.lines().any(|line| line.len() > LONGEST_LINE) {
        let origin = primary.map(|at| {
            let before = &lines.text[lines.line(at.start).start..at.start];
            let column = before.chars().count() + 1;
            let origin = Origin::path(path).line(lines.number(at.start));
            origin.char_column(column).into()
        });
        let place = |at: &Range<usize>| match origin {
            Some(_) => format!("line {}", lines.number(at.start)),
            None => format!("{path}:{}", lines.number(at.start)),
        };
        let notes = related.iter().map(|(at, why)| {
            let note = format!("{why}: {}", place(at));
            Level::NOTE.message(note).into()
        });
        let notes: Vec<_> = notes.collect();
        return origin.into_iter().chain(notes).collect();
    }
    let within = |at: &Range<usize>| at.start - window.start..at.end - window.start;
    let context = related
        .iter()
        .map(|(at, why)| AnnotationKind::Context.span(within(at)).label(*why));
    let caret = primary
        .iter()
        .map(|at| AnnotationKind::Primary.span(within(at)));
    let snippet = Snippet::source(source)
        .path(path)
        .line_start(lines.number(window.start))
        .annotations(caret)
        .annotations(context);
    vec![snippet.into()]
}
