//! A disk format of one's own, from outside the crates: a raw image whose every byte has its bits
//! turned around by a few places.
//!
//! ```sh
//! cargo run --example custom_format -- formats
//! cargo run --example custom_format -- up vm.toml
//! ```
//!
//! where `vm.toml` has a disk such as
//!
//! ```toml
//! [[block]]
//! path = "disk.turned"
//! size = "64MiB"
//! [block.turned]
//! places = 3
//! ```

use std::io::{self, Write};
use std::process::ExitCode;

use formats::{
    Buffer, Disk, Format, FormatOption, HostFile, Image, Limits, OpenError, OptionKind,
    OptionValue, Pending, Ring, Segments, create_file,
};

// This is all that it takes for `launcher` to know the format.
inventory::submit! {
    Format {
        name: "turned",
        extensions: &["turned"],
        description: "the bytes of the disk, each with its bits turned around",
        abilities: &["discard", "resize"],
        options: &[FormatOption {
            name: "places",
            kind: OptionKind::Integer,
            default: "4",
            doc: "How many places each bit is moved, 1 to 7.",
        }],
        open: |ring, image| Box::pin(open(ring, image)),
        create,
    }
}

struct Turned {
    file: HostFile,
    places: u32,
    limits: Limits,
}

fn create(image: &Image) -> Result<(), OpenError> {
    let size = image.size.unwrap_or(0);
    create_file(&image.path, |file| Ok(rustix::fs::ftruncate(file, size)?))
}

async fn open(ring: &Ring, image: &Image) -> Result<Box<dyn Disk>, OpenError> {
    let wrong = |key, message| OpenError {
        message,
        help: None,
        key,
    };
    let places = match image.options.iter().find(|(name, _)| *name == "places") {
        None => 4,
        Some((_, OptionValue::Number(places @ 1..=7))) => *places as u32,
        Some(_) => return Err(wrong("places", "`places` is not 1 to 7".into())),
    };
    if image.size.is_some() && !image.ro && !image.path.exists() {
        create(image)?;
    }
    // Everything that can be wrong with a file, and its locks, is taken care of here.
    let file = HostFile::open(ring, image)?;
    match image.size {
        Some(size) if size < file.size() || (image.ro && size > file.size()) => {
            let message = format!("`size` is {size}, but the image has {}", file.size());
            return Err(wrong("size", message));
        }
        Some(size) if size > file.size() => {
            let failed = |error| wrong("size", format!("the image cannot grow: {error}"));
            file.resize(size).await.map_err(failed)?;
        }
        _ => {}
    }
    let limits = Limits {
        alignment: file.alignment(),
        memory_alignment: 1,
        optimal_io: file.block(),
        discard_granularity: match image.ro {
            true => 0,
            false => file.discard_granularity().await,
        },
        write_zeroes: !image.ro,
        resize: !image.ro,
    };
    Ok(Box::new(Turned {
        file,
        places,
        limits,
    }))
}

/// Memory for the bytes as they are in the file. A longer request goes in pieces.
fn piece(len: usize) -> io::Result<Segments> {
    Ok(Segments::from_buffer(Buffer::zeroed(len, 4096)?))
}
const PIECE: usize = 64 << 10;

/// Copies all bytes, each changed by `change`.
fn copy(from: &Segments, to: &Segments, change: impl Fn(u8) -> u8) {
    let mut bytes = vec![0; from.len()];
    from.copy_to(&mut bytes);
    for byte in &mut bytes {
        *byte = change(*byte);
    }
    to.copy_from(&bytes);
}

// A byte of zeroes stays one, so that what has to do with zeroes alone is the file's own.
impl Disk for Turned {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read(&self, mut offset: u64, mut to: Segments) -> Pending<'_> {
        Box::pin(async move {
            while !to.is_empty() {
                let part = to.split_to(PIECE);
                let turned = piece(part.len())?;
                self.file.read(offset, turned.clone()).await?;
                copy(&turned, &part, |byte| byte.rotate_right(self.places));
                offset += part.len() as u64;
            }
            Ok(())
        })
    }

    fn write(&self, mut offset: u64, mut from: Segments) -> Pending<'_> {
        Box::pin(async move {
            while !from.is_empty() {
                let part = from.split_to(PIECE);
                let turned = piece(part.len())?;
                copy(&part, &turned, |byte| byte.rotate_left(self.places));
                self.file.write(offset, turned).await?;
                offset += part.len() as u64;
            }
            Ok(())
        })
    }

    fn flush(&self) -> Pending<'_> {
        Box::pin(self.file.flush())
    }

    fn volatile(&self) -> bool {
        false
    }

    fn discard(&self, offset: u64, len: u64) -> Pending<'_> {
        Box::pin(self.file.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Pending<'_> {
        Box::pin(self.file.write_zeroes(offset, len, unmap))
    }

    fn resize(&self, size: u64) -> Pending<'_> {
        Box::pin(self.file.resize(size))
    }

    fn close(self: Box<Self>) -> Pending<'static> {
        Box::pin(async move { self.flush().await })
    }
}

fn main() -> ExitCode {
    let code = launcher::cli::run(std::env::args_os()).unwrap_or_else(|error| {
        // Nobody is left to tell if standard error is gone.
        let _ = writeln!(io::stderr(), "{error}");
        error.exit
    });
    ExitCode::from(code)
}
