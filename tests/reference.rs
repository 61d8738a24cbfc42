//! docs/vm-toml.md is what the code says of the keys of a VM's file. After a change of a key:
//!
//! ```sh
//! UPDATE_DOCS=1 cargo test --test reference
//! ```

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use formats::Format;
use launcher::config::{Absent, KEYS, Key, Takes, expects};

/// What stands above the tables.
const HEAD: &str = "\
# vm.toml

A VM is one TOML file. Paths in it are relative to its own folder; a leading `~/` is the home
folder. A size is a whole number of bytes, or a text with KiB, MiB, GiB or TiB. An unknown key is
an error; `launcher check` shows every error of a file.

<!-- Written by `UPDATE_DOCS=1 cargo test --test reference` from the code: do not edit. -->
";

/// A cell of a table.
fn cell(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    lines.join(" ").replace('|', "\\|")
}

fn default(absent: Absent) -> String {
    match absent {
        Absent::Error(example) => format!("must be written, such as `{}`", cell(example)),
        Absent::Value(value) => format!("`{}`", cell(value)),
        Absent::Words(words) => cell(words),
    }
}

/// The keys of one table of the file, then the tables below it.
fn table(heading: &str, keys: &[Key], page: &mut String) {
    *page += &format!("\n## {heading}\n\n| key | takes | default | meaning |\n|---|---|---|---|\n");
    for key in keys {
        let takes = match key.takes {
            Takes::Value(words) => cell(words),
            Takes::Table(_) => "a table, below".to_owned(),
            Takes::Tables(_) => "any number of tables, below".to_owned(),
        };
        let (name, default, doc) = (key.spelled(), default(key.absent), cell(key.doc));
        *page += &format!("| `{name}` | {takes} | {default} | {doc} |\n");
    }
    for key in keys.iter().filter(|key| !key.keys().is_empty()) {
        table(&format!("`{}`", key.spelled()), key.keys(), page);
    }
}

/// The disk formats, and the options of each.
fn of_formats(formats: &[&Format], page: &mut String) {
    *page += "\n## Disk formats\n\n| `format` | extensions | abilities | what it is |\n|---|---|---|---|\n";
    for format in formats {
        let extensions: Vec<_> = format
            .extensions
            .iter()
            .map(|it| format!("`.{it}`"))
            .collect();
        *page += &format!(
            "| `{}` | {} | {} | {} |\n",
            format.name,
            extensions.join(" "),
            format.abilities.join(", "),
            cell(format.description)
        );
    }
    for format in formats.iter().filter(|format| !format.options.is_empty()) {
        *page += &format!(
            "\n### `[block.{}]`\n\n| key | takes | default | meaning |\n|---|---|---|---|\n",
            format.name
        );
        for option in format.options {
            let (takes, doc) = (cell(&expects(option.kind)), cell(option.doc));
            let default = match option.default {
                "" => default(Absent::Words("none")),
                value => default(Absent::Value(value)),
            };
            *page += &format!("| `{}` | {takes} | {default} | {doc} |\n", option.name);
        }
    }
}

#[test]
fn the_reference_says_what_the_code_says() {
    let mut page = HEAD.to_owned();
    table("The top of the file", KEYS, &mut page);
    // The page is that of the default build, whatever this one is.
    let mut formats = formats::formats().unwrap();
    formats.retain(|format| format.name != "qcow2-rs");
    of_formats(&formats, &mut page);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/vm-toml.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&file, &page).unwrap();
    }
    let checked_in = fs::read_to_string(&file).unwrap_or_default();
    let first = page.lines().zip(checked_in.lines()).find(|(a, b)| a != b);
    assert!(
        page == checked_in,
        "docs/vm-toml.md is not what the code says (first difference: {first:?}); update it: \
         UPDATE_DOCS=1 cargo test --test reference"
    );
}

#[test]
fn an_option_of_a_format_is_in_the_reference() {
    static FORMAT: Format = Format {
        name: "x",
        extensions: &["x", "y"],
        description: "one | another",
        abilities: &["discard", "resize"],
        options: &[
            formats::FormatOption {
                name: "level",
                kind: formats::OptionKind::Choice(&["low", "high"]),
                default: "\"low\"",
                doc: "How much.",
            },
            formats::FormatOption {
                name: "beside",
                kind: formats::OptionKind::Path,
                default: "",
                doc: "Another file.",
            },
        ],
        open: |_, _| Box::pin(std::future::pending()),
        create: |_| Ok(()),
    };
    let mut page = String::new();
    of_formats(&[&FORMAT], &mut page);
    for line in [
        "| `x` | `.x` `.y` | discard, resize | one \\| another |",
        "### `[block.x]`",
        "| `level` | \"low\" or \"high\" | `\"low\"` | How much. |",
        "| `beside` | a path | none | Another file. |",
    ] {
        assert!(page.lines().any(|found| found == line), "{page}");
    }
}
