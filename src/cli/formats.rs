//! `launcher formats`.

use clap::Args;
use formats::Format;
use serde::Serialize;

use super::output::{print, print_json, table};
use crate::{Result, exit};

/// List the disk image formats of this build
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
}

impl From<&'static Format> for Listed {
    fn from(format: &'static Format) -> Self {
        Listed {
            name: format.name,
            extensions: format.extensions,
            abilities: format.abilities,
            description: format.description,
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
    table(&rows)
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn programs_get_lists() {
        let json = serde_json::to_value([Listed::from(&RAW)]).unwrap();
        assert_eq!(json[0]["extensions"][1], "raw");
        assert_eq!(json[0]["abilities"][0], "resize");
        assert_eq!(json[0]["description"], "the bytes as they are");
    }
}
