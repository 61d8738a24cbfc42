//! The VM as a whole, and its small tables.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;
use toml::de::DeValue;

use super::block::Block;
use super::diagnostic::Diagnostic;
use super::host_file::HostFile;
use super::kinds::{Cmdline, Cpus, FilePath, Memory, Name, Ready, Span};
use super::options::{
    Table, default, derived, file, optional, optional_file, options, table, tables,
};
use super::places::Places;
use super::section::Section;
use super::value::{Leaf, words};
use crate::{Error, Result};

options! {
    /// A VM: one TOML file.
    pub struct Vm, read as GivenVm {
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
    }
    computed {
        /// The file it was read from.
        file: PathBuf,
        /// Whether its name was given, rather than taken from the file's.
        named: bool,
        /// Where its keys stand in that file.
        places: Places,
    }
}

impl Table for Vm {
    const KEYS: &'static [super::Key] = Vm::KEYS;

    fn from_section(mut section: Section<'_>) -> Option<Self> {
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
        given.finish(cx.file.to_owned(), named, Places::new(cx.file, cx.text))
    }
}

impl Vm {
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
    pub fn drop_what_is_written(&mut self) {
        self.block.iter_mut().for_each(Block::make_ephemeral);
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
        kernel: HostFile = file("\"vmlinuz\""),
        /// Initial RAM disk.
        initrd: Option<HostFile> = optional_file("none").example("\"initrd.img\""),
        /// Kernel parameters, appended to those that launcher generates (`console=`, `root=`);
        /// the kernel takes the last where two differ.
        cmdline: String = default::<Cmdline>("\"\""),
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
