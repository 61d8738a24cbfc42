//! `launcher disk convert`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use formats::convert::{Conversion, Stage};
use formats::{Engine, Format, Image, OpenError, OptionKind, OptionValue, Progress, raw_for};

use crate::cli::{output::print, up};
use crate::config::{expects, size};
use crate::{Error, Result, exit, progress, signals};

/// Convert a disk image to another format, or to one with other options
///
/// Holes and zeroes are not written. The new image gets its name when it is complete, on disk,
/// and has been read back and compared; before that, and after an error or an interruption, there
/// is nothing of that name. Both images are locked meanwhile.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher disk convert disk.raw disk.qcow2\n  \
                  launcher disk convert old.qcow2 new.qcow2 -o cluster_size=128KiB,extended_l2=true\n  \
                  launcher disk convert overlay.qcow2 whole.raw --from-backing base.qcow2\n\n\
                  Example:\n  launcher disk convert disk.raw disk.qcow2 --compress -o compression_type=zstd"
)]
pub(super) struct Convert {
    /// The image to read
    from: PathBuf,
    /// The image to make
    to: PathBuf,
    /// Format of FROM [default: the one that its extension stands for; never by its content]
    #[arg(short = 'f', long, value_name = "FORMAT")]
    from_format: Option<String>,
    /// Format of TO [default: the one that its extension stands for]
    #[arg(short = 'O', long, value_name = "FORMAT")]
    to_format: Option<String>,
    /// An option of TO's format, as `launcher formats` lists them; may be given again, or several
    /// with commas
    #[arg(
        short = 'o',
        long = "option",
        value_name = "KEY=VALUE",
        value_delimiter = ','
    )]
    options: Vec<String>,
    /// An option of FROM's format
    #[arg(long = "from-option", value_name = "KEY=VALUE", value_delimiter = ',')]
    from_options: Vec<String>,
    /// Compress the clusters of TO
    #[arg(short = 'c', long)]
    compress: bool,
    /// Allocate all of TO, as a disk with `sparse = false` is; zeroes are still not written
    #[arg(long)]
    allocate: bool,
    /// Make TO an overlay of this file: what is the same there is left out. Given again, it names
    /// the rest of the chain, in order
    #[arg(short = 'B', long, value_name = "PATH")]
    backing: Vec<PathBuf>,
    /// The backing file of FROM, which is opened only if it is named here. Given again, it names
    /// the rest of the chain, in order
    #[arg(long, value_name = "PATH")]
    from_backing: Vec<PathBuf>,
    /// Do not read TO back and compare it
    #[arg(long)]
    no_verify: bool,
    /// Do not wait until TO is on disk: a power cut soon afterwards may leave a part of it
    #[arg(long)]
    no_sync: bool,
    /// Replace TO if it exists and nobody uses it
    #[arg(long)]
    force: bool,
}

impl Convert {
    pub(super) fn run(self) -> Result<u8> {
        let from = format_of(&self.from, self.from_format.as_deref(), "from-format", true)?;
        let to = format_of(
            &self.to,
            self.to_format.as_deref(),
            "to-format",
            !self.allocate,
        )?;
        let source = Image {
            path: self.from,
            ro: true,
            sparse: true,
            o_direct: false,
            block_size: 512,
            lock: true,
            size: None,
            backing: self.from_backing,
            format_written: self.from_format.is_some(),
            options: options(from, &self.from_options)?,
        };
        let target = Image {
            path: self.to,
            ro: false,
            sparse: !self.allocate,
            backing: self.backing,
            options: options(to, &self.options)?,
            ..source.clone()
        };
        if !target.backing.is_empty() && !to.abilities.contains(&"backing") {
            let message = format!("an image of format `{}` has no backing file", to.name);
            return Err(Error::usage(message).help("with `--to-format qcow2` it can have one"));
        }
        let below = target.backing.first();
        let below = below.map(|path| format_of(path, None, "backing", true));
        let conversion = Conversion {
            from,
            source: &source,
            to,
            target: &target,
            backing: below.transpose()?,
            compress: self.compress,
            verify: !self.no_verify,
            sync: !self.no_sync,
            force: self.force,
            engine: engine()?,
        };
        let stop = stop_on_signals()
            .map_err(|error| Error::failed(format!("cannot wait for signals: {error}")))?;
        let mut shown = Shown::default();
        let size = formats::convert::convert(&conversion, &stop, &mut |stage, progress| {
            shown.show(stage, progress);
        });
        drop(shown);
        let size = size.map_err(|error| on_the_command_line(error, &conversion))?;
        let verified = if self.no_verify { "" } else { ", verified" };
        print(&format!(
            "converted {} to {} ({}, {}{verified})\n",
            source.path.display(),
            target.path.display(),
            to.name,
            size::show(size)
        ))?;
        Ok(exit::DONE)
    }
}

/// How the threads do their I/O, as the environment has it.
fn engine() -> Result<Engine> {
    match std::env::var_os(up::VARIABLE) {
        None => Ok(Engine::Auto),
        Some(value) => up::engine(&value.to_string_lossy()),
    }
}

type Hook = Box<dyn Fn(&Progress<'_>)>;

/// The bar of the stage that the conversion is in.
#[derive(Default)]
struct Shown(Option<(Stage, Hook)>);

impl Shown {
    fn show(&mut self, stage: Stage, progress: &Progress<'_>) {
        if self.0.as_ref().is_none_or(|(now, _)| *now != stage) {
            // The last stage's bar goes first.
            self.0 = None;
            let hook: Hook = match stage {
                Stage::Converting => Box::new(progress::converting()),
                Stage::Verifying => Box::new(progress::verifying()),
            };
            self.0 = Some((stage, hook));
        }
        if let Some((_, hook)) = &self.0 {
            hook(progress);
        }
    }
}

/// What SIGINT, SIGTERM and SIGHUP set; a second one ends the process at once.
fn stop_on_signals() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        if !signals::is_ignored(signal) {
            signal_hook::flag::register_conditional_default(signal, Arc::clone(&stop))?;
            signal_hook::flag::register(signal, Arc::clone(&stop))?;
        }
    }
    Ok(stop)
}

/// The format of an image: the one written out, or its extension's. `thin` picks between the two
/// that raw images have.
fn format_of(
    path: &Path,
    written: Option<&str>,
    flag: &str,
    thin: bool,
) -> Result<&'static Format> {
    let names = || {
        let names = formats::formats()?;
        let names: Vec<_> = names.iter().map(|format| format.name).collect();
        Ok::<_, Error>(format!("this build has {}", names.join(", ")))
    };
    let found = match written {
        Some(name) => match formats::find(name) {
            Some(format) => format,
            None => {
                let message = format!("`--{flag}` is {name:?}, expected the name of a format");
                return Err(Error::usage(message).help(names()?));
            }
        },
        None => {
            let extension = path.extension().and_then(|extension| extension.to_str());
            match extension.and_then(formats::for_extension) {
                Some(format) => format,
                None => {
                    let shown = path.display();
                    let message = format!("the name `{shown}` does not tell the image's format");
                    let error = Error::usage(message);
                    return Err(match flag {
                        "backing" => error.help("give it an extension that a format has"),
                        _ => error.help(format!("add `--{flag}`: {}", names()?)),
                    });
                }
            }
        }
    };
    let raw = [true, false].map(raw_for).contains(&found.name);
    let by_width = formats::find(raw_for(thin)).filter(|_| raw);
    Ok(by_width.unwrap_or(found))
}

/// The options that were given, each of which the format must have.
fn options(format: &Format, given: &[String]) -> Result<Vec<(&'static str, OptionValue)>> {
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

/// An error whose advice is for a VM's file, with advice for this command.
fn on_the_command_line(error: OpenError, conversion: &Conversion<'_>) -> Error {
    let source = error
        .message
        .contains(&*conversion.source.path.to_string_lossy());
    let help = match error.key {
        "backing" if source => Some("name the backing files of FROM with `--from-backing`"),
        "format" if source => Some("if that is right, say so with `--from-format raw`"),
        "data_file" if source => {
            Some("name the data file of FROM with `--from-option data_file=PATH`")
        }
        _ => None,
    };
    let help = help.map(str::to_owned).or(error.help.clone());
    OpenError { help, ..error }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qcow2(given: &[&str]) -> Result<Vec<(&'static str, OptionValue)>, String> {
        let given: Vec<_> = given.iter().map(|it| (*it).to_owned()).collect();
        options(formats::find("qcow2").unwrap(), &given).map_err(|error| error.to_string())
    }

    #[test]
    fn options_are_read_as_their_kinds_and_the_last_of_one_name_holds() {
        assert_eq!(
            qcow2(&[
                "cluster_size=128K",
                "extended_l2=on",
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
                "error: the format `qcow2` has no option \"clusters\"",
            ),
            (
                "version=x",
                "error: `version` is \"x\", expected a whole number",
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
    fn a_raw_image_is_thin_unless_it_is_to_be_allocated() {
        let name = |path: &str, written, thin| {
            format_of(Path::new(path), written, "to-format", thin)
                .map(|format| format.name)
                .map_err(|error| error.to_string())
        };
        assert_eq!(name("a.img", None, true).unwrap(), "sparse-raw");
        assert_eq!(name("a", Some("raw"), true).unwrap(), "sparse-raw");
        assert_eq!(name("a.raw", None, false).unwrap(), "raw");
        assert_eq!(name("a.qcow2", None, false).unwrap(), "qcow2");
        let error = name("a", None, true).unwrap_err();
        assert!(
            error.contains("add `--to-format`: this build has"),
            "{error}"
        );
        let error = name("a", Some("vmdk"), true).unwrap_err();
        assert!(error.contains("`--to-format` is \"vmdk\""), "{error}");
    }
}
