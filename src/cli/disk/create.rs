//! `launcher disk create`.

use std::path::PathBuf;

use clap::Args;
use formats::{Format, Image};

use super::format::{Options, allocated, format_of, options, raw_name};
use super::image::{lone, ring};
use super::look::look;
use crate::cli::output::print;
use crate::config::size;
use crate::error::text;
use crate::{Error, Result, exit, progress};

/// Create an image
///
/// It appears under its name when it is whole, or not at all. An image that is there is never
/// overwritten.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  launcher disk create data.img 8GiB --allocate\n  \
                  launcher disk create overlay.qcow2 --backing base.raw\n  \
                  launcher disk create root.qcow2 20GiB -o cluster_size=128KiB,extended_l2=true"
)]
pub(super) struct Create {
    /// The image to create
    path: PathBuf,
    /// Size of the disk: bytes, or a number with KiB, MiB, GiB or TiB [default: that of the
    /// backing file]
    #[arg(required_unless_present = "backing")]
    size: Option<String>,
    /// Format of the image [default: the one that its extension stands for]
    #[arg(short, long)]
    format: Option<String>,
    #[command(flatten)]
    options: Options,
    /// What the new image is an overlay over: it shows this file's content until it is written to
    #[arg(short = 'B', long, value_name = "PATH")]
    backing: Option<PathBuf>,
    /// Allocate all of the image, as a disk with `sparse = false` is. A raw one has its name before
    /// that: interrupted, it stays, allocated in part
    #[arg(long, conflicts_with = "backing")]
    allocate: bool,
}

impl Create {
    pub(super) fn run(self) -> Result<u8> {
        let mut format = format_of(&self.path, self.format.as_deref(), Some("format"))?;
        if self.allocate {
            format = allocated(format)?;
        }
        if self.backing.is_some() && !format.abilities.contains(&"backing") {
            let message = format!("an image of format `{}` has no backing file", format.name);
            return Err(Error::usage(message).help("with `--format qcow2` it can have one"));
        }
        let size = self.size.as_deref().map(bytes).transpose()?;
        let options = options(format, &self.options.options)?;
        let image = Image {
            ro: false,
            sparse: !self.allocate,
            size,
            backing: self.backing.into_iter().collect(),
            format_written: self.format.is_some(),
            options,
            ..lone(&self.path)
        };
        (format.create)(&image)?;
        if self.allocate && raw_name(format.name) {
            allocate(&image, format).inspect_err(|_| {
                // We have just made it: nobody has come to use it.
                let _ = std::fs::remove_file(&image.path);
            })?;
        }
        let made = look(&self.path, format, false)?;
        let size = made
            .size
            .map_or_else(String::new, |bytes| format!(", {}", size::show(bytes)));
        print(&format!("created {} ({}{size})\n", made.path, format.name))?;
        Ok(exit::DONE)
    }
}

/// Has a raw image allocated, as opening it does.
fn allocate(image: &Image, format: &Format) -> Result<()> {
    let ring = ring()?;
    ring.on_progress(progress::hook());
    let opened = async {
        let disk = (format.open)(&ring, image).await?;
        disk.close().await.map_err(|error| {
            let (path, why) = (image.path.display(), text(&error));
            Error::failed(format!("cannot close `{path}`: {why}"))
        })
    };
    ring.block_on(opened, || {})
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_at_least_a_sector() {
        assert_eq!(bytes("1M").unwrap(), 1 << 20);
        for wrong in ["0", "511", "8388608TiB", "1gb", "+1G"] {
            assert_eq!(bytes(wrong).unwrap_err().exit, 2, "{wrong}");
        }
    }
}
