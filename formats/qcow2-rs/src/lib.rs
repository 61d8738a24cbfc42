//! The crate [`qcow2_rs`] as a format of the crate [`formats`]: a second engine for qcow2 images,
//! beside the one of that crate. A program that names this crate has it:
//!
//! ```
//! use formats_qcow2_rs as _;
//!
//! assert!(formats::find("qcow2-rs").is_some());
//! ```
//!
//! In a release build it silences the facade `log` for the whole program: `qcow2-rs` depends on
//! `log` with the feature `release_max_level_off`, which is compiled into the one `log` that all
//! crates of the program share.
//!
//! # What is kept from the crate, and what is kept from happening
//!
//! The crate proved right in a subset of what it offers. This one lets in no more ([`Format`]'s
//! errors say what is missing, and how to go on), and asks it in ways it is right with:
//!
//! - All I/O is the ring's. What the crate is told of the host is whole, and in the order that
//!   leaves the image whole at a power cut: it has no barrier of its own between data or the
//!   refcount table and the L2 tables that need them.
//! - No table is ever evicted from its caches: eviction loses some. So an image is refused whose
//!   tables may come to need more than 64 MiB, or to outgrow its refcount table, which the crate
//!   deadlocks over when it makes it larger. L2 tables are cached whole: of those in slices it
//!   zeroes the ones that it wrote when it copied a cluster.
//! - It gets one cluster at a time. For longer requests it hides errors of reads.
//! - A cluster that is being allocated is nobody else's meanwhile, and while tables are written
//!   out none is allocated.
//! - The header that it gets is one that we made from what we read. It never writes one.
//! - After an error of the host amid metadata nothing is written any more: the crate takes what
//!   it failed to write for written, and what it failed to read for read.
//! - It panics if it is dropped with tables that are not written; so they are, or it is not.

mod bounce;
mod caches;
mod chain;
mod disk;
mod exclusion;
mod health;
mod io;
mod subset;
mod survey;

use std::io::ErrorKind;

use formats::qcow2::{self, CreateOptions};
use formats::{Disk, Format, FormatOption, Image, OpenError, OptionKind, Ring};

use disk::Qcow2Rs;

inventory::submit! {
    Format {
        name: "qcow2-rs",
        extensions: &[],
        description: "qcow2 by the crate qcow2-rs: the plain ones, without discard and resize",
        abilities: &["backing"],
        options: &[FormatOption {
            name: "cluster_size",
            kind: OptionKind::Size,
            default: "\"64KiB\"",
            doc: "Unit of allocation of a new image: a power of two, 4KiB to 1MiB; by default \
                  more than 64KiB where the tables of a disk would be too large.",
        }],
        open: |ring, image| Box::pin(open(ring, image)),
        create,
    }
}

/// The image is made by our own engine, as one that this one can do all its life.
fn create(image: &Image) -> Result<(), OpenError> {
    full_allocation(image)?;
    let mut options = CreateOptions::from_image(image)?;
    if let Some(backing) = options.backing.as_ref().filter(|it| it.format != "qcow2") {
        return Err(OpenError {
            message: format!(
                "the `backing` file has the format {:?}, but format \"qcow2-rs\" takes qcow2 alone",
                backing.format
            ),
            help: Some("set `format = \"qcow2\"`".into()),
            key: "backing",
        });
    }
    if image
        .options
        .iter()
        .all(|(name, _)| *name != "cluster_size")
    {
        options.cluster_bits = caches::cluster_bits_for(options.size);
    }
    qcow2::create(&image.path, &options)
}

fn full_allocation(image: &Image) -> Result<(), OpenError> {
    match image.sparse {
        true => Ok(()),
        false => Err(OpenError {
            message: "`sparse` is false, but format \"qcow2-rs\" allocates only what is written"
                .into(),
            help: Some("leave `sparse` out, or set `format = \"qcow2\"`".into()),
            key: "sparse",
        }),
    }
}

async fn open(ring: &Ring, image: &Image) -> Result<Box<dyn Disk>, OpenError> {
    full_allocation(image)?;
    let missing =
        std::fs::metadata(&image.path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    let created = missing && !image.ro && (image.size.is_some() || !image.backing.is_empty());
    if created {
        create(image)?;
    }
    let opened = open_existing(ring, image).await;
    if created && opened.is_err() {
        // It has not been there, and nobody else can have come to use it as something else.
        let _ = std::fs::remove_file(&image.path);
    }
    opened
}

async fn open_existing(ring: &Ring, image: &Image) -> Result<Box<dyn Disk>, OpenError> {
    let chain = chain::open(ring, image).await?;
    let has = chain.header.size;
    match image.size {
        Some(size) if size != has => Err(OpenError {
            message: format!(
                "`size` is {size}, but `{}` has {has} bytes, and format \"qcow2-rs\" does not \
                 resize",
                image.path.display(),
            ),
            help: Some(match size > has {
                true => "leave `size` out, or set `format = \"qcow2\"` to grow it".into(),
                false => "leave `size` out to use all of it".into(),
            }),
            key: "size",
        }),
        _ => Ok(Box::new(Qcow2Rs::new(ring, chain, image.ro))),
    }
}
