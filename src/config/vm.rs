//! The VM as a whole, and its small tables.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;
use toml::de::DeValue;

use super::block::Block;
use super::diagnostic::{Diagnostic, shortened};
use super::host_file::HostFile;
use super::kinds::{Cmdline, Cpus, FilePath, Memory, Name, Ready, Span};
use super::nearest::nearest;
use super::options::{
    Table, default, derived, list, optional, optional_file, options, profiles, table, tables,
};
use super::places::Places;
use super::resolved::Written;
use super::section::{Context, Section};
use super::shape::Shape;
use super::value::{Leaf, Scalar, Wrong, words};
use crate::{Error, Result};

options! {
    /// A VM: one TOML file.
    pub struct Vm, read as GivenVm {
        /// Files that this one is laid over, the later over the earlier, each of which may extend
        /// others: tables merge, `[[block]]` merges by `id` (one without is a further disk),
        /// values replace. Only the whole must have what a VM needs.
        extends: Vec<PathBuf> = list::<FilePath>("no other file").example("\"../base.toml\""),
        /// Name of the VM.
        name: String = derived::<Name>("the file's name without its extension"),
        /// Number of vCPUs.
        cpus: u32 = default::<Cpus>("1"),
        /// Size of guest memory. In bytes, or a text with KiB, MiB, GiB or TiB.
        memory: u64 = default::<Memory>("\"512MiB\""),
        /// What to boot.
        boot: Boot = table::<Boot>(),
        /// Disks: /dev/vda, vdb, … in this order.
        block: Vec<Block> = tables::<Block>("no disk"),
        /// The serial console.
        console: Console = table::<Console>(),
        /// When to restart and how to stop.
        lifecycle: Lifecycle = table::<Lifecycle>(),
        /// What `-p NAME` lays over the rest, as a file over one that it extends. It may hold what
        /// the top of the file may, but for `extends` and `profile`.
        profile: Vec<String> = profiles("no profile"),
    }
    computed {
        /// The file it was read from.
        file: PathBuf,
        /// Whether its name was given, rather than taken from the file's.
        named: bool,
        /// Where each of its values comes from.
        places: Places,
    }
}

impl Vm {
    /// Reads it from the top of its file, with all that is laid over and under that.
    pub(super) fn from_section(mut section: Section<'_>, places: Places) -> Option<Self> {
        let cx = section.cx;
        let mut given = GivenVm::read(&mut section);
        section.unknown(Vm::KEYS);
        let named = given.name.value.is_some();
        if given.name.value.is_none() && given.name.at.is_none() {
            let stem = cx.file.file_stem().unwrap_or_default().to_string_lossy();
            match name_of(&stem) {
                Some(name) => given.name.value = Some(name),
                None => {
                    let stem = cx.file.file_stem().unwrap_or_default().display();
                    let title = format!(
                        "`name` is \"{stem}\" after the file, expected {}",
                        Name::EXPECTS
                    );
                    let wrong = Diagnostic::value(None, title);
                    cx.report(wrong.help("add a line `name = \"web\"` at the top".to_owned()));
                }
            }
        }
        if let (Some(boot), Some(disks)) = (&given.boot.value, &given.block.value) {
            boot.names_a_disk(cx, disks);
        }
        given.finish(cx.file.to_owned(), named, places)
    }

    /// Reads a part of a VM, the top of a file or a profile, for its mistakes alone.
    pub(super) fn check(mut section: Section<'_>) {
        GivenVm::read(&mut section);
        section.unknown(Vm::KEYS);
    }

    /// Gives it another name than its file does.
    ///
    /// # Errors
    ///
    /// It is no name of a VM.
    pub fn rename(&mut self, name: &str) -> Result<()> {
        self.name = name_of(name).ok_or_else(|| {
            Error::usage(format!("the name is {name:?}, expected {}", Name::EXPECTS))
        })?;
        self.named = true;
        Ok(())
    }

    /// Has every disk that the guest can write dropped what it writes: `launcher up --ephemeral`.
    ///
    /// # Errors
    ///
    /// Another process serves such a disk, and keeps what is written.
    pub fn drop_what_is_written(&mut self) -> Result<()> {
        let kept = |block: &Block| block.is_served() && !block.ro;
        if let Some(index) = self.block.iter().position(kept) {
            let message = format!(
                "`--ephemeral` is given, but what is written to disk {index} is kept by the \
                 process that serves it"
            );
            return Err(Error::usage(message)
                .help("have that drop it: `ephemeral = true` in the file of a VM whose disk is served")
                .about(format!("block.{index}.vhost_user"))
                .at(&self.places));
        }
        self.block.iter_mut().for_each(Block::make_ephemeral);
        Ok(())
    }
}

impl Vm {
    /// Index of the disk that kernel and initrd are read from, if `boot.from_block` is given.
    pub fn boot_disk(&self) -> Option<usize> {
        self.boot.from_block.as_ref()?.among(&self.block)
    }
}

impl Boot {
    /// Reports a `from_block` that is the name of no disk.
    fn names_a_disk(&self, cx: &Context<'_>, disks: &[Block]) {
        let Some(name) = &self.from_block else { return };
        if let Some(disk) = name.among(disks) {
            if disks.get(disk).is_some_and(Block::is_served) {
                let title = format!("`from_block` is {disk}, a disk that another process serves");
                let help = "name files of the host with `kernel` and `initrd`".to_owned();
                cx.report(Diagnostic::value(self.from_block_at.clone(), title).help(help));
            }
            return;
        }
        let ids: Vec<_> = disks.iter().filter_map(|disk| disk.id.as_deref()).collect();
        let known = match disks.len() {
            0 => "there is no disk".to_owned(),
            1 => "there is one disk, 0".to_owned(),
            count => format!("there are {count} disks, 0 to {}", count - 1),
        };
        let (title, help) = match name {
            DiskName::Index(index) => (format!("`from_block` is {index}, but {known}"), None),
            DiskName::Id(id) => {
                let title = format!("`from_block` is \"{}\", the `id` of no disk", shortened(id));
                let help = match nearest(id, &ids) {
                    Some(index) => format!("did you mean \"{}\"?", ids[index]),
                    None => format!("{known}: an index stands without quotes"),
                };
                (title, Some(help))
            }
        };
        let help = match disks {
            [] => Some("add a `[[block]]` with the image".to_owned()),
            _ => help,
        };
        cx.report(Diagnostic::value(self.from_block_at.clone(), title).help(help));
    }
}

/// A disk, by its place in the file or by what its file calls it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub enum DiskName {
    /// Index over `[[block]]`, from 0.
    Index(usize),
    /// Its `id`.
    Id(String),
}

impl DiskName {
    /// Index of the disk of this name.
    fn among(&self, disks: &[Block]) -> Option<usize> {
        match self {
            DiskName::Index(index) => (*index < disks.len()).then_some(*index),
            DiskName::Id(id) => disks.iter().position(|disk| disk.id.as_ref() == Some(id)),
        }
    }
}

impl TryFrom<Scalar> for DiskName {
    type Error = Wrong;

    fn try_from(scalar: Scalar) -> Result<Self, Wrong> {
        match scalar {
            Scalar::Text(id) => Ok(DiskName::Id(id)),
            scalar => match usize::try_from(scalar.whole()?) {
                Ok(index) => Ok(DiskName::Index(index)),
                Err(_) => Err(Wrong::default()),
            },
        }
    }
}

impl Leaf for DiskName {
    type Plain = DiskName;
    const EXPECTS: &'static str = "the index of a disk, from 0, or its `id`";
    const SHAPE: Shape = Shape::Disk;
    const EXAMPLE: &'static str = "0";

    fn plain(self, _: &Context<'_>, _: &Range<usize>) -> Result<DiskName, String> {
        Ok(self)
    }
}

impl Written for DiskName {
    fn written(&self) -> toml::Value {
        match self {
            DiskName::Index(index) => (*index as u64).written(),
            DiskName::Id(id) => id.written(),
        }
    }
}

/// A name, if it is a good one.
fn name_of(name: &str) -> Option<String> {
    let value = DeValue::String(name.into());
    let value = toml::de::ValueDeserializer::from(Spanned::new(0..0, value));
    Name::deserialize(value).ok().map(|name| name.0)
}

options! {
    /// What to boot.
    pub struct Boot, read as GivenBoot {
        /// The kernel: a bzImage, or an ELF vmlinux with a PVH note.
        kernel: Option<HostFile> = optional_file("must be written, unless `from_block` is")
            .example("\"vmlinuz\""),
        /// Initial RAM disk: a file, or a folder that is packed as one at every boot of the guest,
        /// all of it root's.
        initrd: Option<HostFile> = optional_file("none").example("\"initrd.img\""),
        /// The disk whose ext4 file system has kernel and initrd, instead of `kernel` and
        /// `initrd`: `/vmlinuz` and `/initrd.img`, else the newest of `/boot/vmlinuz-*` with its
        /// initrd. They are read at every boot of the guest, so one that it has installed is
        /// booted next. Partition tables are understood, and `root = true` of that disk then
        /// means its root partition.
        from_block: Option<DiskName> = optional::<DiskName>("none").example("0"),
        /// Kernel parameters, appended to those that launcher generates (`console=`, `root=`);
        /// the kernel takes the last where two differ.
        cmdline: String = default::<Cmdline>("\"\""),
    }
    computed {
        /// Where `from_block` is, in the file's text.
        from_block_at: Option<Range<usize>>,
    }
}

impl Table for Boot {
    const KEYS: &'static [super::Key] = Boot::KEYS;

    fn from_section(mut section: Section<'_>) -> Option<Self> {
        let given = GivenBoot::read(&mut section);
        // What is written counts, right or wrong: an error of its own says what is wrong with it.
        match (&given.from_block.at, &given.kernel.at, &given.initrd.at) {
            (None, None, _) => section.missing("kernel", "\"vmlinuz\""),
            (None, Some(_), _) | (Some(_), None, None) => {}
            (Some(disk), kernel, initrd) => {
                let key = if kernel.is_some() { "kernel" } else { "initrd" };
                let title = format!("`{key}` is given, and `from_block` too, expected one of them");
                let at = kernel.clone().or_else(|| initrd.clone());
                section.cx.report(
                    Diagnostic::value(at, title)
                        .related(Some(disk.clone()), "the disk that has both")
                        .help("remove `from_block` to boot files of the host".to_owned()),
                );
            }
        }
        section.unknown(Boot::KEYS);
        let at = given.from_block.at.clone();
        given.finish(at)
    }
}

options! {
    /// The serial console.
    pub struct Console, read as GivenConsole {
        /// Where the console goes.
        mode: ConsoleMode = default::<ConsoleMode>("\"stdio\"").example("\"socket\""),
        /// File that what the guest prints is appended to.
        log: Option<PathBuf> = optional::<FilePath>("none").example("\"console.log\""),
        /// What the guest prints once it is up.
        ready: Option<String> = optional::<Ready>("what kernels and login prompts print"),
    }
}

words! {
    /// Where the serial console goes.
    pub enum ConsoleMode {
        /// Standard input and output.
        Stdio = "stdio",
        /// The control socket alone: see `launcher console` and `launcher logs`.
        Socket = "socket",
        /// The guest has no serial port.
        Off = "off",
    }
}

options! {
    /// When to restart and how to stop.
    pub struct Lifecycle, read as GivenLifecycle {
        /// What a reboot of the guest does.
        on_reboot: OnReboot = default::<OnReboot>("\"restart\"").example("\"stop\""),
        /// How long after a press of the power button the VM is ended, its disks flushed.
        stop_timeout: Duration = default::<Span>("\"30s\""),
    }
}

words! {
    /// What a reboot of the guest does.
    pub enum OnReboot {
        /// The VM starts again in the same process.
        Restart = "restart",
        /// `launcher` ends.
        Stop = "stop",
    }
}
