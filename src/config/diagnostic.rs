//! What is wrong in a file, and where: shown like a compiler's messages, with line, column and
//! caret.

use std::ops::Range;

use annotate_snippets::{
    AnnotationKind, Group, Level, Origin, Renderer, Snippet, Title, normalize_untrusted_str,
};

use super::lines::Lines;

/// So many diagnostics of one file are shown; more are counted. A file of a megabyte can hold a
/// million mistakes.
pub(super) const SHOWN: usize = 100;

/// One mistake.
#[derive(Debug)]
pub(super) struct Diagnostic {
    /// One sentence: key, value, limit.
    title: String,
    /// Byte range in the text; `None` if it is the file as a whole.
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
    /// A value that is there.
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

/// Lays out all diagnostics of one file, in the order of their places.
///
/// `path` is the file as the user named it; `hidden` more diagnostics are only counted.
pub(super) fn render(
    path: &str,
    lines: &Lines<'_>,
    mut diagnostics: Vec<Diagnostic>,
    hidden: usize,
    renderer: &Renderer,
) -> String {
    diagnostics.sort_by(|a, b| {
        let start = |d: &Diagnostic| d.at.as_ref().map(|at| at.start);
        start(a).cmp(&start(b)).then_with(|| a.title.cmp(&b.title))
    });
    let hidden = hidden + diagnostics.len().saturating_sub(SHOWN);
    let mut rendered = String::new();
    for diagnostic in diagnostics.iter().take(SHOWN) {
        rendered.push_str(&renderer.render(&[group(path, lines, diagnostic)]));
        rendered.push_str("\n\n");
    }
    if hidden > 0 {
        let title = format!("{hidden} more in {path}");
        let group = Group::with_title(Level::ERROR.primary_title(title));
        rendered.push_str(&renderer.render(&[group]));
    }
    rendered.truncate(rendered.trim_end().len());
    rendered
}

fn group<'a>(path: &'a str, lines: &Lines<'a>, diagnostic: &'a Diagnostic) -> Group<'a> {
    let title = Level::ERROR.primary_title(&*diagnostic.title);
    let group = match &diagnostic.at {
        None => title.element(Origin::path(path)),
        Some(at) => snippet(path, lines, title, at, &diagnostic.related),
    };
    match &diagnostic.help {
        Some(help) => group.element(Level::HELP.message(normalize_untrusted_str(help))),
        None => group,
    }
}

/// The lines around the places, each with its caret.
fn snippet<'a>(
    path: &'a str,
    lines: &Lines<'a>,
    title: Title<'a>,
    at: &Range<usize>,
    related: &'a [(Range<usize>, &'static str)],
) -> Group<'a> {
    /// Laying out a line takes the square of its length in time.
    const LONGEST_LINE: usize = 2000;
    let at = lines.first_line(at);
    let related: Vec<_> = related
        .iter()
        .map(|(at, why)| (lines.first_line(at), *why))
        .collect();
    let places = || related.iter().map(|(at, _)| at).chain([&at]);
    let start = places().map(|at| at.start).min().unwrap_or(0);
    let end = places().map(|at| at.end).max().unwrap_or(0);
    let window = lines.line(start).start..lines.line(end).end;
    let source = &lines.text[window.clone()];
    if source.lines().any(|line| line.len() > LONGEST_LINE) {
        let column = lines.text[lines.line(at.start).start..at.start]
            .chars()
            .count()
            + 1;
        let origin = Origin::path(path)
            .line(lines.number(at.start))
            .char_column(column);
        let notes = related.iter().map(|(at, why)| {
            let note = format!("{why}: line {}", lines.number(at.start));
            Level::NOTE.message(note)
        });
        return title.element(origin).elements(notes);
    }
    let within = |at: &Range<usize>| at.start - window.start..at.end - window.start;
    let context = related
        .iter()
        .map(|(at, why)| AnnotationKind::Context.span(within(at)).label(*why));
    title.element(
        Snippet::source(source)
            .path(path)
            .line_start(lines.number(window.start))
            .annotation(AnnotationKind::Primary.span(within(&at)))
            .annotations(context),
    )
}
