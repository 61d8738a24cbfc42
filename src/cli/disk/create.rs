//! `launcher disk create`.

use std::path::PathBuf;

use clap::Args;
use formats::{Format, Image, OptionKind, OptionValue};

use super::image::{format_of, lone};
use super::look::look;
use crate::cli::output::print;
use crate::config::{expects, size};
use crate::{Error, Result, exit};

/// Create an image
///
/// It appears under its name when it is whole, or not at all. An image that is there is never
/// overwritten.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher disk create data.img 8GiB\n  launcher disk create overlay.qcow2 --backing base.raw\n  launcher disk create root.qcow2 20GiB -o cluster_size=128KiB -o extended_l2=true"
)]
pub(super) struct Create {
    /// The image to create
    path: PathBuf,
    /// Size of the disk: bytes, or a number with KiB, MiB, GiB or TiB [default: that of the
    /// backing file]
    #[arg(required_unless_present = "backing")]
    size: Option<String>,
    /// Format of the image [default: the one that its extension stands for]
    #[arg(long)]
    format: Option<String>,
    /// An option of the format, as `launcher formats` lists them; may be given again
    #[arg(short = 'o', value_name = "KEY=VALUE")]
    option: Vec<String>,
    /// What the new image is an overlay over: it shows this file's content until it is written to
    #[arg(long, value_name = "PATH")]
    backing: Option<PathBuf>,
}

impl Create {
    pub(super) fn run(self) -> Result<u8> {
        let format = format_of(&self.path, self.format.as_deref())?;
        if self.backing.is_some() && !format.abilities.contains(&"backing") {
            let message = format!("an image of format `{}` has no backing file", format.name);
            return Err(Error::usage(message).help("with `--format qcow2` it can have one"));
        }
        let size = self.size.as_deref().map(bytes).transpose()?;
        let options = options(format, &self.option)?;
        let image = Image {
            ro: false,
            size,
            backing: self.backing.into_iter().collect(),
            format_written: self.format.is_some(),
            options,
            ..lone(&self.path)
        };
        (format.create)(&image)?;
        let made = look(&self.path, format, false)?;
        let size = made
            .size
            .map_or_else(String::new, |bytes| format!(", {}", size::show(bytes)));
        print(&format!("created {} ({}{size})\n", made.path, format.name))?;
        Ok(exit::DONE)
    }
}

fn bytes(text: &str) -> Result<u64> {
    let bytes = size::parse(text).map_err(|advice| {
        let message = format!("`SIZE` is {text:?}, expected a size such as 8589934592 or 8GiB");
        Error::usage(message).help(advice)
    })?;
    match (512..=i64::MAX as u64).contains(&bytes) {
        true => Ok(bytes),
        false => Err(Error::usage(format!(
            "`SIZE` is {bytes} bytes, expected 512 or more, less than 8388608TiB"
        ))),
    }
}

/// The options that were given, each of which the format must have.
fn options(format: &Format, given: &[String]) -> Result<Vec<(&'static str, OptionValue)>> {
    let mut options: Vec<(&'static str, OptionValue)> = Vec::new();
    for option in given {
        let Some((key, value)) = option.split_once('=') else {
            let message = format!("`-o` is {option:?}, expected KEY=VALUE");
            return Err(Error::usage(message).help("as in `-o cluster_size=128KiB`"));
        };
        let Some(known) = format.options.iter().find(|known| known.name == key) else {
            let names: Vec<_> = format.options.iter().map(|known| known.name).collect();
            let message = format!("the format `{}` has no option {key:?}", format.name);
            let error = Error::usage(message);
            return Err(match names.is_empty() {
                true => error.help("it has no options at all"),
                false => error.help(format!("known here: {}", names.join(", "))),
            });
        };
        let read = read(known.kind, value).ok_or_else(|| {
            let expects = expects(known.kind);
            Error::usage(format!("`{key}` is {value:?}, expected {expects}"))
        })?;
        options.retain(|(other, _)| *other != known.name);
        options.push((known.name, read));
    }
    Ok(options)
}

/// A value as it stands on the command line: without TOML's quotes.
fn read(kind: OptionKind, value: &str) -> Option<OptionValue> {
    match kind {
        OptionKind::Bool => value.parse().ok().map(OptionValue::Bool),
        OptionKind::Size => size::parse(value).ok().map(OptionValue::Number),
        OptionKind::Integer => value.parse().ok().map(OptionValue::Number),
        OptionKind::Path => (!value.is_empty()).then(|| OptionValue::Path(value.into())),
        OptionKind::Choice(words) => words
            .contains(&value)
            .then(|| OptionValue::Word(value.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qcow2(given: &[&str]) -> Result<Vec<(&'static str, OptionValue)>, String> {
        let given: Vec<_> = given.iter().map(|it| (*it).to_owned()).collect();
        options(formats::find("qcow2").unwrap(), &given).map_err(|error| error.to_string())
    }

    #[test]
    fn an_option_is_read_as_its_kind_and_the_last_of_one_name_holds() {
        assert_eq!(
            qcow2(&[
                "cluster_size=128KiB",
                "extended_l2=true",
                "version=2",
                "version=3"
            ])
            .unwrap(),
            [
                ("cluster_size", OptionValue::Number(128 << 10)),
                ("extended_l2", OptionValue::Bool(true)),
                ("version", OptionValue::Number(3)),
            ]
        );
        let word = OptionValue::Word("zstd".into());
        assert_eq!(
            qcow2(&["compression_type=zstd"]).unwrap(),
            [("compression_type", word)]
        );
    }

    #[test]
    fn an_option_that_the_format_does_not_have_or_take_is_refused() {
        for (given, said) in [
            (
                "cluster_size",
                "error: `-o` is \"cluster_size\", expected KEY=VALUE",
            ),
            (
                "clusters=1",
                "error: the format `qcow2` has no option \"clusters\"\nhelp: known here: cluster_size",
            ),
            (
                "extended_l2=yes",
                "error: `extended_l2` is \"yes\", expected true or false",
            ),
            (
                "compression_type=lz4",
                "error: `compression_type` is \"lz4\", expected \"zlib\" or \"zstd\"",
            ),
        ] {
            let error = qcow2(&[given]).unwrap_err();
            assert!(error.starts_with(said), "{error}");
        }
    }

    #[test]
    fn a_size_is_at_least_a_sector() {
        assert_eq!(bytes("1M").unwrap(), 1 << 20);
        for wrong in ["0", "511", "8388608TiB", "1gb", "+1G"] {
            assert_eq!(bytes(wrong).unwrap_err().exit, 2, "{wrong}");
        }
    }
}
