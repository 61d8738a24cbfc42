//! Disks: `[[block]]`.

mod backing;
mod served;

use std::collections::HashMap;
use std::hash::Hash;
use std::path::{Path, PathBuf};

use formats::{Image, OptionValue};

use super::diagnostic::{Diagnostic, shortened};
use super::host_file::{self, HostFile, Origin};
use super::image_format::{self, Written};
use super::kinds::{
    Argument, BlockSize, DiskSize, FilePath, FormatName, HostCpu, Id, Micros, Queues, Sha256, Url,
};
use super::options::{Given, Key, Table, default, derived, files, list, optional, options};
use super::resolved::{self, Held};
use super::section::{Context, Section};
use crate::digest::Digest;

pub use served::VHOST_USER;

options! {
    /// A disk.
    pub struct Block, read as GivenBlock {
        /// The image: a file or a host block device.
        path: PathBuf = derived::<FilePath>("must be written, or `url` or `vhost_user`"),
        /// Instead of an image: the socket of a process that serves the disk, over vhost-user-blk,
        /// as `launcher disk serve` does. The image's options are for that process; only `root`,
        /// `ro` and `queues` may be written here, and must agree with what is served. Guest memory
        /// is shared with the process then.
        vhost_user: Option<PathBuf> =
            optional::<FilePath>("the image is opened here").example("\"disk.sock\""),
        /// Format of the image; `launcher formats` lists them. It is never guessed from content.
        format: String =
            derived::<FormatName>("the one that the extension of `path` or `url` stands for"),
        /// Read-only.
        ro: bool = default::<bool>("false"),
        /// The guest's root file system: adds `root=/dev/vdX ro|rw` to the kernel parameters.
        /// At most one disk.
        root: bool = default::<bool>("false"),
        /// true: thin, space that the guest discards is freed. false: fully allocated at start,
        /// no discard.
        sparse: bool = default::<bool>("true").example("false"),
        /// O_DIRECT: the host's page cache is passed by.
        o_direct: bool = default::<bool>("false"),
        /// Logical block size in bytes.
        block_size: u32 = default::<BlockSize>("512"),
        /// Serial number, as the guest sees it in `/sys/block/vdX/serial`.
        id: Option<String> = optional::<Id>("none"),
        /// Locks the image against a second writer; QEMU honours these locks too.
        lock: bool = default::<bool>("true").example("false"),
        /// Number of virtqueues.
        queues: u16 = default::<Queues>("1"),
        /// Longest time in microseconds that the disk's thread looks for requests before it sleeps.
        /// It does so only as long as requests come that soon, and leaves the processor to others
        /// that want it. 0: never.
        poll_us: Option<u16> = optional::<Micros>("50"),
        /// CPUs of the host that the disk's thread runs on.
        cpus: Vec<u16> = list::<HostCpu>("any"),
        /// Size of the image: created if absent, grown if smaller, refused if larger.
        size: Option<u64> = optional::<DiskSize>("as the image is; it must exist"),
        /// Backing file of the image, or its chain of them in order. One that the image's header
        /// names is opened only if it is named here too; an image that is created becomes an
        /// overlay over the first. They are never written.
        backing: Vec<HostFile> = files("none").example("\"base.qcow2\""),
        /// The image is never written: changes go to a temporary file beside it that has no name,
        /// and vanish at exit. A larger `size` is then that of the disk, not of the image.
        ephemeral: bool = default::<bool>("false"),
        /// SHA-256 of the image: one that differs is not used. Only where the guest does not
        /// write it, with `ro` or `ephemeral`.
        sha256: Option<Digest> = optional::<Sha256>("any content will do"),
        /// Where the image is fetched from, once, if the cache has not got it; as `url` of a host
        /// file.
        url: Option<String> = optional::<Url>("it is not fetched"),
        /// Command that makes the image if it is not there; as `build` of a host file.
        build: Vec<String> = list::<Argument>("it is not built"),
    }
    computed {
        /// The folder of the TOML file that names the image.
        folder: PathBuf,
        /// Whether `format` was written out.
        format_written: bool,
        /// Options of the format's own table.
        options: Vec<(&'static str, OptionValue)>,
    }
}

impl Block {
    /// The image, and how its format opens it.
    pub fn image(&self) -> Image {
        Image {
            path: self.path.clone(),
            ro: self.ro,
            sparse: self.sparse,
            o_direct: self.o_direct,
            block_size: self.block_size,
            lock: self.lock,
            size: self.size,
            backing: self.backing.iter().map(|file| file.path.clone()).collect(),
            format_written: self.format_written,
            options: self.options.clone(),
        }
    }

    /// As with `ephemeral = true`, unless it is read-only: that it is not to be sparse means
    /// nothing then.
    pub(super) fn make_ephemeral(&mut self) {
        if self.ro {
            return;
        }
        self.ephemeral = true;
        self.sparse = true;
        if image_format::is_raw(&self.format) {
            self.format = formats::raw_for(true).to_owned();
        }
    }
}

impl Block {
    /// The image as a file of the host.
    pub fn file(&self) -> HostFile {
        HostFile {
            path: self.path.clone(),
            sha256: self.sha256,
            url: self.url.clone(),
            build: self.build.clone(),
            folder: self.folder.clone(),
        }
    }
}

impl Table for Block {
    const KEYS: &'static [Key] = Block::KEYS;

    fn more(&self) -> Vec<Held> {
        resolved::of_format(self)
    }

    fn from_section(section: Section<'_>) -> Option<Self> {
        Block::from_sections(vec![section])?.pop()
    }

    fn from_sections(mut sections: Vec<Section<'_>>) -> Option<Vec<Self>> {
        let given = sections.iter_mut().map(GivenBlock::placed);
        let given: Vec<_> = given.collect();
        if let Some(section) = sections.first() {
            relations(section.cx, &given);
        }
        let blocks: Vec<_> = given
            .into_iter()
            .zip(sections)
            .map(|(given, section)| given.resolve(section))
            .collect();
        blocks.into_iter().collect()
    }
}

/// Reports what two disks cannot both be.
fn relations(cx: &Context<'_>, given: &[GivenBlock]) {
    let root = |block: &GivenBlock| block.root.value.filter(|root| *root);
    twice(
        cx,
        given,
        |block| &block.root,
        root,
        |_| "`root` is true on two disks, expected one root file system".to_owned(),
    );
    let id = |block: &GivenBlock| block.id.value.clone().flatten();
    twice(
        cx,
        given,
        |block| &block.id,
        id,
        |id| format!("`id` is \"{id}\" on two disks, expected another on each"),
    );
    twice(
        cx,
        given,
        |block| &block.path,
        GivenBlock::writable,
        |path| {
            let path = shortened(&path.display().to_string());
            format!("`path` is {path} on two writable disks, expected one")
        },
    );
    let socket = |block: &GivenBlock| block.vhost_user.value.clone().flatten();
    twice(
        cx,
        given,
        |block| &block.vhost_user,
        socket,
        |socket| {
            let socket = shortened(&socket.display().to_string());
            format!("`vhost_user` is {socket} on two disks, expected another socket for each")
        },
    );
    backing::written_by_another(cx, given);
}

/// Reports each disk of which an earlier one has the same `what`, with both places.
fn twice<'a, T, U: Hash + Eq>(
    cx: &Context<'_>,
    given: &'a [GivenBlock],
    option: impl Fn(&'a GivenBlock) -> &'a Given<T>,
    what: impl Fn(&'a GivenBlock) -> Option<U>,
    title: impl Fn(&U) -> String,
) where
    T: 'a,
{
    let mut first = HashMap::new();
    for block in given {
        let Some(what) = what(block) else { continue };
        let at = option(block).at.clone();
        match first.get(&what) {
            None => drop(first.insert(what, at)),
            Some(first) => cx.report(
                Diagnostic::value(at, title(&what)).related(Clone::clone(first), "first here"),
            ),
        }
    }
}

impl GivenBlock {
    /// Reads a disk whose image has its place.
    fn placed(section: &mut Section<'_>) -> Self {
        let mut given = GivenBlock::read(section);
        if given.vhost_user.at.is_some() {
            given.stands_alone(section.cx);
            given.path.at.clone_from(&given.vhost_user.at);
            given.path.value = given.vhost_user.value.clone().flatten();
            return given;
        }
        if given.origin().is_nowhere() {
            section.missing("path", "\"disk.img\"");
        }
        given.digest_is_of_what_stays(section.cx);
        given.origin().locate(section.cx);
        given
    }

    fn origin(&mut self) -> Origin<'_> {
        Origin {
            path: &mut self.path,
            sha256: &self.sha256,
            url: &self.url,
            build: &self.build,
        }
    }

    /// What the guest writes has no digest for long.
    fn digest_is_of_what_stays(&self, cx: &Context<'_>) {
        let (key, at) = match (&self.sha256.at, &self.url.at) {
            (at @ Some(_), _) => ("sha256", at),
            (None, at @ Some(_)) => ("url", at),
            (None, None) => return,
        };
        if (self.ro.value, self.ephemeral.value) != (Some(false), Some(false)) {
            return;
        }
        let title = format!("`{key}` is given on a disk that the guest writes, expected none");
        let mut wrong = Diagnostic::value(at.clone(), title);
        for other in [&self.ro, &self.ephemeral] {
            wrong = wrong.related(other.at.clone(), "and this");
        }
        let help = match key {
            "url" => {
                "what is fetched is shared: add `ephemeral = true` or `ro = true`, or give it \
                      to `backing` of an overlay"
            }
            _ => "the guest changes it: add `ephemeral = true` or `ro = true`, or remove `sha256`",
        };
        cx.report(wrong.help(help.to_owned()));
    }

    /// The image, if the guest's writes reach it.
    fn writable(&self) -> Option<&Path> {
        let path = self.path.value.as_deref();
        let path = path.filter(|_| self.vhost_user.at.is_none());
        path.filter(|_| (self.ro.value, self.ephemeral.value) == (Some(false), Some(false)))
    }

    /// Fills in what follows from other options, and reports those that contradict each other.
    fn resolve(mut self, mut section: Section<'_>) -> Option<Block> {
        if self.vhost_user.at.is_some() {
            return self.resolve_served(section);
        }
        let cx = section.cx;
        self.size_in_blocks(cx);
        self.ephemeral_is_writable_and_thin(cx);
        backing::names_a_file_twice(cx, &self);
        let format = image_format::resolve(
            cx,
            &Written {
                key: match self.url.at {
                    Some(_) => "url",
                    None => "path",
                },
                path: &self.path,
                format: &self.format,
                sparse: &self.sparse,
            },
        );
        if let Some(format) = &format {
            backing::fits_the_format(cx, &self, format);
        }
        let tables = image_format::tables(&mut section, format.as_ref());
        unknown(section);
        let written = self.format.at.is_some();
        self.format.value = Some(format?.name.to_owned());
        let at = self.build.at.as_ref().or(self.path.at.as_ref());
        let folder = host_file::folder(cx, at);
        self.finish(folder, written, tables?)
    }

    /// Nothing of an ephemeral disk is worth while that is not written, or allocated ahead.
    fn ephemeral_is_writable_and_thin(&self, cx: &Context<'_>) {
        if self.ephemeral.value != Some(true) {
            return;
        }
        let contradiction = |title: &str, other: &Given<bool>, help: &str| {
            cx.report(
                Diagnostic::value(self.ephemeral.at.clone(), title)
                    .related(other.at.clone(), "and this")
                    .help(help.to_owned()),
            );
        };
        if self.ro.value == Some(true) {
            contradiction(
                "`ephemeral` is true on a disk with `ro = true`, expected one of them",
                &self.ro,
                "neither writes the image; remove `ro` if the guest is to write",
            );
        }
        if self.sparse.value == Some(false) {
            contradiction(
                "`ephemeral` is true on a disk with `sparse = false`, expected one of them",
                &self.sparse,
                "nothing is allocated for an image that is never written; remove `sparse`",
            );
        }
    }

    /// A declared size is whole blocks.
    fn size_in_blocks(&self, cx: &Context<'_>) {
        if let (Some(Some(size)), Some(block_size)) = (self.size.value, self.block_size.value)
            && !size.is_multiple_of(block_size.into())
        {
            let title = format!("`size` is {size} bytes, expected a multiple of `block_size`");
            cx.report(
                Diagnostic::value(self.size.at.clone(), title)
                    .related(self.block_size.at.clone(), "the block size"),
            );
        }
    }
}

/// Reports the keys that neither a disk nor a format has.
fn unknown(section: Section<'_>) {
    let mut names: Vec<_> = Block::KEYS.iter().map(|key| key.name).collect();
    let mut spelled: Vec<_> = Block::KEYS.iter().map(Key::spelled).collect();
    let formats = section.cx.formats.iter();
    for format in formats.filter(|format| !format.options.is_empty()) {
        names.push(format.name);
        spelled.push(format!("[block.{}]", format.name));
    }
    section.unknown_of(&names, &spelled);
}
