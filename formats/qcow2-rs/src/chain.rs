//! Opening an image and its backing files.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use formats::qcow2::Header;
use formats::qcow2::header::MAX_HEADER;
use formats::{Buffer, HostFile, Image, OpenError, Ring, Segments};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::meta::Qcow2Header;

use crate::bounce::Bounce;
use crate::caches::{self, Caches};
use crate::health::Health;
use crate::io::{Io, Places};
use crate::subset;
use crate::survey::{self, count, survey, unreadable};

/// The most images that may be based on one another.
const MOST_IMAGES: usize = 16;

/// An image of a chain that has been found good.
struct Link {
    file: HostFile,
    header: Header,
    caches: Caches,
    writable: bool,
}

/// The images of a chain as the crate has them open.
pub(crate) struct Chain {
    pub(crate) dev: Qcow2Dev<Io>,
    /// The image's own first.
    pub(crate) ios: Vec<Io>,
    pub(crate) header: Header,
    pub(crate) bounce: Rc<Bounce>,
    pub(crate) health: Rc<Health>,
    /// What transfers must be multiples of, in bytes.
    pub(crate) block: u32,
}

/// Opens an image that exists with the backing files that the configuration names.
pub(crate) async fn open(ring: &Ring, image: &Image) -> Result<Chain, OpenError> {
    let top = read(ring, image).await?;
    fits_block_size(image, &top.1).map_err(|error| of(&image.path, error))?;
    let mut files = vec![top];
    while let Some((parent, at)) = next(image, &files)? {
        let backing = Image {
            path: parent,
            ro: true,
            size: None,
            ..image.clone()
        };
        let opened = read(ring, &backing).await.map_err(|error| OpenError {
            key: match error.key {
                "path" => "backing",
                other => other,
            },
            ..error
        })?;
        covers(&files[at], &opened)?;
        files.push(opened);
    }
    let block = files.iter().map(|(file, _)| file.alignment()).max();
    let block = block.unwrap_or(1).max(512);
    if block > 4096 {
        return Err(OpenError {
            message: format!("O_DIRECT takes no less than {block} bytes, expected at most 4096"),
            help: Some("set `o_direct = false`".into()),
            key: "o_direct",
        });
    }
    let mut links = Vec::new();
    for (index, (file, header)) in files.into_iter().enumerate() {
        let writable = index == 0 && !image.ro;
        let path = file.path().to_owned();
        let link = link(file, header, writable, block.ilog2() as u8).await;
        links.push(link.map_err(|error| of(&path, error))?);
    }
    let total = links.iter().map(|link| link.caches.total).sum();
    caches::within_most(total).map_err(|error| of(&image.path, error))?;
    assemble(image, links, block).await
}

/// Names the image that an error is about.
fn of(path: &Path, error: OpenError) -> OpenError {
    OpenError {
        message: format!("`{}` cannot be used: {}", path.display(), error.message),
        ..error
    }
}

/// Opens one file, and reads and checks its header.
async fn read(ring: &Ring, image: &Image) -> Result<(HostFile, Header), OpenError> {
    let file = HostFile::open(ring, image)?;
    let header = header(&file, image).await;
    let header = header.map_err(|error| of(&image.path, error))?;
    Ok((file, header))
}

async fn header(file: &HostFile, image: &Image) -> Result<Header, OpenError> {
    let memory = Buffer::zeroed(MAX_HEADER, 4096).map_err(|error| unreadable(&error))?;
    let head = Segments::from_buffer(memory);
    let filled = file.read_zero_filled(0, head.clone()).await;
    filled.map_err(|error| unreadable(&error))?;
    let mut bytes = vec![0; file.size().min(MAX_HEADER as u64) as usize];
    head.copy_to(&mut bytes);
    let header = Header::parse(&bytes).map_err(|refusal| OpenError {
        message: refusal.message,
        help: refusal.help,
        key: "path",
    })?;
    subset::check(&header, image.ro)?;
    Ok(header)
}

fn fits_block_size(image: &Image, header: &Header) -> Result<(), OpenError> {
    let (size, block_size) = (header.size, image.block_size);
    match size.is_multiple_of(block_size.into()) {
        true => Ok(()),
        false => Err(OpenError {
            message: format!(
                "`block_size` is {block_size}, but its size is {size}, no multiple of it"
            ),
            help: Some("choose a smaller `block_size`".into()),
            key: "block_size",
        }),
    }
}

/// The backing file of the last image, which the configuration must name, and that image's index.
fn next(
    image: &Image,
    files: &[(HostFile, Header)],
) -> Result<Option<(PathBuf, usize)>, OpenError> {
    let approved: Vec<&PathBuf> = image.backing.iter().collect();
    let at = files.len() - 1;
    let Some((file, header)) = files.last() else {
        return Ok(None);
    };
    let path = file.path();
    let Some(name) = &header.backing_file else {
        return match approved.get(at) {
            None => Ok(None),
            Some(more) => Err(OpenError {
                message: format!(
                    "`backing` names `{}`, but `{}` has no backing file",
                    more.display(),
                    path.display()
                ),
                help: Some("take it out of `backing`".into()),
                key: "backing",
            }),
        };
    };
    let named = path.parent().unwrap_or(Path::new("")).join(name);
    if files.len() >= MOST_IMAGES {
        return Err(OpenError {
            message: format!(
                "`{}` has more than {MOST_IMAGES} images in its chain",
                image.path.display()
            ),
            help: Some("merge some with `qemu-img commit` or `qemu-img rebase`".into()),
            key: "backing",
        });
    }
    match approved.get(at) {
        Some(approved) if same(approved, &named) => Ok(Some(((*approved).clone(), at))),
        other => Err(OpenError {
            message: match other {
                Some(other) => format!(
                    "`backing` is `{}`, but `{}` is based on `{}`",
                    other.display(),
                    path.display(),
                    named.display()
                ),
                None => format!(
                    "`{}` has the backing file `{}`, which the configuration does not name",
                    path.display(),
                    named.display()
                ),
            },
            help: Some(match at {
                0 => format!("add `backing = \"{}\"` if that is right", named.display()),
                _ => format!("add `{}` to `backing` if that is right", named.display()),
            }),
            key: "backing",
        }),
    }
}

/// Whether two paths are of one file.
fn same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or(path.to_owned());
    one == other || real(one) == real(other)
}

/// Refuses a backing file that ends before the last cluster of the image over it does.
fn covers(
    (over, header): &(HostFile, Header),
    (file, under): &(HostFile, Header),
) -> Result<(), OpenError> {
    let wanted = header.size.next_multiple_of(header.cluster_size());
    match under.size < wanted {
        true => Err(of(
            file.path(),
            subset::beyond(format!(
                "its size is {} bytes, expected {wanted} or more as the backing file of `{}`",
                under.size,
                over.path().display()
            )),
        )),
        false => Ok(()),
    }
}

/// Checks all tables of an image.
async fn link(
    file: HostFile,
    header: Header,
    writable: bool,
    block_bits: u8,
) -> Result<Link, OpenError> {
    // Before the tables are read: they are refused if they are too many.
    Caches::of(&header, block_bits, None)?;
    let mut usage = survey(&file, &header, writable).await?;
    if writable {
        count(&file)?;
    }
    if writable && usage.kept > 0 {
        survey::fill_kept(&file, &header).await?;
        usage = survey(&file, &header, writable).await?;
    }
    let caches = Caches::of(&header, block_bits, writable.then_some(usage))?;
    // So that no transfer at the end of the file is less than O_DIRECT takes.
    let whole = usage.file << header.cluster_bits;
    if writable && !file.is_device() && file.size() < whole {
        file.resize(whole)
            .await
            .map_err(|error| unreadable(&error))?;
    }
    Ok(Link {
        file,
        header,
        caches,
        writable,
    })
}

/// Hands the chain to the crate, from its end.
async fn assemble(image: &Image, links: Vec<Link>, block: u32) -> Result<Chain, OpenError> {
    let failed = |message: String| OpenError {
        message: format!("`{}`: {message}", image.path.display()),
        help: None,
        key: OpenError::HOST,
    };
    let header = links.first().map(|link| link.header.clone());
    let header = header.ok_or_else(|| failed("no image".into()))?;
    let bounce = Bounce::new(header.cluster_size() as usize);
    let bounce = bounce.map_err(|error| failed(error.to_string()))?;
    let health = Rc::new(Health::new(image.path.clone()));
    let mut ios = Vec::new();
    let mut under: Option<Qcow2Dev<Io>> = None;
    for (index, link) in links.into_iter().enumerate().rev() {
        let params = Qcow2DevParams::new(
            block.ilog2() as u8,
            Some(link.caches.refcounts),
            Some(link.caches.l2),
            !link.writable,
            image.o_direct,
        );
        if index > 0 {
            params.mark_backing_dev(Some(true));
        }
        let path = link.file.path().to_owned();
        let places = Places::of(&link.header, link.caches.refcounts.0);
        let io = Io::new(link.file, link.writable, places, &bounce, &health);
        ios.insert(0, io.clone());
        let parsed = Qcow2Header::from_buf(&canonical(&link.header, under.is_some()));
        let dev = parsed.and_then(|header| Qcow2Dev::new(&path, header, &params, io));
        let mut dev = dev.map_err(|error| failed(error.to_string()))?;
        if let Some(under) = under.take() {
            dev.set_backing_dev(Box::new(under));
        }
        under = Some(dev);
    }
    let dev = under.ok_or_else(|| failed("no image".into()))?;
    let prepared = dev.qcow2_prep_io().await;
    prepared.map_err(|error| failed(error.to_string()))?;
    Ok(Chain {
        dev,
        ios,
        header,
        bounce,
        health,
        block,
    })
}

/// A header for the crate that says what it needs to know of one that we have read. It is kept in
/// memory alone, and spares the crate the extensions, whose lengths it trusts.
fn canonical(header: &Header, backing: bool) -> Vec<u8> {
    const NAME: (u64, &[u8]) = (128, b"backing");
    let mut bytes = vec![0; 4096];
    let mut put = |offset: usize, value: &[u8]| {
        if let Some(place) = bytes.get_mut(offset..offset + value.len()) {
            place.copy_from_slice(value);
        }
    };
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    if backing {
        put(8, &NAME.0.to_be_bytes());
        put(16, &(NAME.1.len() as u32).to_be_bytes());
        put(NAME.0 as usize, NAME.1);
    }
    put(20, &header.cluster_bits.to_be_bytes());
    put(24, &header.size.to_be_bytes());
    put(36, &header.l1_size.to_be_bytes());
    put(40, &header.l1_table_offset.to_be_bytes());
    put(48, &header.refcount_table_offset.to_be_bytes());
    put(56, &header.refcount_table_clusters.to_be_bytes());
    put(96, &header.refcount_order.to_be_bytes());
    put(100, &112u32.to_be_bytes());
    bytes
}
