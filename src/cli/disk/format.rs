//! What a command line says of an image's format: its name, and its options.

use std::path::Path;

use clap::Args;
use formats::{Format, OptionKind, OptionValue, find, for_extension, raw_for};

use crate::config::{expects, size};
use crate::{Error, Result};

/// The options of an image that is to be made.
#[derive(Args)]
pub(super) struct Options {
    /// An option of the new image's format, as `launcher formats` lists them; may be given again,
    /// or several with commas
    #[arg(
        short = 'o',
        long = "option",
        value_name = "KEY=VALUE",
        value_delimiter = ','
    )]
    pub(super) options: Vec<String>,
}

/// The format of an image that no VM's file describes: the one written out, or its extension's;
/// never by its content. A raw one is thin: nothing is allocated of what is only looked at.
///
/// `flag` is the option of the command line that names it, if there is one.
pub(in crate::cli) fn format_of(
    path: &Path,
    written: Option<&str>,
    flag: Option<&str>,
) -> Result<&'static Format> {
    let names = || {
        let names = formats::formats()?;
        let names: Vec<_> = names.iter().map(|format| format.name).collect();
        Ok::<_, Error>(format!("this build has {}", names.join(", ")))
    };
    let shown = path.display();
    match written {
        Some(name) => match find(name) {
            Some(format) => thin(format),
            None => {
                let message = match flag {
                    Some(flag) => {
                        format!("`--{flag}` is {name:?}, expected the name of a format")
                    }
                    None => format!("the format of `{shown}` is {name:?}, which nothing here has"),
                };
                Err(Error::usage(message).help(names()?))
            }
        },
        None => {
            let extension = path.extension().and_then(|extension| extension.to_str());
            match extension.and_then(for_extension) {
                Some(format) => thin(format),
                None => {
                    let message = format!("the name `{shown}` does not tell the image's format");
                    let error = Error::usage(message);
                    Err(match flag {
                        Some(flag) => error.help(format!("add `--{flag}`: {}", names()?)),
                        None => error.help("give it an extension that a format has"),
                    })
                }
            }
        }
    }
}

/// The format that opens the same images and allocates nothing.
pub(super) fn thin(format: &'static Format) -> Result<&'static Format> {
    match raw_name(format.name) {
        true => named(raw_for(true)),
        false => Ok(format),
    }
}

/// The format that opens the same images and may allocate all of them.
pub(super) fn allocated(format: &'static Format) -> Result<&'static Format> {
    match raw_name(format.name) {
        true => named(raw_for(false)),
        false => Ok(format),
    }
}

/// Whether images of this format are the bytes of the disk.
pub(in crate::cli) fn raw_name(name: &str) -> bool {
    name == raw_for(true) || name == raw_for(false)
}

/// Whether images of this format are qcow2's, whichever engine serves them.
pub(super) fn is_qcow2(format: &Format) -> bool {
    matches!(format.name, "qcow2" | "qcow2-rs")
}

/// A format of a VM's file, which has been checked already.
pub(super) fn named(name: &str) -> Result<&'static Format> {
    find(name).ok_or_else(|| {
        Error::usage(format!("format `{name}` is not in this build")).help("see `launcher formats`")
    })
}

/// The options that were given, each of which the format must have. The last of one name holds.
pub(super) fn options(
    format: &Format,
    given: &[String],
) -> Result<Vec<(&'static str, OptionValue)>> {
    let mut options: Vec<(&'static str, OptionValue)> = Vec::new();
    for option in given {
        let Some((key, value)) = option.split_once('=') else {
            let message = format!("the option is {option:?}, expected KEY=VALUE");
            return Err(Error::usage(message).help("as in `-o cluster_size=128KiB`"));
        };
        let Some(known) = format.options.iter().find(|known| known.name == key) else {
            let names: Vec<_> = format.options.iter().map(|known| known.name).collect();
            let message = format!("the format `{}` has no option {key:?}", format.name);
            let error = Error::usage(message);
            return Err(match names.is_empty() {
                true => error.help("it has no options at all"),
                false => error.help(format!("it has {}", names.join(", "))),
            });
        };
        let read = value_of(known.kind, value).ok_or_else(|| {
            let expects = expects(known.kind);
            Error::usage(format!("`{key}` is {value:?}, expected {expects}"))
        })?;
        options.retain(|(other, _)| *other != known.name);
        options.push((known.name, read));
    }
    Ok(options)
}

/// A value as it stands on the command line: without TOML's quotes.
fn value_of(kind: OptionKind, value: &str) -> Option<OptionValue> {
    match kind {
        OptionKind::Bool => match value {
            "true" | "on" => Some(OptionValue::Bool(true)),
            "false" | "off" => Some(OptionValue::Bool(false)),
            _ => None,
        },
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

    #[test]
    fn the_format_is_written_out_or_follows_from_the_extension() {
        let name = |path: &str, written, flag| {
            format_of(Path::new(path), written, flag)
                .map(|format| format.name)
                .map_err(|error| error.to_string())
        };
        let flag = Some("to-format");
        assert_eq!(name("a.qcow2", None, flag).unwrap(), "qcow2");
        assert_eq!(name("a.img", None, flag).unwrap(), "sparse-raw");
        assert_eq!(name("a.img", Some("qcow2"), flag).unwrap(), "qcow2");
        assert_eq!(name("a", Some("raw"), flag).unwrap(), "sparse-raw");
        for (written, flag, said) in [
            (None, flag, "add `--to-format`: this build has qcow2"),
            (Some("qcow"), flag, "`--to-format` is \"qcow\""),
            (None, None, "give it an extension"),
            (Some("vmdk"), None, "the format of `a` is \"vmdk\""),
        ] {
            let error = name("a", written, flag).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_raw_image_is_thin_or_allocated() {
        let raw = find("raw").unwrap();
        assert_eq!(thin(raw).unwrap().name, "sparse-raw");
        assert_eq!(allocated(thin(raw).unwrap()).unwrap().name, "raw");
        let qcow2 = find("qcow2").unwrap();
        assert_eq!(allocated(qcow2).unwrap().name, "qcow2");
    }

    fn qcow2(given: &[&str]) -> Result<Vec<(&'static str, OptionValue)>, String> {
        let given: Vec<_> = given.iter().map(|it| (*it).to_owned()).collect();
        options(find("qcow2").unwrap(), &given).map_err(|error| error.to_string())
    }

    #[test]
    fn an_option_is_read_as_its_kind_and_the_last_of_one_name_holds() {
        assert_eq!(
            qcow2(&[
                "cluster_size=128K",
                "extended_l2=on",
                "lazy_refcounts=false",
                "compression_type=zstd",
                "version=2",
                "version=3"
            ])
            .unwrap(),
            [
                ("cluster_size", OptionValue::Number(128 << 10)),
                ("extended_l2", OptionValue::Bool(true)),
                ("lazy_refcounts", OptionValue::Bool(false)),
                ("compression_type", OptionValue::Word("zstd".into())),
                ("version", OptionValue::Number(3)),
            ]
        );
    }

    #[test]
    fn an_option_that_the_format_does_not_have_or_take_is_refused() {
        for (given, said) in [
            (
                "extended_l2",
                "error: the option is \"extended_l2\", expected KEY=VALUE",
            ),
            (
                "clusters=1",
                "error: the format `qcow2` has no option \"clusters\"\nhelp: it has cluster_size",
            ),
            (
                "version=x",
                "error: `version` is \"x\", expected a whole number",
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
}
