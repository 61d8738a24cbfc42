//! `launcher explain`.

use clap::Args;

use super::output::{print, table};
use crate::config::{Entry, Named, entries, find};
use crate::{Error, Result, exit};

/// Explain a key of a VM's file: what it does, what it takes, its default, an example
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher explain sparse\n  launcher explain block.qcow2.cluster_size\n  launcher explain boot"
)]
pub(super) struct Explain {
    /// The key, as block.sparse, boot or sparse [default: list all]
    key: Option<String>,
}

impl Explain {
    pub(super) fn run(self) -> Result<u8> {
        let entries = entries(&formats::formats()?);
        let text = match &self.key {
            None => list(&entries.iter().filter(|it| !it.of_file).collect::<Vec<_>>()),
            Some(key) => match find(&entries, key) {
                Named::One(entry) => explained(entry, &entries),
                Named::Several(several) => list(&several),
                Named::Near(near) => {
                    let help = format!("did you mean `{}`?", near.path);
                    return Err(unknown(key).help(help));
                }
                Named::Unknown => {
                    return Err(unknown(key).help("`launcher explain` lists all keys"));
                }
            },
        };
        print(&text)?;
        Ok(exit::DONE)
    }
}

fn unknown(key: &str) -> Error {
    Error::usage(format!("no key of a VM's file is called {key:?}"))
}

/// A line each.
fn list(entries: &[&Entry]) -> String {
    let rows = entries.iter().map(|entry| {
        [
            entry.path.clone(),
            first_sentence(&entry.meaning).to_owned(),
        ]
    });
    table(&rows.collect::<Vec<_>>())
}

/// How long lines are, in characters.
const WIDTH: usize = 80;

fn explained(entry: &Entry, all: &[Entry]) -> String {
    let mut text = format!("{}\n\n{}\n", entry.path, wrapped(&entry.meaning, WIDTH));
    let words = entry
        .words
        .iter()
        .map(|(word, meaning)| [format!("  \"{word}\""), meaning.clone()]);
    let words: Vec<_> = words.collect();
    if !words.is_empty() {
        text += &format!("\n{}", table(&words));
    }
    let facts = [
        ["Takes:".to_owned(), entry.takes.clone()],
        ["Default:".to_owned(), entry.default.clone()],
    ];
    text += &format!("\n{}", table(&facts));
    let below: Vec<_> = all
        .iter()
        .filter(|it| entry.keys.contains(&it.path))
        .collect();
    if !below.is_empty() {
        text += &format!("\nKeys:\n{}", indented(&list(&below)));
    }
    text += &format!("\nExample:\n{}", indented(&entry.example));
    text
}

fn first_sentence(text: &str) -> &str {
    match text.split_once(". ") {
        Some((first, _)) => first,
        None => text.trim_end_matches('.'),
    }
}

fn indented(text: &str) -> String {
    let lines = text.lines().map(|line| match line {
        "" => "\n".to_owned(),
        line => format!("  {line}\n"),
    });
    lines.collect()
}

/// Text in lines of at most so many characters.
pub(super) fn wrapped(text: &str, most: usize) -> String {
    let mut lines = String::new();
    let mut width = 0;
    for word in text.split(' ') {
        let len = word.chars().count();
        if width > 0 && width + 1 + len > most {
            lines.push('\n');
            width = 0;
        } else if width > 0 {
            lines.push(' ');
            width += 1;
        }
        lines.push_str(word);
        width += len;
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_at_most_as_long_as_said() {
        let text = wrapped(&"seven77 ".repeat(20), 80);
        let widths: Vec<_> = text.lines().map(|line| line.trim_end().len()).collect();
        assert_eq!(widths, [79, 79]);
        assert_eq!(wrapped("short", 80), "short");
    }

    #[test]
    fn a_list_has_first_sentences() {
        assert_eq!(first_sentence("One. Two."), "One");
        assert_eq!(first_sentence("O_DIRECT: as 1.5."), "O_DIRECT: as 1.5");
    }
}
