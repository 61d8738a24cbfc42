//! `launcher disk convert`.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use formats::convert::{Conversion, Stage};
use formats::{Image, OpenError, Progress};

use super::format::{Options, allocated, format_of, options};
use super::image::lone;
use crate::cli::{output::print, up};
use crate::config::size;
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
                  launcher disk convert overlay.qcow2 whole.raw --from-backing base.qcow2\n  \
                  launcher disk convert disk.raw disk.qcow2 --compress -o compression_type=zstd"
)]
pub(super) struct Convert {
    /// The image to read
    from: PathBuf,
    /// The image to make
    to: PathBuf,
    /// Format of FROM [default: the one that its extension stands for]
    #[arg(short = 'f', long, value_name = "FORMAT")]
    from_format: Option<String>,
    /// Format of TO [default: the one that its extension stands for]
    #[arg(short = 'O', long, value_name = "FORMAT")]
    to_format: Option<String>,
    #[command(flatten)]
    options: Options,
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
        let (from_format, to_format) = (self.from_format.as_deref(), self.to_format.as_deref());
        let from = format_of(&self.from, from_format, Some("from-format"))?;
        let mut to = format_of(&self.to, to_format, Some("to-format"))?;
        if self.allocate {
            to = allocated(to)?;
        }
        let source = Image {
            backing: self.from_backing,
            format_written: from_format.is_some(),
            options: options(from, &self.from_options)?,
            ..lone(&self.from)
        };
        let target = Image {
            path: self.to,
            ro: false,
            sparse: !self.allocate,
            backing: self.backing,
            options: options(to, &self.options.options)?,
            ..source.clone()
        };
        if !target.backing.is_empty() && !to.abilities.contains(&"backing") {
            let message = format!("an image of format `{}` has no backing file", to.name);
            return Err(Error::usage(message).help("with `--to-format qcow2` it can have one"));
        }
        let below = target.backing.first();
        let below = below.map(|path| format_of(path, None, None));
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
            engine: up::engine()?,
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
