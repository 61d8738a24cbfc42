//! A VM's configuration as plain data: what vm.toml says, checked, defaults filled in.

use std::path::PathBuf;
use std::time::Duration;

use formats::OptionValue;

/// A VM: one TOML file.
#[derive(Clone, Debug)]
pub struct Vm {
    /// The file it was read from.
    pub file: PathBuf,
    /// Name of the VM. Default: the file's stem.
    pub name: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Size of guest memory in bytes.
    pub memory: u64,
    /// What to boot.
    pub boot: Boot,
    /// Disks, in the order of their device names.
    pub block: Vec<Block>,
    /// The serial console.
    pub console: Console,
    /// When to restart and how to stop.
    pub lifecycle: Lifecycle,
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct Boot {
    /// bzImage, or ELF vmlinux with a PVH note.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Appended to what launcher generates.
    pub cmdline: String,
}

/// A disk.
#[derive(Clone, Debug)]
pub struct Block {
    /// File or host block device, already resolved against the TOML file's folder.
    pub path: PathBuf,
    /// Name of the format, resolved from the extension where none was written.
    pub format: String,
    /// Whether `format` was written out.
    pub format_written: bool,
    /// Read-only.
    pub ro: bool,
    /// The guest's root file system.
    pub root: bool,
    /// Thin with discard, or fully allocated.
    pub sparse: bool,
    /// O_DIRECT on the host.
    pub o_direct: bool,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Serial number, 1 to 20 printable ASCII characters.
    pub id: Option<String>,
    /// Takes locks that QEMU honours too.
    pub lock: bool,
    /// Number of virtqueues, 1 to 64.
    pub queues: u16,
    /// Size in bytes to create or grow the image to.
    pub size: Option<u64>,
    /// Options of the format's own table.
    pub options: Vec<(&'static str, OptionValue)>,
}

/// The serial console.
#[derive(Clone, Debug)]
pub struct Console {
    /// Where it goes.
    pub mode: ConsoleMode,
    /// File that what the guest prints is appended to.
    pub log: Option<PathBuf>,
}

/// Where the serial console goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsoleMode {
    /// Standard input and output.
    Stdio,
    /// The guest has no serial port.
    Off,
}

/// When to restart and how to stop.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    /// What a guest reboot does.
    pub on_reboot: OnReboot,
    /// How long after a power-button press the VM is ended.
    pub stop_timeout: Duration,
}

/// What a guest reboot does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReboot {
    /// The VM starts again in the same process.
    Restart,
    /// `launcher` ends.
    Stop,
}
