//! `launcher formats`.

use clap::Args;
use formats::{Format, FormatOption};
use serde::Serialize;

use super::output::{print, print_json, table};
use crate::config::expects;
use crate::{Result, exit};

/// List the disk image formats of this build, and the options of each
#[derive(Args)]
#[command(after_help = "Example:\n  launcher formats --json")]
pub(super) struct Formats {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Formats {
    pub(super) fn run(self) -> Result<u8> {
        let formats = formats::formats()?;
        match self.json {
            true => print_json(
                &formats
                    .iter()
                    .map(|format| Listed::from(*format))
                    .collect::<Vec<_>>(),
            )?,
            false => print(&listing(&formats))?,
        }
        Ok(exit::DONE)
    }
}

/// A format as programs see it.
#[derive(Serialize)]
struct Listed {
    name: &'static str,
    extensions: &'static [&'static str],
    abilities: &'static [&'static str],
    description: &'static str,
    options: Vec<ListedOption>,
}

/// An option of a format as programs see it.
#[derive(Serialize)]
struct ListedOption {
    name: &'static str,
    takes: String,
    /// As TOML.
    default: Option<&'static str>,
    description: &'static str,
}

impl From<&'static FormatOption> for ListedOption {
    fn from(option: &'static FormatOption) -> Self {
        ListedOption {
            name: option.name,
            takes: expects(option.kind),
            default: Some(option.default).filter(|default| !default.is_empty()),
            description: option.doc,
        }
    }
}

impl From<&'static Format> for Listed {
    fn from(format: &'static Format) -> Self {
        Listed {
            name: format.name,
            extensions: format.extensions,
            abilities: format.abilities,
            description: format.description,
            options: format.options.iter().map(ListedOption::from).collect(),
        }
    }
}

/// The formats as people see them.
fn listing(formats: &[&'static Format]) -> String {
    if formats.is_empty() {
        return "this build has no formats\n".to_owned();
    }
    let mut rows = vec![["FORMAT", "EXTENSIONS", "ABILITIES", "DESCRIPTION"].map(str::to_owned)];
    rows.extend(formats.iter().map(|format| {
        let extensions = format.extensions.iter().map(|name| format!(".{name}"));
        [
            format.name.to_owned(),
            extensions.collect::<Vec<_>>().join(" "),
            format.abilities.join(" "),
            format.description.to_owned(),
        ]
    }));
    let mut text = table(&rows);
    for format in formats.iter().filter(|format| !format.options.is_empty()) {
        text += &format!("\n[block.{}]\n", format.name);
        let mut rows = vec![["OPTION", "TAKES", "DEFAULT", "DESCRIPTION"].map(str::to_owned)];
        rows.extend(format.options.iter().map(|option| {
            let listed = ListedOption::from(option);
            [
                listed.name.to_owned(),
                listed.takes,
                listed.default.unwrap_or("none").to_owned(),
                listed
                    .description
                    .split_whitespace()
                    .collect::<Vec<_>>()
                    .join(" "),
            ]
        }));
        text += &table(&rows);
    }
    text
}

#[cfg(test)]
mod tests {
    use formats::OptionKind;

    use super::*;

    const RAW: Format = Format {
        name: "raw",
        extensions: &["img", "raw"],
        description: "the bytes as they are",
        abilities: &["resize"],
        options: &[],
        open: |_, _| Box::pin(async { Err(refused()) }),
        create: |_| Err(refused()),
    };

    fn refused() -> formats::OpenError {
        formats::OpenError {
            message: "the tests open no image".into(),
            help: None,
            key: "path",
        }
    }

    #[test]
    fn each_format_has_a_row() {
        let thin = &Format {
            name: "sparse-raw",
            extensions: &[],
            abilities: &["discard", "resize"],
            ..RAW
        };
        assert_eq!(
            listing(&[&RAW, thin]),
            "FORMAT      EXTENSIONS  ABILITIES       DESCRIPTION\n\
             raw         .img .raw   resize          the bytes as they are\n\
             sparse-raw              discard resize  the bytes as they are\n"
        );
    }

    /// A format with options of its own.
    const LAYERED: Format = Format {
        name: "layered",
        extensions: &["lay"],
        abilities: &["backing"],
        options: &[
            FormatOption {
                name: "cluster_size",
                kind: OptionKind::Size,
                default: "\"64KiB\"",
                doc: "Bytes that are allocated\nat once.",
            },
            FormatOption {
                name: "data_file",
                kind: OptionKind::Path,
                default: "",
                doc: "Where the data is.",
            },
        ],
        ..RAW
    };

    #[test]
    fn a_format_with_options_has_a_table_of_them() {
        assert_eq!(
            listing(&[&LAYERED]),
            "FORMAT   EXTENSIONS  ABILITIES  DESCRIPTION\n\
             layered  .lay        backing    the bytes as they are\n\
             \n\
             [block.layered]\n\
             OPTION        TAKES                            DEFAULT  DESCRIPTION\n\
             cluster_size  a size such as 65536 or \"64KiB\"  \"64KiB\"  Bytes that are \
             allocated at once.\n\
             data_file     a path                           none     Where the data is.\n"
        );
        let json = serde_json::to_value(Listed::from(&LAYERED)).unwrap();
        assert_eq!(json["options"][0]["default"], "\"64KiB\"");
        assert_eq!(json["options"][1]["takes"], "a path");
        assert_eq!(json["options"][1]["default"], serde_json::Value::Null);
    }

    #[test]
    fn programs_get_lists() {
        let json = serde_json::to_value([Listed::from(&RAW)]).unwrap();
        assert_eq!(json[0]["extensions"][1], "raw");
        assert_eq!(json[0]["abilities"][0], "resize");
        assert_eq!(json[0]["description"], "the bytes as they are");
    }
}
