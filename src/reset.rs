//! Taking a disk back to its base: its overlay becomes a new, empty one.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use formats::qcow2::header::{MAX_HEADER, compatible, incompatible};
use formats::qcow2::{CreateOptions, Header, Preallocation, create};
use formats::{HostFile, Image, OpenError, Ring};

use crate::config::Block;
use crate::{Error, Result, durable};

/// What resetting a disk does.
#[derive(Debug)]
pub(crate) enum Plan {
    /// Nothing, for this reason.
    Leave(&'static str),
    /// Its overlay goes.
    Drop(Box<Overlay>),
}

/// An overlay that is to go.
#[derive(Debug)]
pub(crate) struct Overlay {
    /// The image, no symbolic link.
    path: PathBuf,
    image: Image,
    header: Header,
}

impl Plan {
    /// What resetting a disk would do now. Nothing is changed.
    ///
    /// # Errors
    ///
    /// The image cannot be read, or is no overlay over what `backing` names.
    pub(crate) fn of(block: &Block) -> Result<Plan, OpenError> {
        if block.is_served() {
            return Ok(Plan::Leave("another process serves it, and has its image"));
        }
        if block.ro {
            return Ok(Plan::Leave("it is read-only"));
        }
        if block.ephemeral {
            return Ok(Plan::Leave("it is ephemeral, and as it was at every start"));
        }
        if block.backing.is_empty() {
            return Ok(Plan::Leave("it has no `backing` to go back to"));
        }
        if !matches!(&*block.format, "qcow2" | "qcow2-rs") {
            return Ok(Plan::Leave("only qcow2 overlays can be reset"));
        }
        let image = block.image();
        let unreadable = |error: io::Error| OpenError {
            key: OpenError::key_of(&error),
            ..failed("read", &image.path, &error)
        };
        let meta = match fs::metadata(&image.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Plan::Leave("it is not there: the next start creates it"));
            }
            meta => meta.map_err(unreadable)?,
        };
        if meta.file_type().is_block_device() {
            return Ok(Plan::Leave("it is a block device, and no file"));
        }
        if !meta.is_file() {
            let message = format!("`{}` is no file", image.path.display());
            return Err(wrong("path", message, None));
        }
        let path = fs::canonicalize(&image.path).map_err(unreadable)?;
        let mut file = File::open(&path).map_err(unreadable)?;
        let header = header(&mut file, &image)?;
        if header.has(incompatible::DATA_FILE) {
            return Ok(Plan::Leave("what it holds is in an external data file"));
        }
        check_base(&image, &header)?;
        if !block.lock {
            let message = format!(
                "`{}` is the image of a disk with `lock = false`: nothing tells whether a VM uses \
                 it",
                image.path.display()
            );
            let help = "remove the image yourself: the next start creates it";
            return Err(wrong("lock", message, Some(help)));
        }
        Ok(Plan::Drop(Box::new(Overlay {
            path,
            image,
            header,
        })))
    }
}

/// A base may be exchanged for another by mistake: then the overlay is not this VM's to drop.
fn check_base(image: &Image, header: &Header) -> Result<(), OpenError> {
    let path = image.path.display();
    let Some(named) = &header.backing_file else {
        let message = format!("`{path}` is no overlay: it has no backing file");
        let help = "take `backing` out, or remove the image: the next start creates the overlay";
        return Err(wrong("backing", message, Some(help)));
    };
    let name = named.as_bytes();
    let name = Path::new(OsStr::from_bytes(
        name.strip_prefix(b"file:").unwrap_or(name),
    ));
    let folder = image.path.parent().unwrap_or(Path::new(""));
    let base = image.backing.first().map(PathBuf::as_path);
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    match (base.map(identity), identity(&folder.join(name))) {
        (Some(Ok(base)), Ok(named)) if base == named => Ok(()),
        (Some(Err(error)), _) => {
            let base = image.backing.first().map_or(Path::new(""), |base| base);
            let error = failed("look at", base, &error);
            Err(wrong("backing", error.message, None))
        }
        _ => {
            let (base, named) = (base.unwrap_or(Path::new("")).display(), name.display());
            let message = format!("`backing` is `{base}`, but `{path}` is based on `{named}`");
            let help = "if the overlay is to go, remove it: the next start creates it";
            Err(wrong("backing", message, Some(help)))
        }
    }
}

fn header(file: &mut File, image: &Image) -> Result<Header, OpenError> {
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.take(MAX_HEADER as u64).read_to_end(&mut bytes))
        .map_err(|error| failed("read", &image.path, &error))?;
    Header::parse(&bytes).map_err(|refusal| OpenError {
        message: format!(
            "`{}` cannot be used: {}",
            image.path.display(),
            refusal.message
        ),
        help: refusal.help,
        key: "path",
    })
}

impl Overlay {
    /// Where it is, as the configuration has it.
    pub(crate) fn path(&self) -> &Path {
        &self.image.path
    }

    /// What it is over.
    pub(crate) fn base(&self) -> &Path {
        self.image
            .backing
            .first()
            .map_or(Path::new(""), |path| path)
    }

    /// Bytes that it takes on the host.
    pub(crate) fn host_size(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |meta| meta.blocks().saturating_mul(512))
    }

    /// How many internal snapshots would go with it.
    pub(crate) fn snapshots(&self) -> u32 {
        self.header.nb_snapshots
    }

    /// Takes its lock, and prepares the new image beside it.
    ///
    /// # Errors
    ///
    /// Somebody uses it; the new image cannot be created.
    pub(crate) fn prepare(self, ring: &Ring) -> Result<Exchange, OpenError> {
        let locked = Image {
            path: self.path.clone(),
            ro: false,
            lock: true,
            o_direct: false,
            ..self.image.clone()
        };
        let held = HostFile::open(ring, &locked)?;
        // Under the lock it does not change any more. Nobody has been asked about anything else.
        let unreadable = |error| failed("read", &self.image.path, &error);
        let mut file = File::open(&self.path).map_err(unreadable)?;
        let old = file.metadata().map_err(unreadable)?;
        let header = header(&mut file, &self.image)?;
        let about = |header: &Header| (header.nb_snapshots, header.backing_file.clone());
        if about(&header) != about(&self.header) {
            let message = format!("`{}` has changed meanwhile", self.image.path.display());
            return Err(wrong(
                OpenError::HOST,
                message,
                Some("look at it, and try again"),
            ));
        }
        let mut fresh = self.path.file_name().unwrap_or_default().to_owned();
        fresh.push(".reset");
        let mut name = std::ffi::OsString::from(".");
        name.push(fresh);
        let fresh = self.path.with_file_name(name);
        // Left by one who was killed: the lock says that nobody else is at it.
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &fresh, &error));
            }
            _ => {}
        }
        let exchange = Exchange {
            path: self.path.clone(),
            fresh: Some(fresh.clone()),
            _held: held,
        };
        create(&fresh, &self.options(&header)?)?;
        dress(&fresh, &old).map_err(|error| failed("create", &fresh, &error))?;
        Ok(exchange)
    }

    /// The new image: as the old one was made, of the size that the VM's file has.
    fn options(&self, old: &Header) -> Result<CreateOptions, OpenError> {
        let image = Image {
            path: self.path.clone(),
            size: Some(self.image.size.unwrap_or(old.size)),
            options: Vec::new(),
            ..self.image.clone()
        };
        Ok(CreateOptions {
            version: old.version,
            cluster_bits: old.cluster_bits,
            refcount_order: old.refcount_order,
            extended_l2: old.has(incompatible::EXTENDED_L2),
            compression: old.compression,
            lazy_refcounts: old.compatible_features & compatible::LAZY_REFCOUNTS != 0,
            preallocation: Preallocation::Off,
            ..CreateOptions::from_image(&image)?
        })
    }
}

/// Gives a new image the owner and the mode of the old one, durably.
fn dress(fresh: &Path, old: &Metadata) -> io::Result<()> {
    let file = File::options().write(true).open(fresh)?;
    durable::like(&file, old)?;
    file.sync_all()
}

/// An old image under its lock, and the new one beside it, which goes again unless it takes the
/// old one's place.
pub(crate) struct Exchange {
    path: PathBuf,
    fresh: Option<PathBuf>,
    _held: HostFile,
}

impl Exchange {
    /// Puts the new image in the old one's place, at once.
    ///
    /// # Errors
    ///
    /// The host refuses: the old image is still there.
    pub(crate) fn finish(mut self) -> Result<()> {
        if let Some(fresh) = &self.fresh {
            fs::rename(fresh, &self.path).map_err(|error| {
                let path = self.path.display();
                Error::failed(format!("cannot replace `{path}`: {error}"))
                    .help("the disk is as it was")
            })?;
        }
        self.fresh = None;
        durable::synchronise_folder(&self.path);
        Ok(())
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(fresh) = &self.fresh {
            let _ = fs::remove_file(fresh);
        }
    }
}

fn wrong(key: &'static str, message: String, help: Option<&str>) -> OpenError {
    OpenError {
        message,
        help: help.map(str::to_owned),
        key,
    }
}

fn failed(what: &str, path: &Path, error: &io::Error) -> OpenError {
    wrong(
        OpenError::HOST,
        format!("cannot {what} `{}`: {error}", path.display()),
        None,
    )
}
